"""`load` reads a checkpoint into `Params`, and `save` writes `Params` to a directory.

The readers of the formats are in the other modules of this folder. Here the tensors of a `Source` are fused, cast,
quantised and copied to the device, one at a time. The files are mapped, so the host holds no copy of the model.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jllama.cache import cache_bytes
from jllama.config import LlamaConfig, Quant
from jllama.device import default_device, free_bytes, trim_heap
from jllama.errors import InputError
from jllama.formats import open_source
from jllama.formats.layout import FUSED, expected_shapes, fused
from jllama.formats.native import directory
from jllama.formats.native import save as write
from jllama.formats.source import BLOCK_BYTES, Integers, Quantization, Source, Tensor
from jllama.formats.transform import as_dtype
from jllama.kernels import QuantizedTensor, Weight, WeightFormat, group_size, materialize
from jllama.params import Layer, Params, check_group, put, quantizer, table_quantizer
from jllama.step import runs_whole
from jllama.stream import PREFILL_PIECE

DTYPES = ("float32", "bfloat16", "float16")
QUANTS: tuple[Quant, ...] = get_args(Quant)

Progress = Callable[[Iterable[str], int], Iterable[str]]  # wraps the iterator of tensor names; the int is their count


def load(
    path: str | Path | Source,
    *,
    dtype: DTypeLike | None = None,
    quant: Quant = "none",
    group: int | None = None,
    batch: int = 1,
    max_len: int | None = None,
    stacked: bool | None = None,
    progress: Progress | None = None,
) -> Params:
    """Load a checkpoint onto the default device.

    ``dtype`` is that of activations, cache and unquantised weights, as a name or as jax.numpy takes it. The default is
    float32 on a CPU. On a GPU it is the checkpoint's dtype, or bfloat16 if its weights are quantised.
    ``quant`` is ``none``, ``int8`` (one scale per output channel) or ``int4`` (one scale per 128 inputs). ``group`` is
    another number of inputs per scale.
    ``batch`` and ``max_len`` (default: the model's context) are the size of the cache. `load` refuses a model that does
    not fit on the device together with this cache.
    ``stacked`` is the form of the layers (see `Params`). By default they are stacked if a decode step can then run in
    one launch.
    """
    source = path if isinstance(path, Source) else open_source(path)
    dtype = default_dtype(source) if dtype is None else dtype_name(dtype)
    if quant not in QUANTS:
        raise InputError(f"quant: expected one of {', '.join(QUANTS)}, found {quant!r}")
    check_group(source.config, quant, group)
    if source.quant is not None and quant != "none":
        raise InputError(
            f"quant: expected 'none' for {source.path}, whose weights have {source.quant.bits} bits already"
        )
    max_len = max_len or source.config.max_seq_len
    check_memory(source, dtype, quant, group, batch, max_len)
    if stacked is None:
        form = stored(source) if quant == "none" else (quant, group)
        stacked = _uniform(source) and runs_whole(source.config, dtype, *form, batch=batch, max_len=max_len)
    elif stacked and not _uniform(source):
        raise InputError(f"{source.path}: stacked: expected every layer in the format of the first, found another")
    params = _assemble(source, dtype, quant, group, progress or (lambda names, _: names), stacked)
    trim_heap()  # what quantising freed would otherwise stay beside the weights
    return params


def dtype_name(dtype: DTypeLike) -> str:
    """The name of a dtype, which must be one that a model can have."""
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = dtype
    if name not in DTYPES:
        raise InputError(f"dtype: expected one of {', '.join(DTYPES)}, found {name!r}")
    return str(name)


def stored(source: Source) -> tuple[Quant, int | None]:
    """The weight format of the layers, as the arguments ``quant`` and ``group`` of `load`."""
    if source.quant is None:
        return "none", None
    return ("int8" if source.quant.bits == 8 else "int4"), source.quant.group


def _uniform(source: Source) -> bool:
    """Whether all layers have the same weight formats, so that one array can hold them all."""
    layers = (
        [source.tensors[f"layers.{i}.{part}"].quant for parts in FUSED.values() for part in parts]
        for i in range(source.config.n_layers)
    )
    first = next(layers)
    head = source.quant if source.quant is None or not source.config.tie_embeddings else source.tensors["embed"].quant
    return head == source.quant and all(layer == first for layer in layers)


def default_dtype(source: Source) -> str:
    """The default dtype of `load`. On a CPU it is float32, because 16-bit arithmetic is slow there. Elsewhere it is the
    checkpoint's dtype, or bfloat16 if its weights are quantised: the kernels do not take float32."""
    if default_device().platform == "cpu":
        return "float32"
    return source.dtype if source.quant is None else "bfloat16"


def _assemble(
    source: Source,
    dtype: str,
    quant: Quant,
    group: int | None,
    progress: Progress,
    stacked: bool,
) -> Params:
    config = source.config
    parts_of = fused(config)
    fields = [(i, name) for i in range(config.n_layers) for name in parts_of]
    keys = ["embed", "norm"] + ([] if config.tie_embeddings else ["lm_head"])
    names = keys + [f"layers.{i}.{name}" for i, name in fields]
    loaded: dict[str, Any] = {}
    for name in progress(names, len(names)):
        prefix, _, field = name.rpartition(".")
        parts = [f"{prefix}.{part}" for part in parts_of[field]] if prefix else [name]
        tensors = [source.tensors[part] for part in parts]
        if name == "embed" and not _is_integer_table(config, tensors[0]):
            tensors = [as_dtype(tensors[0], "float32") if tensors[0].quant else tensors[0]]
        to_weight = table_quantizer(quant, config) if name == "embed" else quantizer(quant, group)
        weight = _to_device(tensors, dtype, None if len(tensors[0].shape) == 1 else to_weight)
        if prefix and stacked:
            loaded[field] = put(loaded.get(field), weight, int(prefix.removeprefix("layers.")), config.n_layers)
        else:
            loaded[name] = weight
    if stacked:
        layers = Layer(**{name: loaded[name] for name in parts_of})
    else:
        layers = tuple(
            Layer(**{name: loaded[f"layers.{i}.{name}"] for name in parts_of}) for i in range(config.n_layers)
        )
    return Params(loaded["embed"], layers, loaded["norm"], loaded.get("lm_head"), config)


def _is_integer_table(config: LlamaConfig, embed: Tensor) -> bool:
    """Whether an embedding stays in the integers of its file: if it is the head, too, and they are ours."""
    return config.tie_embeddings and embed.quant == Quantization(8, None)


def _to_device(tensors: list[Tensor], dtype: str, to_weight: Callable[[jax.Array], Weight] | None) -> Weight:
    """The tensors, concatenated along their rows, on the device. Large ones are converted block by block, so that no
    float copy of them is in memory."""
    quants = {tensor.quant for tensor in tensors}
    if to_weight is not None and len(quants) == 1 and (quant := tensors[0].quant) is not None:
        kind = jnp.int8 if quant.bits == 8 else jnp.int4
        arrays = [tensor.read() for tensor in tensors]
        data = jnp.concatenate([jnp.asarray(array.data, kind) for array in arrays])
        return QuantizedTensor(data, jnp.concatenate([jnp.asarray(array.scale) for array in arrays]))

    # Unquantised parts, or parts of different formats, are concatenated as floats. This is done on the device, because
    # the host would need a copy.
    def converted(floats: list[jax.Array]) -> Weight:
        whole = floats[0] if len(floats) == 1 else jnp.concatenate(floats)
        weight = whole if to_weight is None else to_weight(whole)
        return weight if isinstance(weight, QuantizedTensor) else weight.astype(dtype)

    if sum(4 * math.prod(tensor.shape) for tensor in tensors) <= 2 * BLOCK_BYTES:
        return converted([jnp.asarray(tensor.floats(0, tensor.shape[0])) for tensor in tensors])
    blocks = [converted([jnp.asarray(t.floats(*block))]) for t in tensors for block in t.blocks(BLOCK_BYTES)]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *blocks)


@dataclass(frozen=True)
class Memory:
    """Bytes that a run takes on the device."""

    weights: int
    cache: int
    workspace: int  # activations and attention scores of one prefill piece, and one large tensor during load

    @property
    def total(self) -> int:
        """The sum of all three."""
        return self.weights + self.cache + self.workspace


def memory_of(config: LlamaConfig, dtype: str, quant: Quant, group: int | None, batch: int, max_len: int) -> Memory:
    """The memory that a model would take with these settings."""
    cache = cache_bytes(config, batch, max_len, jnp.dtype(dtype))
    return Memory(model_bytes(config, dtype, quant, group), cache, workspace_bytes(config, batch, max_len, dtype))


def model_bytes(config: LlamaConfig, dtype: str, quant: Quant, group: int | None = None) -> int:
    """Bytes of the weights on the device."""
    itemsize, total = jnp.dtype(dtype).itemsize, 0
    for name, shape in expected_shapes(config).items():
        size = int(np.prod(shape))
        if quant == "none" or len(shape) == 1 or (name == "embed" and not config.tie_embeddings):
            total += size * itemsize
        elif name == "embed":  # see `table_quantizer`
            total += size + 4 * shape[0]
        else:
            bits = WeightFormat(quant).bits
            per_scale = shape[-1] if bits == 8 and group is None else group_size(shape[-1], group or 128)
            total += size * bits // 8 + size // per_scale * (4 if per_scale == shape[-1] else 2)
    return total


def workspace_bytes(config: LlamaConfig, batch: int, max_len: int, dtype: str) -> int:
    """An estimate of the bytes that a run needs besides weights and cache."""
    rows = batch * min(max_len, PREFILL_PIECE)
    activations = rows * (4 * config.dim + 3 * config.hidden_dim) * 4
    scores = rows * config.n_heads * max_len * 4
    return activations + scores + config.vocab_size * config.dim * jnp.dtype(dtype).itemsize


def check_memory(source: Source, dtype: str, quant: Quant, group: int | None, batch: int, max_len: int) -> None:
    """Raise `InputError` if weights, cache and workspace do not fit into the free memory of the device. This is checked
    before anything is loaded. The message names settings that would fit."""
    free = free_bytes(default_device())
    if free is None:
        return
    narrower: tuple[Quant, ...] = QUANTS[QUANTS.index(quant) + 1 :]
    if source.quant is not None:  # a quantised checkpoint cannot be quantised again
        (quant, group), narrower = stored(source), ()

    def need(quant: Quant, max_len: int, group: int | None = group) -> Memory:
        return memory_of(source.config, dtype, quant, group, batch, max_len)

    needed = need(quant, max_len)
    if needed.total <= free:
        return
    fits = [f"--quant {name}" for name in narrower if need(name, max_len, None).total <= free][:1]
    lengths = [n for n in (max_len >> k for k in range(1, 8)) if n >= 128 and need(quant, n).total <= free]
    fits += [f"--max-seq-len {n}" for n in lengths[:1]]
    raise InputError(
        f"{source.path}: needs {_gb(needed.total)} "
        f"(weights {_gb(needed.weights)}, cache {_gb(needed.cache)}, rest workspace), the device has {_gb(free)} free; "
        f"{'would fit: ' + ' or '.join(fits) if fits else 'no setting would fit'}"
    )


def _gb(n: int) -> str:
    return f"{n / 1e9:.2f} GB"


def save(params: Params, path: str | Path, *, tokenizer: str | Path | None = None, force: bool = False) -> None:
    """Write ``params`` to a native directory. If nothing is quantised, transformers can read it, too."""
    source = Source(
        Path(path), "native", params.config, dict(_unfused(params)), None if tokenizer is None else Path(tokenizer)
    )
    write(directory(source), Path(path), force=force)


def _unfused(params: Params) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of every weight, unfused, as in a source. A tensor is copied to the host when it is read."""
    yield "embed", _tensor("embed", params.embed)
    yield "norm", _tensor("norm", params.norm)
    if params.lm_head is not None:
        yield "lm_head", _tensor("lm_head", params.lm_head)
    shapes = expected_shapes(params.config)
    for i in range(params.config.n_layers):
        layer = materialize(params.layer(i))
        for field, parts in fused(params.config).items():
            at = 0
            for name in (f"layers.{i}.{part}" for part in parts):
                rows = shapes[name][0]
                yield name, _tensor(name, getattr(layer, field), at, rows)
                at += rows


def _tensor(name: str, weight: Weight, at: int = 0, count: int | None = None) -> Tensor:
    """``count`` rows of a weight from row ``at``, as a tensor of a source."""
    shape = (weight.shape[0] if count is None else count, *weight.shape[1:])
    if not isinstance(weight, QuantizedTensor):
        dtype = str(weight.dtype)
        return Tensor(shape, dtype, name, lambda begin, end: np.asarray(weight[at + begin : at + end]))

    def rows(begin: int, end: int) -> Integers:
        data = weight.data[at + begin : at + end].astype(jnp.int8)
        return Integers(np.asarray(data), np.asarray(weight.scale[at + begin : at + end]))

    quant = Quantization(weight.bits, None if weight.scale.shape[-1] == 1 else weight.group)
    return Tensor(shape, str(weight.scale.dtype), name, rows, quant)

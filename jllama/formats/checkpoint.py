"""From a checkpoint to `Params`, tensor by tensor, and back to a directory.

The formats themselves are `convert`'s; here a source's tensors are joined, cast, quantised and put on the device.
At any moment one tensor is on its way: the file is mapped, so the host holds no copy of the model.
"""

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
from jllama.device import default_device, free_bytes
from jllama.errors import InputError
from jllama.formats import open_source
from jllama.formats.layout import FUSED, expected_shapes, fused
from jllama.formats.native import directory
from jllama.formats.native import save as write
from jllama.formats.source import Integers, Quantization, Source, Tensor
from jllama.kernels import QuantizedTensor, Weight, WeightFormat, group_size, materialize
from jllama.params import Layer, Params, put, quantizer
from jllama.step import runs_whole
from jllama.stream import PREFILL_PIECE

DTYPES = ("float32", "bfloat16", "float16")
QUANTS: tuple[Quant, ...] = get_args(Quant)

Progress = Callable[[Iterable[str], int], Iterable[str]]  # wraps the names of `total` tensors, to show them pass


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

    ``dtype``: of activations, cache and unquantised weights, as jax.numpy takes it or by name (default: float32 on a
    CPU; on a GPU the checkpoint's, or bfloat16 beside quantised weights).
    ``quant``: ``none``, ``int8`` (a scale per output channel) or ``int4`` (per group of 128); ``group`` changes that.
    ``batch`` and ``max_len`` (default: the model's context) size the cache that must fit beside the weights.
    ``stacked``: the form of the layers (see `Params`); by default stacked where a decode step then is one launch.
    """
    source = path if isinstance(path, Source) else open_source(path)
    dtype = default_dtype(source) if dtype is None else dtype_name(dtype)
    if quant not in QUANTS:
        raise InputError(f"quant: expected one of {', '.join(QUANTS)}, found {quant!r}")
    if source.quant is not None and quant != "none":
        raise InputError(
            f"quant: expected 'none' for {source.path}, whose weights have {source.quant.bits} bits already"
        )
    max_len = max_len or source.config.max_seq_len
    check_memory(source, dtype, quant, group, batch, max_len)
    if stacked is None:
        form = stored(source) if quant == "none" else (quant, group)
        stacked = _alike(source) and runs_whole(source.config, dtype, *form, batch=batch, max_len=max_len)
    elif stacked and not _alike(source):
        raise InputError(f"{source.path}: stacked: expected every layer in the format of the first, found another")
    return _assemble(source, dtype, quantizer(quant, group), progress or (lambda names, _: names), stacked)


def dtype_name(dtype: DTypeLike) -> str:
    """The name of a dtype that a model can have, however it was given."""
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = dtype
    if name not in DTYPES:
        raise InputError(f"dtype: expected one of {', '.join(DTYPES)}, found {name!r}")
    return str(name)


def stored(source: Source) -> tuple[Quant, int | None]:
    """How the layers' weights are stored, in the words of `load`."""
    if source.quant is None:
        return "none", None
    return ("int8" if source.quant.bits == 8 else "int4"), source.quant.group


def _alike(source: Source) -> bool:
    """Whether every layer is stored like the first, so that one array can hold them all."""
    layers = (
        [source.tensors[f"layers.{i}.{part}"].quant for parts in FUSED.values() for part in parts]
        for i in range(source.config.n_layers)
    )
    first = next(layers)
    return all(layer == first for layer in layers)


def default_dtype(source: Source) -> str:
    """float32 on a CPU, where 16-bit arithmetic is slow; elsewhere what the checkpoint holds, and bfloat16 beside
    quantised weights: no kernel takes float32."""
    if default_device().platform == "cpu":
        return "float32"
    return source.dtype if source.quant is None else "bfloat16"


def _assemble(
    source: Source,
    dtype: str,
    to_weight: Callable[[jax.Array], Weight],
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
        # Vectors and the embedding, which is looked up, not multiplied with, stay floats.
        plain = name == "embed" or len(source.tensors[parts[0]].shape) == 1
        weight = _place(source, parts, dtype, None if plain else to_weight)
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


def _place(source: Source, parts: list[str], dtype: str, to_weight: Callable[[jax.Array], Weight] | None) -> Weight:
    """The rows of ``parts``, one below the other, on the device."""
    tensors = [source.tensors[name] for name in parts]
    quants = {tensor.quant for tensor in tensors}
    if to_weight is not None and len(quants) == 1 and (quant := tensors[0].quant) is not None:
        kind = jnp.int8 if quant.bits == 8 else jnp.int4
        arrays = [tensor.read() for tensor in tensors]
        data = jnp.concatenate([jnp.asarray(array.data, kind) for array in arrays])
        return QuantizedTensor(data, jnp.concatenate([jnp.asarray(array.scale) for array in arrays]))
    # Whatever is stored otherwise, or not all alike, is joined as floats. On the device: the host would need a copy.
    floats = [jnp.asarray(tensor.floats(0, tensor.shape[0])) for tensor in tensors]
    whole = floats[0] if len(floats) == 1 else jnp.concatenate(floats)
    weight = whole if to_weight is None else to_weight(whole)
    return weight if isinstance(weight, QuantizedTensor) else weight.astype(dtype)


@dataclass(frozen=True)
class Memory:
    """Bytes that a run takes on the device."""

    weights: int
    cache: int
    workspace: int  # one piece of a prompt's activations and scores, logits, one tensor

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.cache + self.workspace


def memory_of(config: LlamaConfig, dtype: str, quant: Quant, group: int | None, batch: int, max_len: int) -> Memory:
    """What a model of a shape would take in some form."""
    cache = cache_bytes(config, batch, max_len, jnp.dtype(dtype))
    return Memory(model_bytes(config, dtype, quant, group), cache, workspace_bytes(config, batch, max_len, dtype))


def model_bytes(config: LlamaConfig, dtype: str, quant: Quant, group: int | None = None) -> int:
    """What the weights take on the device."""
    itemsize, total = jnp.dtype(dtype).itemsize, 0
    for name, shape in expected_shapes(config).items():
        size = int(np.prod(shape))
        if quant == "none" or len(shape) == 1 or name == "embed":
            total += size * itemsize
        else:
            bits = WeightFormat(quant).bits
            per_scale = shape[-1] if bits == 8 and group is None else group_size(shape[-1], group or 128)
            total += size * bits // 8 + size // per_scale * (4 if per_scale == shape[-1] else 2)
    return total


def workspace_bytes(config: LlamaConfig, batch: int, max_len: int, dtype: str) -> int:
    """What a run needs beside weights and cache."""
    rows = batch * min(max_len, PREFILL_PIECE)
    activations = rows * (4 * config.dim + 3 * config.hidden_dim) * 4
    scores = rows * config.n_heads * max_len * 4
    return activations + scores + config.vocab_size * config.dim * jnp.dtype(dtype).itemsize


def check_memory(source: Source, dtype: str, quant: Quant, group: int | None, batch: int, max_len: int) -> None:
    """Hold weights, cache and workspace against what the device has free, before anything is loaded."""
    free = free_bytes(default_device())
    if free is None:
        return
    narrower: tuple[Quant, ...] = QUANTS[QUANTS.index(quant) + 1 :]
    if source.quant is not None:  # what has integers already cannot be quantised again
        (quant, group), narrower = stored(source), ()

    def need(quant: Quant, max_len: int, group: int | None = group) -> Memory:
        return memory_of(source.config, dtype, quant, group, batch, max_len)

    wanted = need(quant, max_len)
    if wanted.total <= free:
        return
    fits = [f"--quant {name}" for name in narrower if need(name, max_len, None).total <= free][:1]
    lengths = [n for n in (max_len >> k for k in range(1, 8)) if n >= 128 and need(quant, n).total <= free]
    fits += [f"--max-seq-len {n}" for n in lengths[:1]]
    raise InputError(
        f"{source.path}: needs {_gb(wanted.total)} "
        f"(weights {_gb(wanted.weights)}, cache {_gb(wanted.cache)}, rest workspace), the device has {_gb(free)} free; "
        f"{'would fit: ' + ' or '.join(fits) if fits else 'no setting would fit'}"
    )


def _gb(n: int) -> str:
    return f"{n / 1e9:.2f} GB"


def save(params: Params, path: str | Path, *, tokenizer: str | Path | None = None, force: bool = False) -> None:
    """Write a native directory (which transformers reads, too, where nothing is quantised)."""
    source = Source(
        Path(path), "native", params.config, dict(_unfused(params)), None if tokenizer is None else Path(tokenizer)
    )
    write(directory(source), Path(path), force=force)


def _unfused(params: Params) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under the name it has in a source; nothing leaves the device before it is read."""
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
    """Rows of a weight on the device, as a tensor of a source."""
    shape = (weight.shape[0] if count is None else count, *weight.shape[1:])
    if not isinstance(weight, QuantizedTensor):
        dtype = str(weight.dtype)
        return Tensor(shape, dtype, name, lambda begin, end: np.asarray(weight[at + begin : at + end]))

    def rows(begin: int, end: int) -> Integers:
        data = weight.data[at + begin : at + end].astype(jnp.int8)
        return Integers(np.asarray(data), np.asarray(weight.scale[at + begin : at + end]))

    quant = Quantization(weight.bits, None if weight.scale.shape[-1] == 1 else weight.group)
    return Tensor(shape, str(weight.scale.dtype), name, rows, quant)

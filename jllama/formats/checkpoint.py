"""`load` reads a checkpoint into `Params`, and `save` writes `Params` to a directory.

The readers of the formats are in the other modules of this folder. Here the tensors of a `Source` are fused, cast,
quantised and copied to the device, one at a time. The files are mapped, so the host holds no copy of the model.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jllama.config import LlamaConfig, Quant
from jllama.device import default_device, trim_heap
from jllama.errors import InputError
from jllama.formats import open_source
from jllama.formats.layout import FUSED, fused
from jllama.formats.memory import QUANTS, check_memory, stored
from jllama.formats.native import directory
from jllama.formats.native import save as write
from jllama.formats.sharded import Shards
from jllama.formats.source import BLOCK_BYTES, Integers, Quantization, Source, Tensor
from jllama.formats.transform import as_dtype
from jllama.kernels import QuantizedTensor, Weight, WeightFormat, materialize
from jllama.mesh.layout import DATA, MODEL, auto, axis_size, part_rows
from jllama.params import Layer, Params, check_group, field_format, laid_out, put, quantizer
from jllama.step import runs_whole

DTYPES = ("float32", "bfloat16", "float16")

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
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> Params:
    """Load a checkpoint onto the default device, or onto a mesh, every device of which reads its part.

    ``dtype`` is that of activations, cache and unquantised weights, as a name or as jax.numpy takes it. The default is
    float32 on a CPU. On a GPU it is the checkpoint's dtype, or bfloat16 if its weights are quantised.
    ``quant`` is ``none``, ``int8`` (one scale per output channel) or ``int4`` (one scale per 128 inputs). ``group`` is
    another number of inputs per scale.
    ``batch`` and ``max_len`` (default: the model's context) are the size of the cache. `load` refuses a model that does
    not fit on the device together with this cache.
    ``stacked`` is the form of the layers (see `Params`). By default they are stacked if a decode step can then run in
    one launch.
    ``mesh`` has the axes ``data``, over which rows are divided, and ``model``, over which the weights are; either may
    be missing (see `jllama.shardings`).
    """
    source = path if isinstance(path, Source) else open_source(path)
    dtype = default_dtype(source) if dtype is None else dtype_name(dtype)
    if quant not in QUANTS:
        raise InputError(f"quant: expected one of {', '.join(QUANTS)}, found {quant!r}")
    check_group(source.config, quant, group)
    if source.quant is not None and quant != "none":
        raise InputError(f"quant: expected 'none' for {source.path}, whose weights are {source.quant.format} already")
    max_len = max_len or source.config.max_seq_len
    shards = None if mesh is None else Shards.of(source, auto(mesh), dtype, quant, group)
    check_memory(source, dtype, quant, group, batch, max_len, mesh)
    if stacked is None:
        form = stored(source) if quant == "none" else (quant, group)
        parts = axis_size(mesh, DATA)
        stacked = _uniform(source) and runs_whole(
            source.config, dtype, *form, batch=-(-batch // parts) * parts, max_len=max_len, mesh=mesh
        )
    elif stacked and not _uniform(source):
        raise InputError(f"{source.path}: stacked: expected every layer in the format of the first, found another")
    put_weight = functools.partial(_put_on_one_device, dtype) if shards is None else shards.put
    params = _assemble(source, quant, group, put_weight, progress or (lambda names, _: names), stacked)
    if shards is not None:
        params = replace(params, config=shards.config)
    trim_heap()  # what quantising freed would otherwise stay beside the weights
    return params if mesh is None else laid_out(params, mesh)


def dtype_name(dtype: DTypeLike) -> str:
    """The name of a dtype, which must be one that a model can have."""
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = dtype
    if name not in DTYPES:
        raise InputError(f"dtype: expected one of {', '.join(DTYPES)}, found {name!r}")
    return str(name)


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
    quant: Quant,
    group: int | None,
    put_weight: Callable[..., Weight],
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
        tensors, matrix = [source.tensors[part] for part in parts], len(source.tensors[parts[0]].shape) > 1
        keeps_integers = matrix and (name != "embed" or _is_integer_table(config, tensors[0]))
        if not keeps_integers and tensors[0].quant:
            tensors = [as_dtype(tensor, "float32") for tensor in tensors]
        form = field_format(field, config, quant, group) if matrix else ("none", None)
        weight = put_weight(field, tensors, *form)
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
    return config.tie_embeddings and embed.quant == Quantization("int8", None)


def _put_on_one_device(dtype: str, field: str, tensors: list[Tensor], quant: Quant, group: int | None) -> Weight:
    """The tensors, concatenated along their rows, on the default device. Floats become ``quant``. Large ones are
    converted block by block, so that no float copy of them is in memory."""
    del field
    if len({tensor.quant for tensor in tensors}) == 1 and (stored := tensors[0].quant) is not None:
        kind = WeightFormat(stored.format).dtype
        arrays = [tensor.read() for tensor in tensors]
        data = jnp.concatenate([jnp.asarray(array.data, kind) for array in arrays])
        return QuantizedTensor(data, jnp.concatenate([jnp.asarray(array.scale) for array in arrays]))
    to_weight = quantizer(quant, group)

    # Unquantised parts, or parts of different formats, are concatenated as floats. This is done on the device, because
    # the host would need a copy.
    def converted(floats: list[jax.Array]) -> Weight:
        weight = to_weight(floats[0] if len(floats) == 1 else jnp.concatenate(floats))
        return weight if isinstance(weight, QuantizedTensor) else weight.astype(dtype)

    if sum(4 * math.prod(tensor.shape) for tensor in tensors) <= 2 * BLOCK_BYTES:
        return converted([jnp.asarray(tensor.floats(0, tensor.shape[0])) for tensor in tensors])
    blocks = [converted([jnp.asarray(t.floats(*block))]) for t in tensors for block in t.blocks(BLOCK_BYTES)]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *blocks)


def save(params: Params, path: str | Path, *, tokenizer: str | Path | None = None, force: bool = False) -> None:
    """Write ``params`` to a native directory. If nothing is quantised, transformers can read it, too."""
    source = Source(
        Path(path), "native", params.config, dict(_unfused(params)), None if tokenizer is None else Path(tokenizer)
    )
    write(directory(source), Path(path), force=force)


def _unfused(params: Params) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of every weight, unfused, as in a source. A tensor is copied to the host when it is read."""
    shards = axis_size(params.mesh, MODEL)
    if params.mesh is not None:
        params = laid_out(params, auto(params.mesh))
    for name in ("embed", "norm", "lm_head"):
        if (weight := getattr(params, name)) is not None:
            yield name, _tensor(name, weight)
    for i in range(params.config.n_layers):
        layer = materialize(params.layer(i))
        for field, parts in fused(params.config).items():
            rows = part_rows(params.config, shards, field)
            for part in parts:
                name = f"layers.{i}.{part}"
                yield name, _tensor(name, getattr(layer, field), rows.get(part))


def _tensor(name: str, weight: Weight, index: np.ndarray | None = None) -> Tensor:
    """Rows of a weight (default: all), as a tensor of a source."""
    shape = (weight.shape[0] if index is None else len(index), *weight.shape[1:])

    def chosen(begin: int, end: int) -> Weight:
        at = np.arange(begin, end) if index is None else index[begin:end]
        consecutive = at[-1] - at[0] == end - begin - 1  # so they are where one device holds the model
        return jax.tree.map(lambda a: a[at[0] : at[-1] + 1] if consecutive else a[at], weight)

    if not isinstance(weight, QuantizedTensor):
        return Tensor(shape, str(weight.dtype), name, lambda begin, end: np.asarray(chosen(begin, end)))

    def rows(begin: int, end: int) -> Integers:
        part: Any = chosen(begin, end)
        return Integers(np.asarray(part.data.astype(jnp.int8)), np.asarray(part.scale))

    form: Any = weight.format.value
    quant = Quantization(form, None if weight.scale.shape[-1] == 1 else weight.group)
    return Tensor(shape, str(weight.scale.dtype), name, rows, quant)

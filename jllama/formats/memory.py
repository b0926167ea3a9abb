"""What a model takes of a device's memory: checked before anything is loaded."""

from dataclasses import dataclass
from typing import get_args

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jllama.cache import cache_bytes
from jllama.config import LlamaConfig, Quant
from jllama.device import free_on
from jllama.errors import InputError
from jllama.formats.layout import expected_shapes
from jllama.formats.source import Source
from jllama.kernels import WeightFormat, group_size
from jllama.mesh.layout import DATA, MODEL, axis_size, shard_config
from jllama.params import field_format
from jllama.stream import PREFILL_PIECE

QUANTS: tuple[Quant, ...] = get_args(Quant)


def stored(source: Source) -> tuple[Quant, int | None]:
    """The weight format of the layers, as the arguments ``quant`` and ``group`` of `load`."""
    if source.quant is None:
        return "none", None
    return source.quant.format, source.quant.group


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
        form, its_group = ("none", None) if len(shape) == 1 else field_format(name, config, quant, group)
        if form == "none":
            total += size * itemsize
        else:
            whole_row = form == "int8" and its_group is None
            per_scale = shape[-1] if whole_row else group_size(shape[-1], its_group or 128)
            total += size * WeightFormat(form).bits // 8 + size // per_scale * (4 if per_scale == shape[-1] else 2)
    return total


def workspace_bytes(config: LlamaConfig, batch: int, max_len: int, dtype: str) -> int:
    """An estimate of the bytes that a run needs besides weights and cache."""
    rows = batch * min(max_len, PREFILL_PIECE)
    activations = rows * (4 * config.dim + 3 * config.hidden_dim) * 4
    scores = rows * config.n_heads * max_len * 4
    return activations + scores + config.vocab_size * config.dim * jnp.dtype(dtype).itemsize


def check_memory(
    source: Source,
    dtype: str,
    quant: Quant,
    group: int | None,
    batch: int,
    max_len: int,
    mesh: Mesh | None = None,
) -> None:
    """Raise `InputError` if weights, cache and workspace do not fit into the free memory of the device, or each
    device's part of them into that of a mesh's devices. The message names settings that would fit."""
    config, free = source.config, free_on(mesh)
    if free is None:
        return
    if mesh is not None:
        shards, batch = axis_size(mesh, MODEL), -(-batch // axis_size(mesh, DATA))
        config = shard_config(config, shards).replace(vocab_size=config.vocab_size // shards)
    narrower: tuple[Quant, ...] = QUANTS[QUANTS.index(quant) + 1 :]
    if source.quant is not None:  # a quantised checkpoint cannot be quantised again
        (quant, group), narrower = stored(source), ()

    def need(quant: Quant, max_len: int, group: int | None = group) -> Memory:
        return memory_of(config, dtype, quant, group, batch, max_len)

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

"""What the GEMM kernels share: weights as arguments, tiles of them in shared memory, and their scales.

They make the weight wgmma's left operand: ``acc [out, rows] += w [out, in] · x [rows, in]ᵀ``. Only the left operand may
come from registers, and registers are where an integer weight becomes a float (`widen`). With float weights, the
medium-M GEMM may do it the other way round.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ...dispatch import Unsupported
from ...formats import WeightFormat
from ...quantized import QuantizedTensor

Weight = jax.Array | QuantizedTensor
ACTIVATION_DTYPES = (jnp.bfloat16, jnp.float16)
WGMMA_ROWS = 64  # wgmma takes 64 rows of its left operand at a time, no fewer


@dataclass(frozen=True)
class Format:
    """How a weight is stored: the format of its elements, and the inputs that share a scale (None: one scale a row)."""

    elements: WeightFormat
    group: int | None = None

    @property
    def dtype(self) -> jnp.dtype:
        return self.elements.dtype

    @property
    def quantized(self) -> bool:
        return self.elements.quantized

    @property
    def bits(self) -> int:
        return self.elements.bits

    @property
    def grouped(self) -> bool:
        return self.group is not None


def format_of(w: Weight) -> Format:
    """The format of a weight."""
    if not isinstance(w, QuantizedTensor):
        return Format(WeightFormat(w.dtype.name))
    return Format(w.format, None if w.scale.shape[-1] == 1 else w.group)


def data_and_scale(w: Weight) -> tuple[jax.Array, jax.Array | None]:
    """A weight's elements and its scales (None for a float weight), each with a layer axis in front."""
    data, scale = (w.data, w.scale) if isinstance(w, QuantizedTensor) else (w, None)
    stacked = [a if a is None or a.ndim == 3 else a[None] for a in (data, scale)]
    return stacked[0], stacked[1]


def check_operands(x: jax.Array, w: Weight) -> None:
    """Raise `Unsupported` unless the GEMM kernels can multiply these dtypes and shapes."""
    fmt = format_of(w)
    if x.dtype not in ACTIVATION_DTYPES:
        raise Unsupported(f"activations must be bfloat16 or float16, found {x.dtype}")
    if not fmt.quantized and fmt.dtype != x.dtype:
        raise Unsupported(f"weight is {fmt.dtype} but activations are {x.dtype}")
    if x.shape[-1] != w.shape[-1]:
        raise Unsupported(f"activations have {x.shape[-1]} inputs, the weight has {w.shape[-1]}")
    if fmt.group is not None and fmt.group % 32:
        raise Unsupported(f"groups of {fmt.group} inputs: must be a multiple of 32")


def swizzled(shape: tuple[int, ...], dtype: Any, min_slice: int | None = None, rows: int = 8) -> Any:
    """Shared memory in the layout that TMA writes and wgmma reads: see `transforms_of`."""
    return plgpu.SMEM(shape, dtype, transforms=transforms_of(shape[-1], dtype, min_slice, rows))


def transforms_of(columns: int, dtype: Any, min_slice: int | None = None, rows: int = 8) -> tuple[Any, ...]:
    """Tiles swizzled over up to 128 bytes. ``min_slice`` is the shortest slice of the last axis that will be taken
    (default: all of it). wgmma needs tiles of 8 rows. TMA can address only multiples of a tile's ``rows``."""
    bits = jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else 8 * jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle((min_slice or columns) * bits)
    return plgpu.TilingTransform((rows, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle)


def nbytes(shape: tuple[int, ...], bits: int) -> int:
    """Bytes of a dense array."""
    size = 1
    for n in shape:
        size *= n
    return size * bits // 8


def pad_rows(x: jax.Array, axis: int) -> jax.Array:
    """``x`` with zeros at the end of ``axis``, up to a multiple of 8: the rows of a shared memory tile."""
    missing = -x.shape[axis] % 8
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)]) if missing else x


def pad_rows_unless_short(x: jax.Array, axis: int) -> jax.Array:
    """`pad_rows`, unless there are fewer rows than one tile has: the TMA copy of a tile fills the rest with zeros."""
    return x if x.shape[axis] < 8 else pad_rows(x, axis)


def scale_column(scales: Any, row: Any, group: Any, rows: int) -> jax.Array:
    """The scales of one group of inputs, for ``rows`` rows from ``row``, as float32 in registers."""
    column = scales.at[pl.ds(row, rows), group]
    return plgpu.load(column, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False).astype(jnp.float32)


def store(ref: Any, values: jax.Array) -> None:
    """Write an array where bank conflicts and coalescing hardly matter.

    From JAX 0.12 on ``ref[...] = values`` is an error unless the store has no conflicts. Before, Mosaic chose the
    slower store by itself."""
    explicit_store = getattr(plgpu, "store", None)
    if explicit_store is None:
        ref[...] = values
    else:
        explicit_store(ref, values, optimized=False)


def broadcast_rows(column: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """``column`` [rows] as ``shape`` [rows, columns]."""
    return lax.broadcast_in_dim(column, shape, [0])

"""Weights of 8 or 4 bits.

The invariant: ``weight[o, i] ~= data[o, i] * scale[o, i // group]`` with ``group = in / scale.shape[-1]``.
One group a row is quantisation per output channel; more is quantisation per group. It is symmetric: there is no zero
point, and zero stays exactly zero. Our integers are in [-127, 127] or [-7, 7]. Weights that another program quantised
may also hold -128 or -8.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from .formats import WeightFormat

GROUPS = (128, 64, 32)
# Candidate scales: the largest integer stands for this part of the group's largest value.
CLIP_RATIOS = tuple(1 - step / 40 for step in range(16))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedTensor:
    """An integer weight and its scales, which have the same rank. ``shape`` is the logical shape of the weight."""

    data: jax.Array  # [..., out, in] int8 or int4
    scale: jax.Array  # [..., out, in / group] float32 (one group a row) or float16

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def size(self) -> int:
        return self.data.size

    @property
    def format(self) -> WeightFormat:
        """The format of the elements."""
        return WeightFormat(self.data.dtype.name)

    @property
    def bits(self) -> int:
        """The bits of one element."""
        return self.format.bits

    @property
    def group(self) -> int:
        """The number of inputs that share one scale."""
        return self.data.shape[-1] // self.scale.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes on the device: int4 is packed two to a byte."""
        return self.data.size * self.bits // 8 + self.scale.nbytes

    def __getitem__(self, index: int) -> "QuantizedTensor":
        """One layer of a stacked weight."""
        return QuantizedTensor(self.data[index], self.scale[index])


def group_size(in_features: int, wanted: int) -> int:
    """The largest supported group size up to ``wanted`` that divides a row; the whole row where none does."""
    return next((g for g in GROUPS if g <= wanted and in_features % g == 0), in_features)


def quantize(
    w: jax.Array,
    fmt: WeightFormat | str,
    *,
    group: int | None = None,
    ratios: tuple[float, ...] = CLIP_RATIOS,
) -> QuantizedTensor:
    """Round a weight ``[..., out, in]`` to a quantised format, such as ``"int8"``, with one scale per ``group`` inputs
    (None: per output channel).

    Each scale is the one with the smallest squared error among several. The first maps the largest value of a group to
    the largest integer (absmax); the others clip that value by some per cent. With few bits, a finer step for most
    values is worth the error of the clipped ones. ``ratios`` are the parts that clipping leaves; ``(1.0,)`` is absmax.
    """
    group = group or w.shape[-1]
    fmt = WeightFormat(fmt)
    if not fmt.quantized:
        raise ValueError(f"quantize: expected a quantised format, found {fmt.value}")
    limit = 2 ** (fmt.bits - 1) - 1
    dtype = jnp.float32 if group == w.shape[-1] else jnp.float16
    blocks = w.astype(jnp.float32).reshape(*w.shape[:-1], -1, group)
    peak = jnp.max(jnp.abs(blocks), axis=-1) / limit
    peak = jnp.where(jnp.isfinite(peak), peak, jnp.nan)  # an infinity becomes NaN: no finite scale could stand for it

    def better(best: tuple[jax.Array, jax.Array], ratio: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        scale = _stored(peak * ratio, dtype)
        error = jnp.sum((_rounded(blocks, scale, limit) * scale[..., None] - blocks) ** 2, axis=-1)
        closer = error < best[1]
        return (jnp.where(closer, scale, best[0]), jnp.where(closer, error, best[1])), None

    whole = _stored(peak, dtype)
    (scale, _), _ = lax.scan(better, (whole, jnp.full_like(whole, jnp.inf)), jnp.asarray(ratios, jnp.float32))
    data = _rounded(blocks, scale, limit).astype(jnp.int8).reshape(w.shape)
    return QuantizedTensor(data.astype(fmt.dtype), scale.astype(dtype))


def _stored(scale: jax.Array, dtype: jnp.dtype | type) -> jax.Array:
    """A float32 scale, rounded to its dtype; 1 where it rounds to 0, so that zeros stay zeros."""
    scale = jnp.minimum(scale, float(jnp.finfo(dtype).max)).astype(dtype).astype(jnp.float32)
    return jnp.where(scale == 0, 1, scale)


def _rounded(blocks: jax.Array, scale: jax.Array, limit: int) -> jax.Array:
    return jnp.clip(jnp.round(blocks * (1 / scale)[..., None]), -limit, limit)


def dequantize(w: QuantizedTensor, dtype: jnp.dtype | type = jnp.float32) -> jax.Array:
    """The weight that a `QuantizedTensor` stands for."""
    blocks = w.data.astype(jnp.float32).reshape(*w.scale.shape, -1) * w.scale.astype(jnp.float32)[..., None]
    return blocks.reshape(w.shape).astype(dtype)

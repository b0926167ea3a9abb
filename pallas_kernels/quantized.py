"""Weights of 8 or 4 bits as a type.

The invariant: ``weight[o, i] ~= data[o, i] * scale[o, i // group]`` with ``group = in / scale.shape[-1]``.
One group a row is quantisation per output channel; more is quantisation per group. It is symmetric: integers
lie in [-127, 127] or [-7, 7], there is no zero point, and zero stays exactly zero.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

GROUPS = (128, 64, 32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedTensor:
    """An integer weight and its scales, of the same rank; ``shape`` is the logical shape of the weight."""

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
    def bits(self) -> int:
        return jnp.iinfo(self.data.dtype).bits

    @property
    def group(self) -> int:
        """How many inputs share one scale."""
        return self.data.shape[-1] // self.scale.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes on the device: int4 is packed two to a byte."""
        return self.data.size * self.bits // 8 + self.scale.nbytes

    def __getitem__(self, index: int) -> "QuantizedTensor":
        """One layer of a stacked weight."""
        return QuantizedTensor(self.data[index], self.scale[index])


def group_size(in_features: int, wanted: int) -> int:
    """The largest supported group, no larger than ``wanted``, that divides a row; the whole row where none does."""
    return next(
        (g for g in GROUPS if g <= wanted and in_features % g == 0), in_features
    )


def quantize(w: jax.Array, *, bits: int, group: int | None = None) -> QuantizedTensor:
    """Round a weight ``[..., out, in]`` to ``bits`` with one scale per ``group`` inputs (None: per output channel)."""
    group = group or w.shape[-1]
    limit = 2 ** (bits - 1) - 1
    blocks = w.astype(jnp.float32).reshape(*w.shape[:-1], -1, group)
    scale = jnp.max(jnp.abs(blocks), axis=-1) / limit
    scale = jnp.where(scale == 0, 1, scale).astype(
        jnp.float32 if group == w.shape[-1] else jnp.float16
    )
    q = jnp.round(blocks / scale.astype(jnp.float32)[..., None])
    data = jnp.clip(q, -limit, limit).astype(jnp.int8).reshape(w.shape)
    return QuantizedTensor(data if bits == 8 else data.astype(jnp.int4), scale)


def dequantize(w: QuantizedTensor, dtype: jnp.dtype | type = jnp.float32) -> jax.Array:
    """The weight that a `QuantizedTensor` stands for."""
    blocks = (
        w.data.astype(jnp.float32).reshape(*w.scale.shape, -1)
        * w.scale.astype(jnp.float32)[..., None]
    )
    return blocks.reshape(w.shape).astype(dtype)

"""The number formats that weights are stored in."""

import enum

import jax.numpy as jnp


class WeightFormat(enum.Enum):
    """The format of a weight's elements, named by their dtype. A new format, such as FP8, is one more entry. A number
    of bits would not do: it could not tell FP8 from int8."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    INT8 = "int8"
    INT4 = "int4"

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the elements."""
        return jnp.dtype(self.value)

    @property
    def quantized(self) -> bool:
        """Whether the elements need scales beside them."""
        return self in (WeightFormat.INT8, WeightFormat.INT4)

    @property
    def bits(self) -> int:
        """The bits of one element in the device's memory."""
        return (jnp.iinfo if self.quantized else jnp.finfo)(self.dtype).bits

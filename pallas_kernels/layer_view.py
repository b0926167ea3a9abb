"""One layer of a stacked array, not cut out of it.

XLA copies what it slices off before a product (2.5 times slower on a whole model); a kernel that takes the layer's
number reads it where it lies. So an op's argument may be `Indexed`: `dispatch` cuts it out for a reference, and a
kernel gets it as it is.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from .quantized import QuantizedTensor


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Indexed:
    """``stacked[index]``, with the shape and dtype that this would have."""

    stacked: jax.Array | QuantizedTensor  # [layers, ...]
    index: jax.Array | int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stacked.shape[1:]

    @property
    def dtype(self) -> jnp.dtype:
        """Of the elements."""
        return self.stacked.data.dtype if isinstance(self.stacked, QuantizedTensor) else self.stacked.dtype


def cut_out(tree: Any) -> Any:
    """A tree of arguments with every `Indexed` replaced by what it stands for."""

    def cut(a: Any) -> Any:
        return a.stacked[a.index] if isinstance(a, Indexed) else a

    return jax.tree.map(cut, tree, is_leaf=lambda a: isinstance(a, Indexed))


def in_place(array: jax.Array | Indexed) -> tuple[jax.Array, jax.Array]:
    """What a kernel takes for an array: [layers, ...], and int32 [1], the layer to read."""
    stacked, index = (array.stacked, array.index) if isinstance(array, Indexed) else (array[None], None)
    return stacked, layer_index(index)  # type: ignore[return-value]


def layer_index(layer: jax.Array | int | None) -> jax.Array:
    """The layer to read, as the array that a kernel takes."""
    return jnp.asarray(0 if layer is None else layer, jnp.int32).reshape(1)

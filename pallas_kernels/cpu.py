"""Products as XLA's CPU backend runs them fast: plain `jax.numpy`, no kernel.

XLA hands products of 8-bit integers, and of 16-bit floats, to a fast library from two rows on. One row, or integers
widened to floats, take a path that is 5 to 30 times slower. So

* integer weights multiply x as two int8 digits (limbs): of one row that makes two, and the sums are exact in int32.
  What is lost is x behind its second digit, at most 1 / 64,516 of the row's largest value;
* where every group of inputs has a scale, the limbs are laid out block by block, a row for each group, so that the sum
  of each group comes out by itself;
* 16-bit floats of one row get a second row of zeros;
* float32 of two to 16 rows is summed where rows are long, because a product packs a copy of the weight every time.

`TABLE` says where each of them is faster than the product in floats, which stays the specification.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from .arch import target
from .quantized import QuantizedTensor
from .split_rows import LIMB_INPUTS, LIMB_STEPS, limbs
from .transforms import with_rules

Product = Callable[..., jax.Array]


def by_limbs(x: jax.Array, w: QuantizedTensor) -> jax.Array:
    """x [M, in] with a weight of one scale a row -> float32 [M, out]."""
    digits, scale = limbs(x)
    return _joined(_dot(digits, w.data.astype(jnp.int8), jnp.int32)) * scale * w.scale[:, 0].astype(jnp.float32)[None]


def by_blocks(x: jax.Array, w: QuantizedTensor) -> jax.Array:
    """x [M, in] with a weight of a scale for each group -> float32 [M, out]."""
    digits, scale = limbs(x)
    groups, (rows, inner) = w.scale.shape[-1], digits.shape
    own = jnp.eye(groups, dtype=jnp.int8)[None, :, :, None]  # row g of a block holds the inputs of group g, else zeros
    blocks = (digits.reshape(rows, 1, groups, -1) * own).reshape(rows * groups, inner)
    sums = _dot(blocks, w.data.astype(jnp.int8), jnp.int32).reshape(rows, groups, -1)
    return jnp.sum(_joined(sums) * w.scale.astype(jnp.float32).T[None], axis=1) * scale


def by_two_rows(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [1, in] with a weight of its 16-bit dtype -> float32 [1, out]."""
    return _dot(jnp.pad(x, ((0, 1), (0, 0))), w.astype(x.dtype), jnp.float32)[:1]


def by_sums(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [M, in] with a float32 weight -> float32 [M, out], as sums of products: no copy of the weight is packed."""
    return jnp.sum(x[:, None] * w.astype(x.dtype)[None], axis=-1)


def _joined(sums: jax.Array) -> jax.Array:
    """float32 [M, ...] of the int32 sums [2 * M, ...] of both limbs."""
    first, second = jnp.split(sums.astype(jnp.float32), 2)
    return first + second / LIMB_STEPS


def _dot(x: jax.Array, w: jax.Array, dtype: jnp.dtype | type) -> jax.Array:
    return lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=dtype)


@dataclass(frozen=True)
class Entry:
    """``run`` is the faster product for weights in ``form`` with more than ``above`` elements, ``size`` at most, and
    ``inner`` inputs at least, while it multiplies ``least`` to ``rows`` rows (the two limbs of each group count as rows
    of their own)."""

    form: str
    size: float
    rows: float
    run: Product
    least: int = 1
    inner: int = 0
    above: int = 0


# Measured on two cores with AVX512-VNNI (docs/log-products.md, "CPU"). The first entry of the form and size counts.
TABLE = (
    Entry("int8", math.inf, math.inf, by_limbs),
    Entry("int4", math.inf, math.inf, by_limbs),
    Entry("int8-groups", 2**22, 256, by_blocks),
    Entry("int8-groups", math.inf, 512, by_blocks),
    Entry("int4-groups", 2**22, 0, by_blocks),  # never: unpacking takes longer than the whole product
    Entry("int4-groups", math.inf, 512, by_blocks),
    Entry("bfloat16", math.inf, 1, by_two_rows, above=2**18),  # a call of the library costs more than a small product
    Entry("float32", math.inf, 16, by_sums, least=2, inner=1024),
    Entry("float32", math.inf, 2, by_sums, least=2),
)


def form_of(x_dtype: jnp.dtype, w: jax.Array | QuantizedTensor) -> str:
    """How `TABLE` calls a product."""
    if isinstance(w, QuantizedTensor):
        return w.format.value + ("-groups" if w.scale.shape[-1] > 1 else "")
    return jnp.dtype(x_dtype).name


def choose(x: jax.Array, w: jax.Array | QuantizedTensor) -> Product | None:
    """The entry of `TABLE` for x [..., in] and w [out, in]; None: the product in floats."""
    form, rows = form_of(x.dtype, w), math.prod(x.shape[:-1])
    multiplied = 2 * rows * w.scale.shape[-1] if isinstance(w, QuantizedTensor) else rows
    fits = (e for e in TABLE if e.form == form and e.above < w.size <= e.size and e.inner <= w.shape[-1] <= LIMB_INPUTS)
    entry = next(fits, None)
    if entry is None or not entry.least <= multiplied <= entry.rows:
        return None
    return entry.run


def product(in_floats: Product, x: jax.Array, w: jax.Array | QuantizedTensor) -> jax.Array:
    """``in_floats(x, w)``, x [..., in] and w [out, in] -> float32 [..., out], by `TABLE` where it is traced for a CPU.
    Derivatives and batches are those of ``in_floats``."""
    where = target(jax.tree.leaves((x, w)))
    run = choose(x, w) if where.certain and where.arch.name == "cpu" else None
    if run is None:
        return in_floats(x, w)

    def fast(x: jax.Array, w: jax.Array | QuantizedTensor) -> jax.Array:
        return run(x.reshape(-1, x.shape[-1]), w).reshape(*x.shape[:-1], -1)

    return with_rules(fast, in_floats, where, (x, w), {}, replaced=lambda why: None)

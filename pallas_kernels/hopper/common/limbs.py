"""Activations as int8 limbs, so that wgmma can multiply them with integer weights in integers.

A block of numbers is written as a power of two times fixed-point numbers of two or three limbs: digits to the base 256,
each an int8. The limbs of a number are columns of wgmma's right operand. That has at least 8 columns, so the limbs of
a single token cost nothing. `split_into_limbs` is the definition, in `jax.numpy`, and serves the interpreter. The other
functions emit MLIR for one thread and are for use inside `plgpu.inline_mgpu`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu.fragmented_array import WGMMA_LAYOUT_8BIT, FragmentedArray
from jax.experimental.mosaic.gpu.utils import ReductionKind, bitcast, c, prmt, redux
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, math, vector

from .thread_ops import add, aligned_store, as_i32, as_indices, div, mul, rem, sub

# A 4-bit weight becomes the upper half of a byte: 16 times the weight, with the sign bit in its place.
INT4_FACTOR = 16
# The largest fixed-point number of so many limbs. Two limbs: all that they hold, less what the lower one can add.
# Three: the power of two that a float32 still holds exactly beside the 1.5 * 2**23 that rounds it to an integer.
MAX_FIXED_POINT = {2: 127 * 256, 3: 2**21}
# Least biased exponent of a block's largest number: below it the inverse scale would be infinite, and 0 * inf is NaN.
MIN_EXPONENT = 24
INT4_WORDS = plgpu.Layout.TILED(  # 4-bit integers [64 * m, 32 * n], in wgmma's rows: a word of 8 in a thread
    plgpu.Tiling(((64, 32), (16, 32), (8, 32), (8,))), warp_dims=(-7,), lane_dims=(-3, -2), vector_dim=-1
)


def lowest_limb_value(limbs: int, bits: int) -> float:
    """What the lowest of so many limbs is worth, relative to its block's scale. Each limb before is worth 256 times the
    next. For 4-bit weights it makes up for the `INT4_FACTOR` of `load_int4_as_int8`."""
    return 1 / MAX_FIXED_POINT[limbs] / (INT4_FACTOR if bits == 4 else 1)


def split_into_limbs(x: jax.Array, limbs: int = 2) -> tuple[list[jax.Array], jax.Array]:
    """Numbers [blocks, n] as int8 limbs, the highest first, and the scale of each block, a power of two.

    The resolution is the largest number of the block divided by 32,512 with two limbs: 7 bits finer than the largest
    as a bfloat16. With three limbs it is divided by 2,097,152: that holds every bit of a bfloat16 that is at least an
    8,192nd of the largest."""
    x = x.astype(jnp.float32)
    exponent = jnp.maximum(jax.lax.bitcast_convert_type(jnp.abs(x).max(axis=1), jnp.int32) >> 23, MIN_EXPONENT)
    scale, inverse = (
        jax.lax.bitcast_convert_type(e << 23, jnp.float32)
        for e in (jnp.minimum(exponent + 1, 255), jnp.maximum(253 - exponent, 0))
    )
    whole = jnp.round(x * inverse[:, None] * MAX_FIXED_POINT[limbs]).astype(jnp.int32) + limb_bias(limbs)
    lower = [((whole >> 8 * i) & 255) - 128 for i in reversed(range(limbs - 1))]
    return [d.astype(jnp.int8) for d in (whole >> 8 * (limbs - 1), *lower)], scale


def limb_bias(limbs: int) -> int:
    """128 in every limb but the highest. With it added, the bytes of those limbs are unsigned."""
    return sum(128 * 256**i for i in range(limbs - 1))


def max_abs_bits(numbers: Sequence[Any]) -> Any:
    """The largest magnitude of a thread's float32 numbers, as their bits: an integer in the same order."""
    i32 = ir.IntegerType.get_signless(32)
    sizes = [arith.andi(arith.bitcast(i32, a), as_i32(0x7FFFFFFF)) for a in numbers]
    while len(sizes) > 1:
        sizes = [arith.maxui(a, b) for a, b in zip(sizes[::2], sizes[1::2], strict=True)]
    return sizes[0]


def warp_max(size: Any) -> Any:
    """The maximum over a warp."""
    return redux(size, as_i32(-1), ReductionKind.UMAX)


def scale_and_inverse(size: Any) -> tuple[Any, Any]:
    """The scale of a block whose `max_abs_bits` is ``size``, and the inverse by which its numbers are multiplied."""
    f32, exponent = ir.F32Type.get(), arith.maxui(arith.shrui(size, as_i32(23)), as_i32(MIN_EXPONENT))
    scale = arith.minui(add(exponent, 1), as_i32(255))
    # With an infinity or NaN in the block the inverse is 0 and the scale infinite: the product is not finite either.
    inverse = arith.maxsi(sub(as_i32(253), exponent), as_i32(0))
    scale, inverse = (arith.bitcast(f32, arith.shli(a, as_i32(23))) for a in (scale, inverse))
    return scale, inverse


def to_floats(eight: Any) -> list[Any]:
    """The numbers of a vector as float32."""
    f32 = ir.F32Type.get()
    numbers = [vector.extract(eight, [], [i]) for i in range(ir.VectorType(eight.type).shape[0])]
    return [a if a.type == f32 else arith.extf(f32, a) for a in numbers]


def to_fixed_point(numbers: Sequence[Any], inverse: Any, limbs: int) -> list[Any]:
    """Numbers as fixed-point integers of so many limbs, with `limb_bias` added."""
    f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
    factor = arith.mulf(inverse, c(float(MAX_FIXED_POINT[limbs]), f32))
    # Adding 1.5 * 2**23 rounds a small number to an integer, which is then the low bits of the mantissa.
    magic = c(1.5 * 2**23 + limb_bias(limbs), f32)
    return [arith.bitcast(i32, math.fma(a, factor, magic)) for a in numbers]


def write_limbs(fixed: Sequence[Any], limbs: int, bits: int, at: Any, write: Callable[[int, Any, Any], None]) -> None:
    """Call ``write(limb, at, bytes)`` for every limb of 8 neighbouring inputs from ``at`` on. The inputs get the order
    that weights of so many bits have."""
    if bits == 8:
        for number, both in enumerate(zip(_words(fixed[:4], limbs), _words(fixed[4:], limbs), strict=True)):
            write(number, at, _bytes(*both))
        return
    # The order of `load_int4_as_int8`: of 32 inputs first the even ones, 4 to a thread, then the odd ones.
    own = add(sub(at, rem(at, 32)), mul(rem(div(at, 8), 4), 4))
    for here, words in ((own, _words(fixed[::2], limbs)), (add(own, 16), _words(fixed[1::2], limbs))):
        for number, word in enumerate(words):
            write(number, here, _bytes(word))


def swizzled_store(
    value: Any, ref: Any, transforms: tuple[Any, ...], granule: int, slab: Any, row: Any, at: Any
) -> None:
    """Write a vector at [slab, row, at] of a reference with these transforms (at [row, at] if ``slab`` is None). Their
    swizzle permutes granules of 16 bytes, which are ``granule`` numbers, within a row of a tile."""
    width = transforms[0].tiling[-1]  # inputs of a swizzled tile
    tile, inside = div(row, 8), rem(row, 8)
    moved = arith.xori(div(rem(at, width), granule), div(inside, 8 * granule // width))
    place_in_row = add(mul(moved, granule), rem(at, granule))
    lead = [] if slab is None else [slab]
    aligned_store(value, ref, as_indices(*lead, tile, div(at, width), inside, place_in_row))


def _words(four: Sequence[Any], limbs: int) -> list[Any]:
    """The limbs of 4 numbers: for each limb a word with the bytes of all four."""
    (a, b, c, d), sign = four, as_i32(0x80808080 - 2**32)
    low, high = prmt(a, b, as_i32(0x5140)), prmt(c, d, as_i32(0x5140))  # lowest bytes of both, then the next
    second, last = prmt(low, high, as_i32(0x7632)), arith.xori(prmt(low, high, as_i32(0x5410)), sign)
    if limbs == 2:
        return [second, last]
    top = prmt(prmt(a, b, as_i32(0x7362)), prmt(c, d, as_i32(0x7362)), as_i32(0x5410))
    # In the byte of the highest limb of three, 1.5 * 2**23 adds 64 (0x40).
    first = sub(arith.ori(top, sign), 0x40404040)
    return [arith.xori(first, sign), arith.xori(second, sign), last]


def _bytes(*words: Any) -> Any:
    """Words as a vector of bytes."""
    i8 = ir.IntegerType.get_signless(8)
    whole = vector.from_elements(ir.VectorType.get((len(words),), words[0].type), words)
    return vector.bitcast(ir.VectorType.get((4 * len(words),), i8), whole)


def load_int4_as_int8(tile: Any, ranges: int) -> list[jax.Array]:
    """A tile of 4-bit weights from shared memory as wgmma's int8 left operand in registers, times `INT4_FACTOR`; an
    array for each of so many ranges of its inputs.

    The upper half of a byte has the right sign without further work. Threads keep what a wide load gave them, so the
    inputs come in another order, which `write_limbs` gives the activations, too."""
    rows, inputs = tile.shape
    operand = plgpu.ShapeDtypeStruct((rows, inputs // ranges), jnp.int8, layout=plgpu.Layout.WGMMA_8BIT)

    @plgpu.inline_mgpu(arg_types=(INT4_WORDS,), return_type=[operand] * ranges)
    def convert(_: Any, integers: Any) -> list[Any]:
        i32, four = ir.IntegerType.get_signless(32), ir.VectorType.get((4,), ir.IntegerType.get_signless(8))
        one, mask = ir.VectorType.get((1,), i32), as_i32(0xF0F0F0F0 - 2**32)
        registers = np.empty(WGMMA_LAYOUT_8BIT.registers_shape(integers.shape), dtype=object)
        for index, eight in np.ndenumerate(integers.registers):
            word = bitcast(eight, i32)
            for half, moved in enumerate((arith.shli(word, as_i32(4)), word)):
                weights = vector.bitcast(four, vector.broadcast(one, arith.andi(moved, mask)))
                registers[index[0], 2 * index[1] + half, *index[2:]] = weights
        return [
            FragmentedArray(_registers=some, _layout=WGMMA_LAYOUT_8BIT, _is_signed=True)
            for some in np.split(registers, ranges, axis=1)
        ]

    return convert(plgpu.load(tile, layout=INT4_WORDS))  # type: ignore[call-arg]

"""Numbers as whole numbers of a few digits, each a byte with a sign: so that wgmma multiplies integers.

A block of numbers is a power of two times whole numbers of two or three digits to the base of 256. The digits are
columns of wgmma's right operand, which has 8 of them or a multiple, so that those of a single token cost nothing.
Each function says what it means in `jax.numpy` terms for the interpreter, or in Mosaic's terms for a GPU.
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

# 4 bits are made a byte as its upper half: 16 times the weight, the sign where it belongs.
INT4_FACTOR = 16
# The largest number of so many digits: of two, all that they hold, less what the lower one can add; of three, what a
# float32 holds beside the 1.5 * 2**23 that make it whole, as a power of two.
MAX_FIXED_POINT = {2: 127 * 256, 3: 2**21}
# Least biased exponent of a block's largest number: below it the inverse scale would be infinite, and 0 * inf is NaN.
MIN_EXPONENT = 24
INT4_WORDS = plgpu.Layout.TILED(  # 4-bit integers [64 * m, 32 * n] in rows as wgmma takes them: a word of 8 to a thread
    plgpu.Tiling(((64, 32), (16, 32), (8, 32), (8,))), warp_dims=(-7,), lane_dims=(-3, -2), vector_dim=-1
)


def lowest_limb_value(digits: int, bits: int) -> float:
    """What the last of so many digits is worth, as a share of its block's scale and, against weights of so many bits,
    of what `load_int4_as_int8` makes of these; every digit before is worth 256 times the next."""
    return 1 / MAX_FIXED_POINT[digits] / (INT4_FACTOR if bits == 4 else 1)


def split_into_limbs(x: jax.Array, digits: int = 2) -> tuple[list[jax.Array], jax.Array]:
    """Numbers [blocks, n] as sums of digits, bytes with a sign, times a power of two of the block: of two digits to a
    32,512th of its largest, which is finer than a bfloat16 of the largest by 7 bits; of three to a 2,097,152nd, which
    holds every bit of a bfloat16 that is no smaller than an 8,192nd of the largest."""
    x = x.astype(jnp.float32)
    exponent = jnp.maximum(jax.lax.bitcast_convert_type(jnp.abs(x).max(axis=1), jnp.int32) >> 23, MIN_EXPONENT)
    scale, inverse = (
        jax.lax.bitcast_convert_type(e << 23, jnp.float32)
        for e in (jnp.minimum(exponent + 1, 255), jnp.maximum(253 - exponent, 0))
    )
    whole = jnp.round(x * inverse[:, None] * MAX_FIXED_POINT[digits]).astype(jnp.int32) + limb_bias(digits)
    lower = [((whole >> 8 * i) & 255) - 128 for i in reversed(range(digits - 1))]
    return [d.astype(jnp.int8) for d in (whole >> 8 * (digits - 1), *lower)], scale


def limb_bias(digits: int) -> int:
    """128 of every digit but the first: added, it makes their bytes those of numbers that are not negative."""
    return sum(128 * 256**i for i in range(digits - 1))


def max_abs_bits(numbers: Sequence[Any]) -> Any:
    """The bits of a thread's float32 numbers' largest size, as an integer that grows with it."""
    i32 = ir.IntegerType.get_signless(32)
    sizes = [arith.andi(arith.bitcast(i32, a), as_i32(0x7FFFFFFF)) for a in numbers]
    while len(sizes) > 1:
        sizes = [arith.maxui(a, b) for a, b in zip(sizes[::2], sizes[1::2], strict=True)]
    return sizes[0]


def warp_max(size: Any) -> Any:
    """The largest of a warp's."""
    return redux(size, as_i32(-1), ReductionKind.UMAX)


def scale_and_inverse(size: Any) -> tuple[Any, Any]:
    """A block's scale, and what its numbers are multiplied by."""
    f32, exponent = ir.F32Type.get(), arith.maxui(arith.shrui(size, as_i32(23)), as_i32(MIN_EXPONENT))
    scale = arith.minui(add(exponent, 1), as_i32(255))
    inverse = arith.maxsi(sub(as_i32(253), exponent), as_i32(0))  # what is no number makes the scale none, x zero
    scale, inverse = (arith.bitcast(f32, arith.shli(a, as_i32(23))) for a in (scale, inverse))
    return scale, inverse


def to_floats(eight: Any) -> list[Any]:
    """A vector's numbers as float32."""
    f32 = ir.F32Type.get()
    numbers = [vector.extract(eight, [], [i]) for i in range(ir.VectorType(eight.type).shape[0])]
    return [a if a.type == f32 else arith.extf(f32, a) for a in numbers]


def to_fixed_point(numbers: Sequence[Any], inverse: Any, digits: int) -> list[Any]:
    """Whole numbers whose lowest bytes are the digits, with `limb_bias` added."""
    f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
    factor = arith.mulf(inverse, c(float(MAX_FIXED_POINT[digits]), f32))
    # Added to a small number, leaves it whole in the last bits.
    magic = c(1.5 * 2**23 + limb_bias(digits), f32)
    return [arith.bitcast(i32, math.fma(a, factor, magic)) for a in numbers]


def write_limbs(whole: Sequence[Any], digits: int, bits: int, at: Any, write: Callable[[int, Any, Any], None]) -> None:
    """Call ``write(number, at, bytes)`` for every digit of 8 neighbours from ``at`` on, in the order of inputs that
    weights of so many bits have."""
    if bits == 8:
        for number, both in enumerate(zip(_words(whole[:4], digits), _words(whole[4:], digits), strict=True)):
            write(number, at, _bytes(*both))
        return
    # As `load_int4_as_int8` brings the weights: of 32 inputs the even ones, 4 to a thread, then the odd ones.
    own = add(sub(at, rem(at, 32)), mul(rem(div(at, 8), 4), 4))
    for here, words in ((own, _words(whole[::2], digits)), (add(own, 16), _words(whole[1::2], digits))):
        for number, word in enumerate(words):
            write(number, here, _bytes(word))


def swizzled_store(
    value: Any, ref: Any, transforms: tuple[Any, ...], granule: int, slab: Any, row: Any, at: Any
) -> None:
    """Write a vector at [slab, row, at] of a reference with these transforms, whose swizzle moves ``granule`` numbers
    together, those of 16 bytes, about within a row of a tile."""
    width = transforms[0].tiling[-1]  # inputs of a swizzled tile
    tile, inside = div(row, 8), rem(row, 8)
    moved = arith.xori(div(rem(at, width), granule), div(inside, 8 * granule // width))
    place_in_row = add(mul(moved, granule), rem(at, granule))
    aligned_store(value, ref, as_indices(slab, tile, div(at, width), inside, place_in_row))


def _words(four: Sequence[Any], digits: int) -> list[Any]:
    """The digits of 4 numbers, each as a word."""
    (a, b, c, d), sign = four, as_i32(0x80808080 - 2**32)
    low, high = prmt(a, b, as_i32(0x5140)), prmt(c, d, as_i32(0x5140))  # lowest bytes of both, then the next
    second, last = prmt(low, high, as_i32(0x7632)), arith.xori(prmt(low, high, as_i32(0x5410)), sign)
    if digits == 2:
        return [second, last]
    top = prmt(prmt(a, b, as_i32(0x7362)), prmt(c, d, as_i32(0x7362)), as_i32(0x5410))
    # The first byte of three stands beside the 64 that 1.5 * 2**23 has there.
    first = sub(arith.ori(top, sign), 0x40404040)
    return [arith.xori(first, sign), arith.xori(second, sign), last]


def _bytes(*words: Any) -> Any:
    """Words as bytes one behind the other."""
    i8 = ir.IntegerType.get_signless(8)
    whole = vector.from_elements(ir.VectorType.get((len(words),), words[0].type), words)
    return vector.bitcast(ir.VectorType.get((4 * len(words),), i8), whole)


def load_int4_as_int8(tile: Any) -> jax.Array:
    """A tile of 4-bit weights in shared memory as wgmma's left operand in registers: bytes of `INT4_FACTOR` times the
    weight, which is where the sign is right without more ado. Threads keep what a wide load gave them: see
    `write_limbs` for the order of the inputs."""
    operand = plgpu.ShapeDtypeStruct(tile.shape, jnp.int8, layout=plgpu.Layout.WGMMA_8BIT)

    @plgpu.inline_mgpu(arg_types=(INT4_WORDS,), return_type=operand)
    def convert(_: Any, integers: Any) -> Any:
        i32, four = ir.IntegerType.get_signless(32), ir.VectorType.get((4,), ir.IntegerType.get_signless(8))
        one, mask = ir.VectorType.get((1,), i32), as_i32(0xF0F0F0F0 - 2**32)
        registers = np.empty(WGMMA_LAYOUT_8BIT.registers_shape(integers.shape), dtype=object)
        for index, eight in np.ndenumerate(integers.registers):
            word = bitcast(eight, i32)
            for half, moved in enumerate((arith.shli(word, as_i32(4)), word)):
                weights = vector.bitcast(four, vector.broadcast(one, arith.andi(moved, mask)))
                registers[index[0], 2 * index[1] + half, *index[2:]] = weights
        return FragmentedArray(_registers=registers, _layout=WGMMA_LAYOUT_8BIT, _is_signed=True)

    return convert(plgpu.load(tile, layout=INT4_WORDS))  # type: ignore[call-arg]

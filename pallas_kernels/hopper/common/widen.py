"""Integer weights as wgmma's left operand: loaded from shared memory into registers and widened to floats there."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu.fragmented_array import WGMMA_LAYOUT, FragmentedArray
from jax.experimental.mosaic.gpu.utils import (
    bitcast,
    c,
    dtype_to_ir_type,
    inline_ptx,
    prmt,
    shfl_bfly,
    vector_slice,
)
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, math, vector

from .thread_ops import as_i32, opaque_constant, rem, thread_in_warpgroup
from .tiles import Format


def load_integers(tile: Any, fmt: Format) -> jax.Array:
    """A tile of integers from shared memory, packed, in the layout of wide loads: neighbours in one thread."""
    return plgpu.load(tile, layout=plgpu.Layout.WGMMA_UPCAST_4X if fmt.bits == 4 else plgpu.Layout.WGMMA_UPCAST_2X)


def widen(integers: jax.Array, dtype: Any) -> jax.Array:
    """What `load_integers` gave, as wgmma's left operand. Threads exchange the values while these are still narrow.

    Call it where the floats are used. Integers carried through a loop in wgmma's layout would be unpacked to two a
    register, and then widening takes five times as long."""
    if integers.dtype == jnp.int8 and dtype == jnp.bfloat16:
        return _widen_bytes(integers)
    return plgpu.layout_cast(integers, plgpu.Layout.WGMMA).astype(dtype)


def _widen_bytes(integers: jax.Array) -> jax.Array:
    """`widen` from int8 to bfloat16, in half the instructions of Mosaic's own.

    The bits of an integer but the sign become the lowest of a bfloat16's mantissa, under an exponent that makes their
    unit 1: the number 128 more. The sign bit lies where it doubles that 128 to 256, which is then subtracted."""
    operand = plgpu.ShapeDtypeStruct(integers.shape, jnp.bfloat16, layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA_UPCAST_2X,), return_type=operand)
    def convert(_: Any, integers: Any) -> Any:
        i32, pair = ir.IntegerType.get_signless(32), ir.VectorType.get((2,), ir.BF16Type.get())
        odd = arith.cmpi(arith.CmpIPredicate.ne, rem(thread_in_warpgroup(), 2), as_i32(0))
        # Of 16 inputs, an even thread has four and the thread after it those 8 further on. The even one gets the first
        # two of both, the odd one the last two. Bytes 0 and 2 of a word matter, the others are masked out.
        choices = (0x7766, 0x1100), (0x3322, 0x5544)
        choices = [arith.select(odd, as_i32(of_odd), as_i32(of_even)) for of_odd, of_even in choices]
        magic = opaque_constant(0x43004300)  # 128 twice
        registers = np.empty(WGMMA_LAYOUT.registers_shape(integers.shape), dtype=object)
        for index, four in np.ndenumerate(integers.registers):
            own = bitcast(four, i32)
            others = shfl_bfly(own, 1)
            for i, choice in enumerate(choices):
                two = prmt(own, others, choice)
                value, sign = (arith.ori(arith.andi(two, as_i32(mask)), magic) for mask in (0x007F007F, 0x00800080))
                floats = inline_ptx("sub.bf16x2 $0, $1, $2;", value, sign, result_types=i32)
                registers[index[0], 2 * index[1] + i, *index[2:-1]] = bitcast(floats, pair)
        return FragmentedArray(_registers=registers, _layout=WGMMA_LAYOUT, _is_signed=None)

    return convert(integers)  # type: ignore[call-arg]


def load_shuffled(tile: Any) -> jax.Array:
    """A tile of integers from shared memory for `widen_shuffled`: each of 4 threads holds 8 neighbours of 32 inputs."""
    return plgpu.load(tile, layout=plgpu.Layout.WGMMA_UPCAST_4X)


def widen_shuffled(integers: jax.Array, dtype: Any) -> jax.Array:
    """What `load_shuffled` gave, as wgmma's left operand, without an exchange between threads.

    Every 32 inputs come out in another order. `shuffle_inputs` gives the activations the same order, so the sums are
    right."""

    def reinterpret(_: Any, integers: Any) -> Any:
        floats = integers.astype(dtype_to_ir_type(jnp.dtype(dtype)))
        registers = np.empty(WGMMA_LAYOUT.registers_shape(floats.shape), dtype=object)
        for index, eight in np.ndenumerate(floats.registers):
            for pair in range(4):  # wgmma expects pairs of inputs 8 apart; it gets pairs 2 apart
                place = (index[0], 4 * index[1] + pair, *index[2:])
                registers[place] = vector_slice(eight, slice(2 * pair, 2 * pair + 2))
        return FragmentedArray(_registers=registers, _layout=WGMMA_LAYOUT, _is_signed=None)

    floats = plgpu.ShapeDtypeStruct(integers.shape, dtype, layout=plgpu.Layout.WGMMA)
    arguments = (plgpu.Layout.WGMMA_UPCAST_4X,)
    return plgpu.inline_mgpu(arg_types=arguments, return_type=floats)(reinterpret)(integers)


def shuffle_inputs(x: jax.Array) -> jax.Array:
    """Activations [rows, in] in the order of inputs that `widen_shuffled` gives the weights."""
    return x.reshape(x.shape[0], -1, 4, 4, 2).swapaxes(2, 3).reshape(x.shape)


BIT_OFFSETS = (8, 12, 16)  # where a 4-bit integer may lie in the word from which `_float_of` makes a float
# For each of the eight integers of a word: by how many bits to shift the word right, and where the integer then lies.
SHIFTS = [(by, at) for by, offsets in ((-8, BIT_OFFSETS[:2]), (0, BIT_OFFSETS), (12, BIT_OFFSETS)) for at in offsets]


def widen_scaled(integers: jax.Array, scale: jax.Array, dtype: Any) -> jax.Array:
    """4-bit integers that `load_integers` gave, times a scale [rows], rounded to ``dtype``, as wgmma's left operand.

    It gives what `widen`, a product and a rounding give, in fewer instructions. The scale must have at most 11
    significant bits, as a float16 has: then everything before the one rounding is exact."""
    operand = plgpu.ShapeDtypeStruct(integers.shape, dtype, layout=plgpu.Layout.WGMMA)
    arguments = plgpu.Layout.WGMMA_UPCAST_4X, plgpu.Layout.WGMMA.reduce(1)

    @plgpu.inline_mgpu(arg_types=arguments, return_type=operand)
    def convert(_: Any, integers: Any, scale: Any) -> Any:
        rounded = ir.VectorType.get((2,), dtype_to_ir_type(jnp.dtype(dtype)))
        pair = ir.VectorType.get((2,), ir.F32Type.get())
        scales = [vector.extract(s, [], [0]) for s in scale.registers.flat]  # of rows r and r + 8 of every 64
        # What `_float_of` adds, times the scale. It has at most 13 bits, so the product is exact.
        excess = [{at: arith.mulf(s, c(-float(2 ** (23 - at) + 8), s.type)) for at in BIT_OFFSETS} for s in scales]
        magic = {at: opaque_constant((127 + 23 - at) << 23 | 8 << at) for at in BIT_OFFSETS}
        registers = np.empty(WGMMA_LAYOUT.registers_shape(integers.shape), dtype=object)
        for index, eight in np.ndenumerate(integers.registers):
            row = 2 * index[0] + index[4]
            word = _transpose_bytes(bitcast(eight, ir.IntegerType.get_signless(32)))
            numbers = [math.fma(_float_of(word, by, at, magic[at]), scales[row], excess[row][at]) for by, at in SHIFTS]
            for i in range(4):
                two = vector.from_elements(pair, numbers[2 * i : 2 * i + 2])
                registers[index[0], 4 * index[1] + i, *index[2:]] = arith.truncf(rounded, two)
        return FragmentedArray(_registers=registers, _layout=WGMMA_LAYOUT, _is_signed=None)

    return convert(integers, scale)  # type: ignore[call-arg]


def _transpose_bytes(word: Any) -> Any:
    """Four threads transpose the bytes of their words. Before, a thread has eight neighbours of 32 inputs; after, two
    of every eight, as wgmma expects. The halves of the words are exchanged first, then the bytes."""
    thread = rem(thread_in_warpgroup(), 4)

    def swap(word: Any, distance: int, low: int, high: int) -> Any:
        upper = arith.cmpi(arith.CmpIPredicate.ne, arith.andi(thread, as_i32(distance)), as_i32(0))
        return prmt(word, shfl_bfly(word, distance), arith.select(upper, as_i32(high), as_i32(low)))

    return swap(swap(word, 2, 0x5410, 0x3276), 1, 0x6240, 0x3715)


def _float_of(word: Any, by: int, at: int, magic: Any) -> Any:
    """The 4-bit integer at bit ``at`` of a word shifted ``by`` bits to the right, as a float32: the integer plus
    2 ** (23 - at) + 8.

    The bits become the lowest of a mantissa, under an exponent that makes their unit 1. ``magic`` holds that exponent,
    and the sign bit of the integer, which it inverts: that adds 8 and makes the integer unsigned."""
    moved = arith.shrui(word, as_i32(by)) if by > 0 else arith.shli(word, as_i32(-by)) if by else word
    return arith.bitcast(ir.F32Type.get(), arith.xori(arith.andi(moved, as_i32(15 << at)), magic))

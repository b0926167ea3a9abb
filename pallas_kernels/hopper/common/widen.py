"""Integer weights as wgmma's left operand: from shared memory into a thread's registers, there made floats."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu.fragmented_array import WGMMA_LAYOUT, FragmentedArray
from jax.experimental.mosaic.gpu.utils import bitcast, c, dtype_to_ir_type, prmt, shfl_bfly, vector_slice
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, math, vector

from .thread_ops import as_i32, opaque_constant, rem, thread_in_warpgroup
from .tiles import Format


def load_integers(tile: Any, fmt: Format) -> jax.Array:
    """A tile of integers from shared memory, still as a thread's wide loads bring them: packed, neighbours together."""
    return plgpu.load(tile, layout=plgpu.Layout.WGMMA_UPCAST_4X if fmt.bits == 4 else plgpu.Layout.WGMMA_UPCAST_2X)


def widen(integers: jax.Array, dtype: Any) -> jax.Array:
    """What `load_integers` gave, as wgmma's left operand. Threads exchange values while they are still narrow.

    Both steps must stay together: integers on their way through a loop in wgmma's layout would be unpacked, two to a
    register, and widening them took five times as long."""
    return plgpu.layout_cast(integers, plgpu.Layout.WGMMA).astype(dtype)


def load_shuffled(tile: Any) -> jax.Array:
    """A tile of integers from shared memory for `widen_shuffled`: of 32 inputs, each of 4 threads holds 8 in a row."""
    return plgpu.load(tile, layout=plgpu.Layout.WGMMA_UPCAST_4X)


def widen_shuffled(integers: jax.Array, dtype: Any) -> jax.Array:
    """What `load_shuffled` gave, as wgmma's left operand, without an exchange between threads: every 32 inputs come out
    in the order that `shuffle_inputs` gives the activations. A sum does not mind the order of its terms."""

    def reinterpret(_: Any, integers: Any) -> Any:
        floats = integers.astype(dtype_to_ir_type(jnp.dtype(dtype)))
        registers = np.empty(WGMMA_LAYOUT.registers_shape(floats.shape), dtype=object)
        for index, eight in np.ndenumerate(floats.registers):
            for pair in range(4):  # wgmma wants 2 inputs in a row, 8 apart: it gets 2 in a row, 2 apart
                place = (index[0], 4 * index[1] + pair, *index[2:])
                registers[place] = vector_slice(eight, slice(2 * pair, 2 * pair + 2))
        return FragmentedArray(_registers=registers, _layout=WGMMA_LAYOUT, _is_signed=None)

    floats = plgpu.ShapeDtypeStruct(integers.shape, dtype, layout=plgpu.Layout.WGMMA)
    arguments = (plgpu.Layout.WGMMA_UPCAST_4X,)
    return plgpu.inline_mgpu(arg_types=arguments, return_type=floats)(reinterpret)(integers)


def shuffle_inputs(x: jax.Array) -> jax.Array:
    """Activations [rows, in] in the order of inputs that `widen_shuffled` gives the weights."""
    return x.reshape(x.shape[0], -1, 4, 4, 2).swapaxes(2, 3).reshape(x.shape)


PLACES = (8, 12, 16)  # where an integer of 4 bits may lie in the word that `_float_of` makes a float of
# Of the eight of a word, in their order: how far it is moved to the right, and where the integer then lies.
EIGHT = [(by, at) for by, places in ((-8, PLACES[:2]), (0, PLACES), (12, PLACES)) for at in places]


def widen_scaled(integers: jax.Array, scale: jax.Array, dtype: Any) -> jax.Array:
    """4-bit integers that `load_integers` gave, times a scale [rows] of at most 11 bits, as a float16 has, rounded to
    ``dtype`` once, as wgmma's left operand: what `widen`, a product and a rounding give, in fewer instructions."""
    operand = plgpu.ShapeDtypeStruct(integers.shape, dtype, layout=plgpu.Layout.WGMMA)
    arguments = plgpu.Layout.WGMMA_UPCAST_4X, plgpu.Layout.WGMMA.reduce(1)

    @plgpu.inline_mgpu(arg_types=arguments, return_type=operand)
    def convert(_: Any, integers: Any, scale: Any) -> Any:
        rounded = ir.VectorType.get((2,), dtype_to_ir_type(jnp.dtype(dtype)))
        pair = ir.VectorType.get((2,), ir.F32Type.get())
        scales = [vector.extract(s, [], [0]) for s in scale.registers.flat]  # of rows r and r + 8, of every 64
        # What `_float_of` adds, at most 13 bits, times the scale: exact.
        excess = [{at: arith.mulf(s, c(-float(2 ** (23 - at) + 8), s.type)) for at in PLACES} for s in scales]
        magic = {at: opaque_constant((127 + 23 - at) << 23 | 8 << at) for at in PLACES}
        registers = np.empty(WGMMA_LAYOUT.registers_shape(integers.shape), dtype=object)
        for index, eight in np.ndenumerate(integers.registers):
            row = 2 * index[0] + index[4]
            word = _traded(bitcast(eight, ir.IntegerType.get_signless(32)))
            numbers = [math.fma(_float_of(word, by, at, magic[at]), scales[row], excess[row][at]) for by, at in EIGHT]
            for i in range(4):
                two = vector.from_elements(pair, numbers[2 * i : 2 * i + 2])
                registers[index[0], 4 * index[1] + i, *index[2:]] = arith.truncf(rounded, two)
        return FragmentedArray(_registers=registers, _layout=WGMMA_LAYOUT, _is_signed=None)

    return convert(integers, scale)  # type: ignore[call-arg]


def _traded(word: Any) -> Any:
    """Of 32 neighbours a thread of four has eight in a row; it gets two of every eight, as wgmma wants them: the four
    transpose their bytes, halves of words first."""
    thread = rem(thread_in_warpgroup(), 4)

    def swap(word: Any, distance: int, low: int, high: int) -> Any:
        upper = arith.cmpi(arith.CmpIPredicate.ne, arith.andi(thread, as_i32(distance)), as_i32(0))
        return prmt(word, shfl_bfly(word, distance), arith.select(upper, as_i32(high), as_i32(low)))

    return swap(swap(word, 2, 0x5410, 0x3276), 1, 0x6240, 0x3715)


def _float_of(word: Any, by: int, at: int, magic: Any) -> Any:
    """The 4 bits at ``at`` of a word moved ``by`` bits to the right, put below the exponent of a float32 whose unit
    they then are: the signed integer and 2 ** (23 - at) + 8. ``magic``: that exponent, and the bit of the sign, which,
    turned about, makes the integer 8 more."""
    moved = arith.shrui(word, as_i32(by)) if by > 0 else arith.shli(word, as_i32(-by)) if by else word
    return arith.bitcast(ir.F32Type.get(), arith.xori(arith.andi(moved, as_i32(15 << at)), magic))

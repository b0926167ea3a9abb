"""Where a decode step must say which thread does what: reads and writes of shared memory that Pallas has no words for.

Each function says what it means in `jax.numpy` terms for the interpreter, and in Mosaic's terms for a GPU.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.fragmented_array import WGMMA_LAYOUT_8BIT, WGMMA_ROW_LAYOUT, FragmentedArray
from jax.experimental.mosaic.gpu.utils import (
    ReductionKind,
    bitcast,
    bitwidth,
    c,
    inline_ptx,
    prmt,
    redux,
    thread_idx,
    when,
)
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, math, memref, vector

from pallas_kernels.persistent_layouts import UNIT, line
from pallas_kernels.persistent_plan import BLOCK, DIGITS, ROW_UNIT, Plan, Product
from pallas_kernels.tiles import WGMMA_ROWS, transforms_of

LANES = 128  # threads of a warpgroup
ONE_A_THREAD = line(LANES).to_mgpu()
SCALAR = plgpu.Layout.WG_SPLAT
# 4 bits are made a byte as its upper half: 16 times the weight, the sign where it belongs.
HALF_BYTE = 16
WHOLE = 127 * 256  # the largest number of two digits, less what the lower one can add
SUMS = plgpu.Layout.TILED(  # sums [64 * m, 4 * n] of tokens, to a thread those whose digits wgmma gave it
    plgpu.Tiling(((64, 4), (16, 4), (8, 4), (1,))), warp_dims=(-7,), lane_dims=(-3, -2), vector_dim=-1
)
WORDS = plgpu.Layout.TILED(  # 4-bit integers [64 * m, 32 * n] in rows as wgmma takes them: a word of 8 to a thread
    plgpu.Tiling(((64, 32), (16, 32), (8, 32), (8,))), warp_dims=(-7,), lane_dims=(-3, -2), vector_dim=-1
)


def put_row(plan: Plan, p: Product, x: Any, factors: Any, values: jax.Array, cut: Any, step: Any, row: Any) -> None:
    """Write ``values`` [4, 32, 8], the next 1024 inputs of token ``row`` from ``step`` of a cut on, to x [steps,
    columns of all cuts, inputs] in shared memory. Pallas writes whole tiles of 8 tokens, and most often there is one.

    For integer weights a token has two rows side by side, of its digits (see `digits_of`), and ``factors`` [blocks of
    inputs, tokens of all cuts] gets what the second is worth."""
    integers = plan.shape.fmt.quantized
    if plan.interpret:
        _put_row_interpreted(plan, p, x, factors, values, cut, step, row)
        return
    dtype = jnp.dtype(jnp.int8 if integers else jnp.bfloat16)
    transforms = transforms_of(x.shape[-1], dtype, plan.shape.fmt.group)
    width = transforms[0].tiling[-1]  # inputs of a swizzled tile
    granule = 16 // dtype.itemsize  # of those that the swizzle moves together
    refs = (x, factors) if integers else (x,)
    types = (plgpu.RefType(transforms), plgpu.RefType())[: len(refs)]

    @plgpu.inline_mgpu(arg_types=(types, UNIT, SCALAR, SCALAR, SCALAR))
    def put(_: Any, refs: Any, values: Any, cut: Any, step: Any, row: Any) -> None:
        cut, step, row = (a.registers.item() for a in (cut, step, row))
        (eight,) = values.registers.flat  # this thread's inputs: 8 * thread and on
        first = times(thread_anew(), 8)
        slab, within = plus(step, over(first, p.step)), rest(first, p.step)

        def write(column: Any, at: Any, value: Any) -> None:
            """``value`` at input ``at`` of the slab: the swizzle moves granules about within a row of a tile."""
            tile, inside = over(column, 8), rest(column, 8)
            moved = arith.xori(over(rest(at, width), granule), over(inside, 8 * granule // width))
            place_in_row = plus(times(moved, granule), rest(at, granule))
            aligned_store(value, refs[0], place(slab, tile, over(at, width), inside, place_in_row))

        column = plus(times(cut, plan.shape.columns), times(row, plan.shape.digits))
        if not integers:
            write(column, within, eight)
            return
        shifted, scale = _digits(eight)
        if plan.shape.fmt.bits == 8:
            pairs = zip(_words(shifted[:4]), _words(shifted[4:]), strict=True)
            for number, pair in enumerate(pairs):
                write(plus(column, number), within, _bytes(*pair))
        else:  # as `in_bytes` brings the weights: of 32 inputs the even ones, 4 to a thread, then the odd ones
            own = plus(minus(within, rest(within, 32)), times(rest(over(within, 8), 4), 4))
            for at, words in ((own, _words(shifted[::2])), (plus(own, 16), _words(shifted[1::2]))):
                for number, word in enumerate(words):
                    write(plus(column, number), at, _bytes(word))
        block = plus(over(times(step, p.step), BLOCK), over(first, BLOCK))
        worth = arith.mulf(scale, c(worth_of(plan), scale.type))
        # A block's threads write the same.
        memref.store(worth, refs[1], place(block, plus(times(cut, plan.shape.places), row)))

    put(refs, values, cut, step, row)  # type: ignore[call-arg]


def _put_row_interpreted(
    plan: Plan, p: Product, x: Any, factors: Any, values: jax.Array, cut: Any, step: Any, row: Any
) -> None:
    column, steps = cut * plan.shape.columns + row * plan.shape.digits, ROW_UNIT // p.step
    rows: Any = [values]
    if plan.shape.fmt.quantized:
        rows, scale = digits_of(values.reshape(-1, BLOCK))
        for i in range(ROW_UNIT // BLOCK):
            factors[step * p.step // BLOCK + i, cut * plan.shape.places + row] = scale[i] * worth_of(plan)
    for number, one in enumerate(rows):
        for i in range(steps):
            x.at[step + i, column + number][...] = one.reshape(steps, p.step)[i]


# x as integers


def worth_of(plan: Plan) -> float:
    """What the second digit is worth, as a share of its block's scale and of what `in_bytes` makes of a weight; the
    first is worth 256 times that."""
    return 1 / WHOLE / (HALF_BYTE if plan.shape.fmt.bits == 4 else 1)


def digits_of(x: jax.Array) -> tuple[list[jax.Array], jax.Array]:
    """Numbers [blocks, n] as sums of two digits, bytes with a sign of whole numbers of 16 bits, times a power of two of
    the block: to a 32,512th of its largest, which is finer than a bfloat16 of the largest by 7 bits. wgmma's 8 columns
    hold the digits of 4 tokens for the price of 1."""
    x = x.astype(jnp.float32)
    exponent = jax.lax.bitcast_convert_type(jnp.abs(x).max(axis=1), jnp.int32) >> 23
    scale, inverse = (
        jax.lax.bitcast_convert_type(e << 23, jnp.float32)
        for e in (jnp.minimum(exponent + 1, 255), jnp.maximum(253 - exponent, 0))
    )
    shifted = jnp.round(x * inverse[:, None] * WHOLE).astype(jnp.int32) + 128
    return [(shifted >> 8).astype(jnp.int8), ((shifted & 255) - 128).astype(jnp.int8)], scale


def _digits(eight: Any) -> tuple[list[Any], Any]:
    """`digits_of` for a warp, whose threads have 8 numbers of a block each. A number's digits are the lower two bytes,
    the last with its sign turned about."""
    f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
    numbers = [vector.extract(eight, [], [i]) for i in range(8)]
    numbers = [a if a.type == f32 else arith.extf(f32, a) for a in numbers]
    sizes = [arith.andi(arith.bitcast(i32, a), _int(0x7FFFFFFF)) for a in numbers]
    while len(sizes) > 1:
        sizes = [arith.maxui(a, b) for a, b in zip(sizes[::2], sizes[1::2], strict=True)]
    size = redux(sizes[0], _int(-1), ReductionKind.UMAX)  # of the warp
    exponent = arith.shrui(size, _int(23))
    scale = arith.minui(plus(exponent, 1), _int(255))
    inverse = arith.maxsi(minus(_int(253), exponent), _int(0))  # what is no number makes the scale none, and x zero
    scale, inverse = (arith.bitcast(f32, arith.shli(a, _int(23))) for a in (scale, inverse))
    factor = arith.mulf(inverse, c(float(WHOLE), f32))
    # Added to a small number, leaves it whole in the last bits; 128 more, and its upper byte is the first digit.
    magic = c(1.5 * 2**23 + 128, f32)
    return [arith.bitcast(i32, math.fma(a, factor, magic)) for a in numbers], scale


def _words(four: list[Any]) -> tuple[Any, Any]:
    """Both digits of 4 numbers, each as a word."""
    left, right = (prmt(a, b, _int(0x5140)) for a, b in (four[:2], four[2:]))  # lower bytes of both, then upper ones
    first, second = prmt(left, right, _int(0x7632)), prmt(left, right, _int(0x5410))
    return first, arith.xori(second, _int(0x80808080 - 2**32))


def _bytes(*words: Any) -> Any:
    """Words as bytes one behind the other."""
    i8 = ir.IntegerType.get_signless(8)
    whole = vector.from_elements(ir.VectorType.get((len(words),), words[0].type), words)
    return vector.bitcast(ir.VectorType.get((4 * len(words),), i8), whole)


def in_bytes(tile: Any) -> jax.Array:
    """A tile of 4-bit weights in shared memory as wgmma's left operand in registers: bytes of `HALF_BYTE` times the
    weight, which is where the sign is right without more ado. Threads keep what a wide load gave them: see `put_row`
    for the order of the inputs."""
    operand = plgpu.ShapeDtypeStruct(tile.shape, jnp.int8, layout=plgpu.Layout.WGMMA_8BIT)

    @plgpu.inline_mgpu(arg_types=(WORDS,), return_type=operand)
    def convert(_: Any, integers: Any) -> Any:
        i32, four = ir.IntegerType.get_signless(32), ir.VectorType.get((4,), ir.IntegerType.get_signless(8))
        one, mask = ir.VectorType.get((1,), i32), _int(0xF0F0F0F0 - 2**32)
        registers = np.empty(WGMMA_LAYOUT_8BIT.registers_shape(integers.shape), dtype=object)
        for index, eight in np.ndenumerate(integers.registers):
            word = bitcast(eight, i32)
            for half, moved in enumerate((arith.shli(word, _int(4)), word)):
                weights = vector.bitcast(four, vector.broadcast(one, arith.andi(moved, mask)))
                registers[index[0], 2 * index[1] + half, *index[2:]] = weights
        return FragmentedArray(_registers=registers, _layout=WGMMA_LAYOUT_8BIT, _is_signed=True)

    return convert(plgpu.load(tile, layout=WORDS))  # type: ignore[call-arg]


def scale_rows(plan: Plan, p: Product, scales: Any, tile: Any, group: Any) -> jax.Array:
    """The scales [64] of a tile's rows for the ``group``-th group of their ranges of inputs, in float32. ``scales`` is
    shared memory in the form of `scales_shape`."""
    groups = p.inner // plan.shape.fmt.group
    cut_groups = p.cut_steps * p.step // plan.shape.fmt.group
    if plan.interpret:
        stacked = jnp.minimum(tile * WGMMA_ROWS + jax.lax.iota(jnp.int32, WGMMA_ROWS), p.stacked - 1)
        part, row = stacked // p.strip, stacked % p.strip
        flat = scales[:, : p.strip // 8].reshape(p.halves * p.strip * groups)
        column = jnp.minimum(group + part % p.cuts * cut_groups, groups - 1)
        return flat[((part // p.cuts) * p.strip + row) * groups + column].astype(jnp.float32)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), SCALAR, SCALAR),
        return_type=plgpu.ShapeDtypeStruct((WGMMA_ROWS,), jnp.float32, layout=plgpu.Layout.WGMMA.reduce(1)),
    )
    def read(_: Any, scales: Any, tile: Any, group: Any) -> Any:
        tile, group, thread = tile.registers.item(), group.registers.item(), thread_in_warpgroup()
        row = row_of(thread)
        registers = np.empty(WGMMA_ROW_LAYOUT.registers_shape((WGMMA_ROWS,)), dtype=object)
        for i, index in enumerate(np.ndindex(registers.shape)):  # rows r and r + 8
            stacked = plus(plus(row, 8 * i), times(tile, WGMMA_ROWS))
            if p.tiles * WGMMA_ROWS > p.stacked:
                stacked = least(stacked, p.stacked - 1)
            part, inside = over(stacked, p.strip), rest(stacked, p.strip)
            half, cut = over(part, p.cuts), rest(part, p.cuts)
            column = plus(group, times(cut, cut_groups))
            if p.cuts > 1:
                column = least(column, groups - 1)
            flat = plus(times(rest(inside, 8), groups), column)
            scale = memref.load(scales, place(half, over(inside, 8), over(flat, 16), rest(flat, 16)))
            one = arith.extf(ir.F32Type.get(), scale)
            registers[index] = vector.broadcast(ir.VectorType.get((1,), ir.F32Type.get()), one)
        return FragmentedArray(_registers=registers, _layout=WGMMA_ROW_LAYOUT, _is_signed=None)

    return read(scales, tile, group)  # type: ignore[call-arg]


def fold(plan: Plan, p: Product, part: jax.Array, factors: Any, scales: list[jax.Array], tile: Any,
         total: jax.Array) -> jax.Array:  # fmt: skip
    """``total`` [64, tokens] plus what whole numbers [64, columns of all cuts] stand for: a token's digits put
    together, each row's sums with the x of its own range of inputs, times ``factors`` [tokens of all cuts] and, where
    there are, ``scales`` [64]."""
    places = plan.shape.places
    if plan.interpret:
        cut = (tile * WGMMA_ROWS + jnp.arange(WGMMA_ROWS)) // p.strip % p.cuts
        digits = part.reshape(WGMMA_ROWS, p.cuts, places, DIGITS)
        own = functools.reduce(lambda a, b: a * 256 + b, [digits[..., i] for i in range(DIGITS)])
        own = jnp.take_along_axis(own, cut[:, None, None], axis=1)[:, 0]
        worth = functools.reduce(lambda a, b: a * b[:, None], scales, factors[...].reshape(p.cuts, places)[cut])
        return total + own.astype(jnp.float32) * worth

    layouts = plgpu.Layout.WGMMA, plgpu.RefType(), (plgpu.Layout.WGMMA.reduce(1),) * len(scales), SCALAR, SUMS

    @plgpu.inline_mgpu(
        arg_types=layouts, return_type=plgpu.ShapeDtypeStruct((WGMMA_ROWS, places), jnp.float32, layout=SUMS)
    )
    def add(_: Any, part: Any, factors: Any, scales: Any, tile: Any, total: Any) -> Any:
        f32, tile, thread = ir.F32Type.get(), tile.registers.item(), thread_in_warpgroup()
        registers = np.empty_like(total.registers)
        for index in np.ndindex(registers.shape):
            column, half = index[1], index[4]  # of 8 columns, and of rows r and r + 8
            row = plus(times(tile, WGMMA_ROWS), plus(row_of(thread), 8 * half))
            cut = rest(over(row, p.strip), p.cuts)
            own, factor = None, plus(times(cut, places), plus(4 * column, rest(thread, 4)))
            for i in range(p.cuts):
                pair = part.registers[0, i * (places // 4) + column, *index[2:]]
                first, second = (vector.extract(pair, [], [digit]) for digit in range(DIGITS))
                whole = plus(times(first, 256), second)
                here = arith.cmpi(arith.CmpIPredicate.eq, cut, _int(i))
                own = whole if own is None else arith.select(here, whole, own)
            worth = memref.load(factors, place(factor))
            for scale in scales:
                worth = arith.mulf(worth, vector.extract(scale.registers.flat[half], [], [0]))
            before = vector.extract(total.registers[index], [], [0])
            after = math.fma(arith.sitofp(f32, own), worth, before)
            registers[index] = vector.broadcast(ir.VectorType.get((1,), f32), after)
        return FragmentedArray(_registers=registers, _layout=total.layout, _is_signed=None)

    return add(part, factors, tuple(scales), tile, total)  # type: ignore[call-arg]


def put_sums(plan: Plan, sums: Any, total: jax.Array, tile: Any, again: Any) -> None:
    """Write ``total`` [64, tokens] to its tile of ``sums`` [tokens, outputs]; ``again``: add it to what is there."""
    if plan.interpret:
        here = sums.at[:, pl.ds(tile * WGMMA_ROWS, WGMMA_ROWS)]
        here[...] = jnp.where(again, here[...], 0) + total.T
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SUMS, SCALAR, SCALAR))
    def put(_: Any, sums: Any, total: Any, tile: Any, again: Any) -> None:
        tile, again, thread = tile.registers.item(), again.registers.item(), thread_anew()
        for index, value in np.ndenumerate(total.registers):
            token = plus(4 * index[1], rest(thread, 4))
            here = place(token, plus(times(tile, WGMMA_ROWS), plus(row_of(thread), 8 * index[4])))
            one = vector.extract(value, [], [0])
            before = arith.select(again, memref.load(sums, here), c(0.0, one.type))
            memref.store(arith.addf(before, one), sums, here)

    put(sums, total, tile, again)  # type: ignore[call-arg]


def row_of(thread: Any) -> Any:
    """The first of a thread's two rows of wgmma's 64; the second is 8 further."""
    return plus(times(over(thread, 32), 16), over(rest(thread, 32), 4))


def some_of(plan: Plan, numbers: Any, begin: Any, count: int) -> jax.Array:
    """``count`` of a row of numbers in any memory, one a thread; the last once more in threads that are left."""
    if plan.interpret:
        some = numbers[pl.ds(begin, count)]
        return jnp.concatenate([some, jnp.broadcast_to(some[-1:], (LANES - count,))])

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), SCALAR),
        return_type=plgpu.ShapeDtypeStruct((LANES,), numbers.dtype, layout=line(LANES)),
    )
    def read(_: Any, numbers: Any, begin: Any) -> Any:
        own = plus(begin.registers.item(), least(thread_anew(), count - 1))
        number = memref.load(numbers, place(own))
        registers = np.empty(ONE_A_THREAD.registers_shape((LANES,)), dtype=object)
        registers[...] = vector.broadcast(ir.VectorType.get((1,), number.type), number)
        return FragmentedArray(_registers=registers, _layout=ONE_A_THREAD, _is_signed=None)

    return read(numbers, begin)  # type: ignore[call-arg]


def put_some(plan: Plan, numbers: Any, begin: Any, values: jax.Array, count: int) -> None:
    """The other way: the first ``count`` of ``values``. Nothing is written twice: the next phase waits for it."""
    if plan.interpret:
        numbers[pl.ds(begin, count)] = values[:count]
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR, line(LANES)))
    def put(_: Any, numbers: Any, begin: Any, values: Any) -> None:
        thread = thread_anew()
        with when(arith.cmpi(arith.CmpIPredicate.ult, thread, _int(count))):
            vector.store(values.registers.item(), numbers, place(plus(begin.registers.item(), thread)))

    put(numbers, begin, values)  # type: ignore[call-arg]


def aligned_store(value: Any, ref: Any, indices: list[Any]) -> None:
    """A store of a vector where one of its size may lie; of what it does not know the compiler makes one an element."""
    vector.store(value, ref, indices, alignment=value.type.shape[0] * bitwidth(value.type.element_type) // 8)


def thread_in_warpgroup() -> Any:
    return rest(thread_idx(), 128)


def thread_anew() -> Any:
    """The same, read again: else the compiler works out the addresses of all phases before the first layer, and has no
    registers to keep them in."""
    i32 = ir.IntegerType.get_signless(32)
    return rest(inline_ptx("mov.u32 $0, %tid.x;", result_types=i32, has_side_effects=True), 128)


def _int(value: Any) -> Any:
    return c(value, ir.IntegerType.get_signless(32)) if isinstance(value, int) else value


def plus(a: Any, b: Any) -> Any:
    return arith.addi(_int(a), _int(b))


def minus(a: Any, b: Any) -> Any:
    return arith.subi(_int(a), _int(b))


def times(a: Any, n: int) -> Any:
    return arith.muli(a, _int(n))


def over(a: Any, n: int) -> Any:
    return arith.divui(a, _int(n))


def rest(a: Any, n: int) -> Any:
    return arith.remui(a, _int(n))


def least(a: Any, n: int) -> Any:
    return arith.minui(a, _int(n))


def place(*indices: Any) -> list[Any]:
    """Numbers as indices of a reference."""
    return [arith.index_castui(ir.IndexType.get(), _int(i)) for i in indices]

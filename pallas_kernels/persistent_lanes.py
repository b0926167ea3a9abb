"""Where a decode step must say which thread does what: reads and writes of shared memory that Pallas has no words for.

Each function says what it means in `jax.numpy` terms for the interpreter, and in Mosaic's terms for a GPU.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu.fragmented_array import WGMMA_LAYOUT, WGMMA_ROW_LAYOUT, FragmentedArray
from jax.experimental.mosaic.gpu.utils import bitcast, c, shfl_bfly, thread_idx
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref, vector

from pallas_kernels.persistent_layouts import UNIT
from pallas_kernels.persistent_plan import ROW_UNIT, ROWS, Plan, Product
from pallas_kernels.tiles import WGMMA_ROWS, transforms_of

SCALAR = plgpu.Layout.WG_SPLAT
BIAS = 136.0  # what `widened` adds to a 4-bit weight
# Of the neighbouring inputs in a word of 32 bits, those that are widened into one register.
PAIRS = {4: ((0, 4), (1, 5), (2, 6), (3, 7)), 8: ((0, 2), (1, 3))}
EXPONENT = {4: 0x43084308, 8: 0x43004300}  # two bfloat16 of 128; with 8 turns the sign of 4 bits


def words(bits: int) -> Any:
    """Integers [64 * m, 128 / bits * n] in rows as wgmma takes them: each of 4 neighbouring threads has a word of 4."""
    row = 128 // bits
    return plgpu.Layout.TILED(
        plgpu.Tiling(((64, row), (16, row), (8, row), (row // 4,))), warp_dims=(-7,), lane_dims=(-3, -2), vector_dim=-1
    )


def put_row(plan: Plan, p: Product, x: Any, totals: Any, values: jax.Array, cut: Any, step: Any, row: Any) -> None:
    """Write ``values`` [4, 32, 8], the next 1024 inputs of one token from ``step`` of a cut on, to x [steps, 8 * cuts,
    inputs] in shared memory: the row of the token among the cut's 8, in the order in which `widened` brings quantised
    weights. Pallas writes whole tiles of 8 tokens only, and most often there is one.

    With groups, ``totals`` [groups, 8 * cuts] gets what takes the bias out of a product with `widened` weights: the
    sums of a group's inputs, times ``-BIAS``."""
    fmt = plan.shape.fmt
    if plan.interpret:
        steps = ROW_UNIT // p.step
        for i in range(steps):
            x.at[step + i, cut * ROWS + row][...] = values.reshape(steps, p.step)[i]
        if fmt.grouped:
            sums = values.astype(jnp.float32).reshape(ROW_UNIT // fmt.group, fmt.group).sum(axis=1)
            for i in range(ROW_UNIT // fmt.group):
                totals[step * (p.step // fmt.group) + i, cut * ROWS + row] = sums[i] * -BIAS
        return
    dtype, run = jnp.dtype(jnp.bfloat16), fmt.group
    transforms = transforms_of(x.shape[-1], dtype, run)
    width = transforms[0].tiling[-1]  # inputs of a swizzled tile: 64, or 32 or 16 where groups are small
    chunks = width // 8
    refs = (x, totals) if fmt.grouped else (x,)
    types = (plgpu.RefType(transforms), plgpu.RefType())[: len(refs)]

    @plgpu.inline_mgpu(arg_types=(types, UNIT, SCALAR, SCALAR, SCALAR))
    def put(_: Any, refs: Any, values: Any, cut: Any, step: Any, row: Any) -> None:
        cut, step, row = (a.registers.item() for a in (cut, step, row))
        (eight,) = values.registers.flat  # this thread's inputs: 8 * thread and on
        first = times(thread_in_warpgroup(), 8)
        slab, within = plus(step, over(first, p.step)), rest(first, p.step)

        def write(at: Any, value: Any) -> None:
            """``value`` at input ``at`` of the slab: the swizzle moves lines of 8 inputs about within a row."""
            line = arith.xori(over(rest(at, width), 8), over(row, 8 // chunks))
            vector.store(value, refs[0], place(slab, cut, over(at, width), row, plus(times(line, 8), rest(at, 8))))

        if not fmt.quantized:
            write(within, eight)
            return
        # Of 4 words in a row each goes to a thread of its own, which takes one pair at a time to wgmma: pair b of all
        # of them is line b of the 4 words' inputs, in which each thread has its place.
        held = 32 // fmt.bits
        for word in range(8 // held):
            at = plus(within, word * held)
            thread = rest(over(at, held), 4)
            start = plus(minus(at, times(thread, held)), times(thread, 2))
            for b, pair in enumerate(PAIRS[fmt.bits]):
                two = vector.shuffle(eight, eight, [word * held + i for i in pair])
                write(plus(start, 8 * b), two)
        if fmt.grouped:
            total = group_total(eight, fmt.group)
            group = plus(times(step, p.step // fmt.group), over(first, fmt.group))
            memref.store(total, refs[1], place(group, plus(row, times(cut, ROWS))))  # its threads write the same

    put(refs, values, cut, step, row)  # type: ignore[call-arg]


def group_total(eight: Any, group: int) -> Any:
    """-BIAS times the sum of a group of inputs, of which every thread has 8: the same in all of its threads."""
    f32 = ir.F32Type.get()
    parts = [arith.extf(f32, vector.extract(eight, [], [i])) for i in range(8)]
    while len(parts) > 1:
        parts = [arith.addf(a, b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    (total,) = parts
    distance = 1
    while distance * 8 < group:
        total = arith.addf(total, shfl_bfly(total, distance))
        distance *= 2
    return arith.mulf(total, c(-BIAS, f32))


def widened(plan: Plan, tile: Any, exponent: Any) -> jax.Array:
    """A tile of integers in shared memory as wgmma's left operand in registers, 4-bit ones with `BIAS` added. Threads
    keep what a wide load gave them, so that the inputs are in the order of `PAIRS`; ``exponent`` is `EXPONENT`, see
    `opaque`.

    A bfloat16 of 128 to 255 has its last bit worth 1: an integer is put below its exponent as it is. 4 bits with the
    sign turned are the weight plus 8. Of 8 bits 7 go there; the sign, which is worth -128, sits where it makes the
    exponent of what is subtracted that of 256."""
    bits = plan.shape.fmt.bits

    def pairs(word: Any, exponent: Any) -> list[Any]:
        moved = [arith.shrui(word, _int(i * bits)) if i else word for i in range(16 // bits)]
        if bits == 4:
            return [arith.xori(arith.andi(w, _int(0x000F000F)), exponent) for w in moved]
        above, below = (
            [as_pair(arith.ori(arith.andi(w, _int(mask)), exponent)) for w in moved]
            for mask in (0x007F007F, 0x00800080)
        )
        return [arith.subf(*both) for both in zip(above, below, strict=True)]

    def convert(_: Any, integers: Any, exponent: Any) -> Any:
        exponent = exponent.registers.item()
        registers = np.empty(WGMMA_LAYOUT.registers_shape(integers.shape), dtype=object)
        for index, word in np.ndenumerate(integers.registers):
            for b, pair in enumerate(pairs(bitcast(word, ir.IntegerType.get_signless(32)), exponent)):
                registers[index[0], len(PAIRS[bits]) * index[1] + b, *index[2:]] = as_pair(pair)
        return FragmentedArray(_registers=registers, _layout=WGMMA_LAYOUT, _is_signed=None)

    floats = plgpu.ShapeDtypeStruct(tile.shape, jnp.bfloat16, layout=plgpu.Layout.WGMMA)
    inline = plgpu.inline_mgpu(arg_types=(words(bits), SCALAR), return_type=floats)
    return inline(convert)(plgpu.load(tile, layout=words(bits)), exponent)


def opaque(constant: int, start: Any) -> Any:
    """``constant``, for all that the compiler knows only where ``start`` is not negative. It keeps one that it cannot
    know in a register, and writes one that it knows there anew for every use."""
    return jnp.where(start < 0, 0, jnp.int32(constant))


def as_pair(word: Any) -> Any:
    """32 bits as two bfloat16."""
    pair = ir.VectorType.get((2,), ir.BF16Type.get())
    return (
        word if word.type == pair else vector.bitcast(pair, vector.broadcast(ir.VectorType.get((1,), word.type), word))
    )


def scale_rows(plan: Plan, p: Product, scales: Any, tile: Any, group: Any) -> jax.Array:
    """The scales [64] of a tile's rows for the ``group``-th group of their ranges of inputs, in float32. ``scales`` is
    shared memory in the form of `scales_shape`."""
    groups = p.inner // plan.shape.fmt.group
    cut_groups = p.cut_steps * p.step // plan.shape.fmt.group
    if plan.interpret:
        stacked = jnp.minimum(tile * WGMMA_ROWS + jax.lax.iota(jnp.int32, WGMMA_ROWS), p.stacked - 1)
        part, row = stacked // p.strip, stacked % p.strip
        flat = scales[...].reshape(p.halves * p.strip * groups)
        column = jnp.minimum(group + part % p.cuts * cut_groups, groups - 1)
        return flat[((part // p.cuts) * p.strip + row) * groups + column].astype(jnp.float32)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), SCALAR, SCALAR),
        return_type=plgpu.ShapeDtypeStruct((WGMMA_ROWS,), jnp.float32, layout=plgpu.Layout.WGMMA.reduce(1)),
    )
    def read(_: Any, scales: Any, tile: Any, group: Any) -> Any:
        tile, group, thread = tile.registers.item(), group.registers.item(), thread_in_warpgroup()
        row = plus(times(over(thread, 32), 16), over(rest(thread, 32), 4))
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


def thread_in_warpgroup() -> Any:
    return rest(thread_idx(), 128)


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

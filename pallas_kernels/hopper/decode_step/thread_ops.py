"""Where a decode step must say which thread does what: reads and writes of shared memory that Pallas has no words for.

Each function says what it means in `jax.numpy` terms for the interpreter, and in Mosaic's terms for a GPU.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.fragmented_array import WGMMA_ROW_LAYOUT, FragmentedArray
from jax.experimental.mosaic.gpu.utils import c
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, math, memref, vector

from ..common.layouts import EIGHT_PER_THREAD
from ..common.limbs import (
    lowest_limb_value,
    max_abs_bits,
    scale_and_inverse,
    split_into_limbs,
    swizzled_store,
    to_fixed_point,
    to_floats,
    warp_max,
    write_limbs,
)
from ..common.thread_ops import (
    SCALAR,
    add,
    as_i32,
    as_indices,
    div,
    min_,
    mul,
    rem,
    thread_in_warpgroup,
    volatile_thread_in_warpgroup,
)
from ..common.tiles import WGMMA_ROWS, transforms_of
from .plan import BLOCK, DIGITS, ROW_UNIT, Plan, Product

SUMS = plgpu.Layout.TILED(  # sums [64 * m, 4 * n] of tokens, to a thread those whose digits wgmma gave it
    plgpu.Tiling(((64, 4), (16, 4), (8, 4), (1,))), warp_dims=(-7,), lane_dims=(-3, -2), vector_dim=-1
)


def put_row(plan: Plan, p: Product, x: Any, factors: Any, values: jax.Array, cut: Any, step: Any, row: Any) -> None:
    """Write ``values`` [4, 32, 8], the next 1024 inputs of token ``row`` from ``step`` of a cut on, to x [steps,
    columns of all cuts, inputs] in shared memory. Pallas writes whole tiles of 8 tokens, and most often there is one.

    For integer weights a token has two rows side by side, of its limbs (see `split_into_limbs`), and ``factors``
    [blocks of inputs, tokens of all cuts] gets what the second is worth."""
    integers = plan.shape.fmt.quantized
    if plan.interpret:
        _put_row_interpreted(plan, p, x, factors, values, cut, step, row)
        return
    dtype = jnp.dtype(jnp.int8 if integers else jnp.bfloat16)
    transforms = transforms_of(x.shape[-1], dtype, plan.shape.fmt.group)
    refs = (x, factors) if integers else (x,)
    types = (plgpu.RefType(transforms), plgpu.RefType())[: len(refs)]

    @plgpu.inline_mgpu(arg_types=(types, EIGHT_PER_THREAD, SCALAR, SCALAR, SCALAR))
    def put(_: Any, refs: Any, values: Any, cut: Any, step: Any, row: Any) -> None:
        cut, step, row = (a.registers.item() for a in (cut, step, row))
        (eight,) = values.registers.flat  # this thread's inputs: 8 * thread and on
        first = mul(volatile_thread_in_warpgroup(), 8)
        slab, within = add(step, div(first, p.step)), rem(first, p.step)
        column = add(mul(cut, plan.shape.columns), mul(row, plan.shape.digits))

        def write(number: int, at: Any, value: Any) -> None:
            swizzled_store(value, refs[0], transforms, 16 // dtype.itemsize, slab, add(column, number), at)

        if not integers:
            write(0, within, eight)
            return
        numbers = to_floats(eight)
        scale, inverse = scale_and_inverse(warp_max(max_abs_bits(numbers)))
        write_limbs(to_fixed_point(numbers, inverse, DIGITS), DIGITS, plan.shape.fmt.bits, within, write)
        block = add(div(mul(step, p.step), BLOCK), div(first, BLOCK))
        worth = arith.mulf(scale, c(lowest_limb_value(DIGITS, plan.shape.fmt.bits), scale.type))
        # A block's threads write the same.
        memref.store(worth, refs[1], as_indices(block, add(mul(cut, plan.shape.places), row)))

    put(refs, values, cut, step, row)  # type: ignore[call-arg]


def _put_row_interpreted(
    plan: Plan, p: Product, x: Any, factors: Any, values: jax.Array, cut: Any, step: Any, row: Any
) -> None:
    column, steps = cut * plan.shape.columns + row * plan.shape.digits, ROW_UNIT // p.step
    rows: Any = [values]
    if plan.shape.fmt.quantized:
        rows, scale = split_into_limbs(values.reshape(-1, BLOCK))
        for i in range(ROW_UNIT // BLOCK):
            factors[step * p.step // BLOCK + i, cut * plan.shape.places + row] = scale[i] * lowest_limb_value(
                DIGITS, plan.shape.fmt.bits
            )
    for number, one in enumerate(rows):
        for i in range(steps):
            x.at[step + i, column + number][...] = one.reshape(steps, p.step)[i]


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
            stacked = add(add(row, 8 * i), mul(tile, WGMMA_ROWS))
            if p.tiles * WGMMA_ROWS > p.stacked:
                stacked = min_(stacked, p.stacked - 1)
            part, inside = div(stacked, p.strip), rem(stacked, p.strip)
            half, cut = div(part, p.cuts), rem(part, p.cuts)
            column = add(group, mul(cut, cut_groups))
            if p.cuts > 1:
                column = min_(column, groups - 1)
            flat = add(mul(rem(inside, 8), groups), column)
            scale = memref.load(scales, as_indices(half, div(inside, 8), div(flat, 16), rem(flat, 16)))
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
    def combine(_: Any, part: Any, factors: Any, scales: Any, tile: Any, total: Any) -> Any:
        f32, tile, thread = ir.F32Type.get(), tile.registers.item(), thread_in_warpgroup()
        registers = np.empty_like(total.registers)
        for index in np.ndindex(registers.shape):
            column, half = index[1], index[4]  # of 8 columns, and of rows r and r + 8
            row = add(mul(tile, WGMMA_ROWS), add(row_of(thread), 8 * half))
            cut = rem(div(row, p.strip), p.cuts)
            own, factor = None, add(mul(cut, places), add(4 * column, rem(thread, 4)))
            for i in range(p.cuts):
                pair = part.registers[0, i * (places // 4) + column, *index[2:]]
                first, second = (vector.extract(pair, [], [digit]) for digit in range(DIGITS))
                whole = add(mul(first, 256), second)
                here = arith.cmpi(arith.CmpIPredicate.eq, cut, as_i32(i))
                own = whole if own is None else arith.select(here, whole, own)
            worth = memref.load(factors, as_indices(factor))
            for scale in scales:
                worth = arith.mulf(worth, vector.extract(scale.registers.flat[half], [], [0]))
            before = vector.extract(total.registers[index], [], [0])
            after = math.fma(arith.sitofp(f32, own), worth, before)
            registers[index] = vector.broadcast(ir.VectorType.get((1,), f32), after)
        return FragmentedArray(_registers=registers, _layout=total.layout, _is_signed=None)

    return combine(part, factors, tuple(scales), tile, total)  # type: ignore[call-arg]


def put_sums(plan: Plan, sums: Any, total: jax.Array, tile: Any, again: Any) -> None:
    """Write ``total`` [64, tokens] to its tile of ``sums`` [tokens, outputs]; ``again``: add it to what is there."""
    if plan.interpret:
        here = sums.at[:, pl.ds(tile * WGMMA_ROWS, WGMMA_ROWS)]
        here[...] = jnp.where(again, here[...], 0) + total.T
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SUMS, SCALAR, SCALAR))
    def put(_: Any, sums: Any, total: Any, tile: Any, again: Any) -> None:
        tile, again, thread = tile.registers.item(), again.registers.item(), volatile_thread_in_warpgroup()
        for index, value in np.ndenumerate(total.registers):
            token = add(4 * index[1], rem(thread, 4))
            here = as_indices(token, add(mul(tile, WGMMA_ROWS), add(row_of(thread), 8 * index[4])))
            one = vector.extract(value, [], [0])
            before = arith.select(again, memref.load(sums, here), c(0.0, one.type))
            memref.store(arith.addf(before, one), sums, here)

    put(sums, total, tile, again)  # type: ignore[call-arg]


def row_of(thread: Any) -> Any:
    """The first of a thread's two rows of wgmma's 64; the second is 8 further."""
    return add(mul(div(thread, 32), 16), div(rem(thread, 32), 4))

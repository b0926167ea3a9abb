"""Consumers of a medium-M GEMM. Each multiplies some rows of every stage: of x with float weights, of the weight with
integers. These are widened on their way to wgmma, or multiply limbs of x as they are."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.fragmented_array import FragmentedArray
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref, vector

from ..common.ring import consumer_barrier
from ..common.thread_ops import (
    SCALAR,
    WARPGROUP_SIZE,
    add,
    aligned_store,
    as_i32,
    as_indices,
    load_per_thread,
    store_per_thread,
)
from ..common.tiles import WGMMA_ROWS, broadcast_rows
from ..common.widen import load_integers, widen, widen_scaled
from .medium_m_block import Block, WorkTile
from .medium_m_limbs import joined_limbs, row_scales
from .medium_m_rows_first import multiply_rows_first, write_rows_first

WIDENED = 64  # inputs that are widened at a time, while the products of those before run
AT_A_TIME = 4  # rows of the result that a thread writes at a time


def consume(block: Block) -> None:
    """Multiply this consumer's rows of every work tile, and write them."""
    p = block.plan

    def turn(t: Any, count: Any) -> Any:
        tile = block.work_tile(t)
        stages = tile.end - tile.start
        if p.problem.limbs:
            scales = _scales(block, tile, 0), row_scales(block)  # loaded before the products, used after them
            sums = [joined_limbs(_as_they_are(block, count, stages), *scales)]
        elif not p.problem.fmt.quantized:
            sums = _as_they_are(block, count, stages)
        elif p.problem.fmt.grouped and not p.scales_weights:
            sums = _one_scale_a_group(block, tile, count, stages)
        else:
            sums = _one_sum(block, tile, count, stages)
        (write_rows_first if p.problem.rows_first else _write)(block, tile, sums)
        return count + stages

    lax.fori_loop(0, block.turns, turn, jnp.int32(0))


def _multiply(block: Block, accs: Any, weights: Any, slot: Any, begin: int = 0, end: int | None = None) -> None:
    """Add the products of weights [64, inputs] and some inputs of a stage's x to the accumulators."""
    for (first, columns), acc in zip(block.plan.accumulators, accs, strict=True):
        x = block.scratch.x_ring.at[slot, pl.ds(first, columns), begin : end or block.plan.step]
        plgpu.wgmma(acc, weights, x.T)


def _accumulate(block: Block, scoped: Any) -> Any:
    """What ``scoped`` gives, whose arguments are accumulators of all columns."""
    shapes = [(WGMMA_ROWS, columns) for _, columns in block.plan.accumulators]
    dtype = jnp.int32 if block.plan.problem.limbs else jnp.float32
    return pl.run_scoped(scoped, *[plgpu.ACC(shape, dtype) for shape in shapes])


def _as_they_are(block: Block, count: Any, stages: Any) -> list[jax.Array]:
    """The sums of weights that wgmma reads from shared memory. The products of one stage run while those of the next
    are issued."""
    scratch, depth = block.scratch, block.plan.depth

    def scoped(*accs: Any) -> list[jax.Array]:
        def stage(i: Any, _: Any) -> None:
            slot = lax.rem(count + i, depth)
            plgpu.barrier_wait(scratch.full.at[slot])
            if block.plan.problem.rows_first:
                multiply_rows_first(block, accs, slot)
            else:
                _multiply(block, accs, scratch.w_ring.at[slot, pl.ds(block.first_row, WGMMA_ROWS)], slot)
            plgpu.wgmma_wait(len(accs))

            @pl.when(i > 0)
            def _() -> None:
                block.release(lax.rem(count + i - 1, depth))

        lax.fori_loop(0, stages, stage, None)
        _release(block, lax.rem(count + stages - 1, depth))
        return [acc[...] for acc in accs]

    return _accumulate(block, scoped)


def _one_sum(block: Block, tile: WorkTile, count: Any, stages: Any) -> list[jax.Array]:
    """The integers of the next stage, and their scales, are loaded while the products of this one run. The scale of a
    group multiplies the weights, that of a row the sums."""
    p, grouped = block.plan, block.plan.problem.fmt.grouped
    factors = None if grouped else _scales(block, tile, 0)  # loaded before the products, used after them
    begins = range(0, p.step, p.group)

    def load(i: Any, slot: Any) -> Any:
        scales = [_scales(block, tile, _group(block, tile.start + i, g)) if grouped else None for g in begins]
        return slot, scales, _load(block, slot)

    def scoped(*accs: Any) -> list[jax.Array]:
        def multiply(loaded: Any) -> None:
            slot, scales, integers = loaded
            for begin, scale in zip(begins, scales, strict=True):
                _multiply_integers(block, accs, integers, slot, begin, begin + p.group, scale)

        def stage(i: Any, loaded: Any) -> Any:
            multiply(loaded)
            following = load(i + 1, _after(block, loaded[0]))
            _release(block, loaded[0])
            return following

        loaded = lax.fori_loop(0, stages - 1, stage, load(0, lax.rem(count, p.depth)))
        multiply(loaded)
        _release(block, loaded[0])
        return [acc[...] for acc in accs]

    totals = _accumulate(block, scoped)
    return totals if factors is None else [total * broadcast_rows(factors, total.shape) for total in totals]


def _one_scale_a_group(block: Block, tile: WorkTile, count: Any, stages: Any) -> list[jax.Array]:
    """Every group has sums of its own, which are scaled exactly. Scales and integers are loaded a stage ahead."""
    p = block.plan
    groups = range(p.step // p.group)

    def load(i: Any, slot: Any) -> Any:
        scales = [_scales(block, tile, _group(block, tile.start + i, g * p.group)) for g in groups]
        return slot, scales, _load(block, slot)

    def multiply(total: jax.Array, loaded: Any, following: Any) -> Any:
        slot, scales, integers = loaded
        ahead = None
        for g, scale in zip(groups, scales, strict=True):

            def scoped(acc: Any, g: int = g) -> Any:
                _multiply_integers(block, [acc], integers, slot, g * p.group, (g + 1) * p.group)
                ahead = following(slot) if following is not None and g == groups[-1] else None
                plgpu.wgmma_wait(0)
                if g == groups[-1]:
                    block.release(slot)
                return acc[...], ahead

            sums, ahead = _accumulate(block, scoped)
            total = total + sums * broadcast_rows(scale, total.shape)
        return total, ahead

    def stage(i: Any, carry: Any) -> Any:
        total, loaded = carry
        return multiply(total, loaded, lambda slot: load(i + 1, _after(block, slot)))

    zero = plgpu.layout_cast(jnp.zeros((WGMMA_ROWS, p.problem.columns), jnp.float32), plgpu.Layout.WGMMA)
    total, loaded = lax.fori_loop(0, stages - 1, stage, (zero, load(0, lax.rem(count, p.depth))))
    return [multiply(total, loaded, None)[0]]


def _after(block: Block, slot: Any) -> Any:
    """The next slot of the ring. A remainder of the stage's number would be divided anew, in 64 bits, at every use."""
    return jnp.where(slot == block.plan.depth - 1, 0, slot + 1)


def _load(block: Block, slot: Any) -> Any:
    """This consumer's integers of a stage, once they have arrived, in registers. The interpreter has no wgmma with an
    operand in registers: there they are widened to shared memory, see `_operand`."""
    p, scratch = block.plan, block.scratch
    plgpu.barrier_wait(scratch.full.at[slot])
    weights = scratch.w_ring.at[slot, pl.ds(block.first_row, WGMMA_ROWS)]
    if scratch.widened is not None:
        return weights[...]
    return load_integers(weights, p.problem.fmt)


def _release(block: Block, slot: Any) -> None:
    plgpu.wgmma_wait(0)
    block.release(slot)


def _multiply_integers(
    block: Block, accs: Any, integers: jax.Array, slot: Any, first: int, last: int, scale: jax.Array | None = None
) -> None:
    """Add the products of these inputs of a stage. Some run while the inputs after them are widened."""
    for begin in range(first, last, WIDENED):
        end = min(begin + WIDENED, last)
        _multiply(block, accs, _operand(block, integers, begin, end, scale), slot, begin, end)


def _operand(block: Block, integers: jax.Array, begin: int, end: int, scale: jax.Array | None = None) -> Any:
    """Some inputs of a stage's integers as wgmma's left operand, times the scale [64] of their group if it is given."""
    dtype, widened, integers = block.plan.problem.dtype, block.scratch.widened, integers[:, begin:end]
    if scale is not None and block.scales_packed:
        return widen_scaled(integers, scale, dtype)
    weights = widen(integers, dtype) if widened is None else integers.astype(dtype)
    if scale is not None:  # as the reference does it: a product in float32, and one rounding
        weights = (weights.astype(jnp.float32) * broadcast_rows(scale, weights.shape)).astype(dtype)
    if widened is None:
        return weights
    place = widened.at[block.me, :, begin:end]
    place[...] = weights
    plgpu.commit_smem()
    return place


def _group(block: Block, stage: Any, begin: int) -> Any:
    """The group of a stage's input ``begin``."""
    fmt = block.plan.problem.fmt
    assert fmt.group is not None
    return (stage * block.plan.step + begin) // fmt.group


def _scales(block: Block, tile: WorkTile, group: Any) -> jax.Array:
    """The scales [64] of this consumer's rows of a stage, as float32 in registers."""
    p, outputs = block.plan, block.plan.problem.outputs
    assert block.scale is not None
    if p.interpret:
        parts = range(p.n_tile // p.n_out)
        whole = jnp.concatenate([block.scale[pl.ds(i * outputs + tile.out, p.n_out), group] for i in parts])
        return lax.dynamic_slice(whole, (block.first_row,), (WGMMA_ROWS,)).astype(jnp.float32)
    layout = plgpu.Layout.WGMMA.reduce(1)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), *[SCALAR] * 3),
        return_type=plgpu.ShapeDtypeStruct((WGMMA_ROWS,), block.scale.dtype, layout=layout),
    )
    def load(_: Any, scale: Any, out: Any, first_row: Any, group: Any) -> Any:
        out, first_row, group = (a.registers.item() for a in (out, first_row, group))
        rows_layout = layout.to_mgpu()
        registers = np.empty(rows_layout.registers_shape((WGMMA_ROWS,)), dtype=object)
        places = list(rows_layout.thread_idxs((WGMMA_ROWS,)))
        for index, (row,) in zip(np.ndindex(registers.shape), places, strict=True):
            row = add(arith.index_castui(ir.IntegerType.get_signless(32), row), first_row)
            if p.problem.swiglu:  # rows of up stand behind those of gate
                of_up = arith.cmpi(arith.CmpIPredicate.uge, row, as_i32(p.n_out))
                row = add(row, arith.select(of_up, as_i32(outputs - p.n_out), as_i32(0)))
            number = memref.load(scale, as_indices(add(out, row), group))
            registers[index] = vector.broadcast(ir.VectorType.get((1,), number.type), number)
        return FragmentedArray(_registers=registers, _layout=rows_layout, _is_signed=None)

    return load(block.scale, tile.out, block.first_row, jnp.int32(group)).astype(jnp.float32)  # type: ignore[call-arg]


def _write(block: Block, tile: WorkTile, sums: list[jax.Array]) -> None:
    """Transpose the sums [64, columns] of all consumers through shared memory, and write them as parts of the result's
    rows."""
    p, staged = block.plan, block.scratch.staged
    out, first = block.out.at[tile.k_split if p.k_splits > 1 else 0], 0
    for total in sums:
        columns = total.shape[1]
        for begin in range(0, columns, staged.shape[0]):
            width = min(staged.shape[0], columns - begin)
            values = total[:, begin : begin + width].astype(staged.dtype)
            consumer_barrier(block.scratch.consumers_meet)  # all have read what was there before
            _store_transposed(block, values)
            consumer_barrier(block.scratch.consumers_meet)
            _write_rows(block, out, tile.out, first + begin, min(width, p.problem.rows - first - begin))
        first += columns


def _store_transposed(block: Block, values: jax.Array) -> None:
    """Write values [64, columns] to `staged`, from this consumer's first row on. Mosaic's own store would need rows
    that are a multiple of 64 long, whose banks conflict."""
    p, staged = block.plan, block.scratch.staged
    if p.interpret:
        staged[pl.ds(0, values.shape[1]), pl.ds(block.first_row, WGMMA_ROWS)] = values.T
        return
    layout = plgpu.Layout.WGMMA_TRANSPOSED

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout, SCALAR))
    def put(_: Any, staged: Any, values: Any, first_row: Any) -> None:
        i32 = ir.IntegerType.get_signless(32)
        places = list(values.layout.thread_idxs(values.shape))
        for two, place in zip(values.registers.flat, places, strict=True):
            row, column = (arith.index_castui(i32, i) for i in place)
            aligned_store(two, staged, as_indices(column, add(row, first_row.registers.item())))

    put(staged, plgpu.layout_cast(values, layout), block.first_row)  # type: ignore[call-arg]


def _write_rows(block: Block, out: Any, first_out: Any, first_row: int, rows: int) -> None:
    """Write ``rows`` rows from `staged`, one output a thread. The consumers take them in turn, a few at a time."""
    p, staged = block.plan, block.scratch.staged
    for at in range(0, p.n_out, WARPGROUP_SIZE):
        n = min(WARPGROUP_SIZE, p.n_out - at)

        def write(turn: Any, _: Any, at: int = at, n: int = n) -> None:
            first = (turn * p.consumers + block.me) * AT_A_TIME
            tokens = [jnp.minimum(first + i, rows - 1) for i in range(AT_A_TIME)]  # the last one may be written again
            read = functools.partial(load_per_thread, p, staged, count=n)
            values = read([(token, at) for token in tokens])
            if p.problem.swiglu:
                gates = [value.astype(jnp.float32) for value in values]
                ups = [value.astype(jnp.float32) for value in read([(token, p.n_out + at) for token in tokens])]
                values = [gate / (1 + jnp.exp(-gate)) * up for gate, up in zip(gates, ups, strict=True)]
                values = [value.astype(out.dtype) for value in values]
            store_per_thread(p, out, [(first_row + token, first_out + at) for token in tokens], values, n)

        turns = (math.ceil(rows / AT_A_TIME) - block.me + p.consumers - 1) // p.consumers
        lax.fori_loop(0, turns, write, None)

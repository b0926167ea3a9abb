"""Products for many rows (prefill): tiles of the result, kept busy by a pipeline of TMA copies and two consumers.

The blocks are persistent: each works through a list of tiles, and the warpgroup that copies runs ahead of the two that
multiply, across tiles too, so the tensor cores wait only while a finished tile is written. Integer weights are widened
in registers on their way to wgmma, so prefill needs no float copy of them. With ``swiglu`` the tile holds the rows of
w_gate and of w_up that belong together, and only their product ever reaches memory.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.tiles import (
    SHARED_BYTES,
    Weight,
    format_of,
    layer_index,
    load_integers,
    nbytes,
    scale_column,
    sm_count,
    split,
    spread,
    swizzled,
    widen,
)
from pallas_kernels.wide_plan import CONSUMERS, Pass, Problem, WideTiles, check_wide, passes, tiles_for

__all__ = ["WideTiles", "check_wide", "wide"]


def wide(
    x: jax.Array,
    w: Weight,
    *,
    layer: jax.Array | int | None = None,
    residual: jax.Array | None = None,
    swiglu: bool = False,
    out_dtype: Any = None,
    tiles: WideTiles | None = None,
    sms: int | None = None,
    interpret: Any = False,
) -> jax.Array:
    """x [rows, in] · w [out, in] -> [rows, out] (+ residual), or silu(gate) * up of w [2 * out, in] with ``swiglu``.

    With ``layer``, w is stacked [layers, out, in] and read in place.
    """
    out, sms = w.shape[-2] // (2 if swiglu else 1), sms or sm_count()
    tiles = tiles or tiles_for(format_of(w), x.shape[0], out, swiglu, sms)
    if residual is not None and (swiglu or tiles.by_rows or tiles.out != CONSUMERS * tiles.step):
        raise ValueError(f"a residual needs tiles of {CONSUMERS} * step outputs, halved by outputs; found {tiles}")
    return _wide(
        x,
        w,
        layer_index(layer),
        residual,
        swiglu=swiglu,
        out_dtype=jnp.dtype(out_dtype or x.dtype),
        tiles=tiles,
        sms=sms,
        interpret=interpret,
    )


# Compiled as a function of its own: the layers of a model then share one trace and one lowering.
@functools.partial(jax.jit, static_argnames=("interpret", "out_dtype", "sms", "swiglu", "tiles"))
def _wide(x: jax.Array, w: Weight, layer: jax.Array, residual: jax.Array | None, *, swiglu: bool, out_dtype: Any,
          tiles: WideTiles, sms: int, interpret: Any) -> jax.Array:  # fmt: skip
    rows, inner = x.shape
    padding = ((0, -rows % tiles.rows), (0, 0))
    problem = Problem(
        fmt=format_of(w),
        rows=rows + padding[0][1],
        inner=inner,
        out=w.shape[-2] // (2 if swiglu else 1),
        dtype=x.dtype,
        out_dtype=out_dtype,
        swiglu=swiglu,
        residual=residual is not None,
    )
    data, scale = split(w)
    arguments = [layer, jnp.pad(x, padding), data]
    if scale is not None:
        arguments.append(scale)
    if residual is not None:
        arguments.append(jnp.pad(residual, padding))
    return _kernel(problem, tiles, sms, interpret)(*arguments)[:rows]


def _kernel(problem: Problem, tiles: WideTiles, sms: int, interpret: Any) -> Any:
    fmt = problem.fmt
    size = 2 if tiles.pair else 1
    plan = passes(problem, tiles, sms // size)
    units = min(sms // size, max(p.count for p in plan))
    part = tiles.part
    finished = (2, CONSUMERS, tiles.chunk, part)
    stage = nbytes((problem.heads * tiles.out, tiles.step), fmt.bits) + nbytes((tiles.rows, tiles.step), 16)
    room = SHARED_BYTES - 2048 - nbytes(finished, 8 * jnp.dtype(problem.out_dtype).itemsize)
    room -= nbytes(finished, 16) if tiles.trade else 0
    depth = min(tiles.depth, room // stage)
    scratch = {
        "w_ring": swizzled((depth, problem.heads * tiles.out, tiles.step), fmt.dtype),
        "x_ring": swizzled((depth, tiles.rows, tiles.step), problem.dtype, run=fmt.group),
        "finished": swizzled(finished, problem.out_dtype),
        "full": plgpu.Barrier(num_arrivals=problem.heads + 1, num_barriers=depth),
        "free": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=depth),
    }
    if tiles.pair:  # what one block fetches lands in both: both must have room
        scratch["free"] = plgpu.ClusterBarrier(collective_axes=("member",), num_arrivals=CONSUMERS, num_barriers=depth)
    if tiles.trade:
        scratch["traded"] = swizzled((2, CONSUMERS, part, tiles.chunk), problem.dtype)
        scratch["given"] = plgpu.Barrier(num_barriers=2 * CONSUMERS)
        scratch["taken"] = plgpu.Barrier(num_barriers=2 * CONSUMERS)
    if interpret and fmt.quantized:
        scratch["widened"] = swizzled((CONSUMERS, problem.heads * part, tiles.step), problem.dtype, run=fmt.group)
    return plgpu.kernel(
        functools.partial(
            _body,
            problem=problem,
            tiles=tiles,
            plan=plan,
            units=units,
            depth=depth,
            registers=not interpret,
        ),
        out_type=jax.ShapeDtypeStruct((problem.rows, problem.out), problem.out_dtype),
        scratch_types=scratch,
        grid=(units,),
        grid_names=("unit",),
        cluster=(size,),
        cluster_names=("member",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        interpret=interpret,
        compiler_params=None if interpret else plgpu.CompilerParams(approx_math=True),
        kernel_name="wide_product",
    )


def _body(*refs: Any, problem: Problem, tiles: WideTiles, plan: list[Pass], units: int, depth: int, registers: bool,
          **scratch: Any) -> None:  # fmt: skip
    layer_ref, x_ref, w_ref, *optional, out_ref = refs
    layer = layer_ref[0]
    scale_ref = optional.pop(0).at[layer] if problem.fmt.quantized else None
    residual_ref = optional.pop(0) if problem.residual else None
    unit, me = lax.axis_index("unit"), lax.axis_index("warpgroup")
    size = 2 if tiles.pair else 1
    member = lax.axis_index("member") if tiles.pair else 0
    grid = (problem.rows // tiles.rows, problem.out // tiles.out // size)

    def tile(p: Pass, turn: Any) -> tuple[Any, Any]:
        """First row and first output of the tile that this block computes at this turn of a pass."""
        index = p.first + turn * units + unit
        row, out = plgpu.planar_snake(index // p.parts, grid, 0, min(tiles.band, grid[0]))
        return row * tiles.rows + lax.rem(index, p.parts) * p.tiles.rows, (out * size + member) * tiles.out

    def each_pass(work: Callable[..., None]) -> Any:
        """Do ``work`` on the tiles of every pass; returns how many stages of the ring that took."""
        done = jnp.int32(0)
        for p in plan:
            turns = (p.count - unit + units - 1) // units
            work(turns, done, functools.partial(tile, p), p.tiles)
            done += turns * problem.stages(tiles)
        return done

    @pl.when(me == CONSUMERS)
    def _() -> None:
        if registers:
            plgpu.set_max_registers(40, action="decrease")
        produce = functools.partial(_produce, x_ref, w_ref.at[layer], residual_ref, problem, depth)
        done = each_pass(functools.partial(produce, **scratch))

        def drain(i: Any, _: Any) -> None:  # a barrier's every completion must be awaited before the block ends
            plgpu.barrier_wait(scratch["free"].at[lax.rem(i, depth)])

        lax.fori_loop(jnp.maximum(done - depth, 0), done, drain, None)

    @pl.when(me < CONSUMERS)
    def _() -> None:
        if registers:
            plgpu.set_max_registers(232, action="increase")
        consume = functools.partial(_consume, me, scale_ref, out_ref, problem, depth)
        each_pass(functools.partial(consume, **scratch))
        plgpu.wait_smem_to_gmem(0)


def _produce(x_ref: Any, w_ref: Any, residual_ref: Any, problem: Problem, depth: int, turns: Any, done: Any, tile: Any,
             tiles: WideTiles, *, w_ring: Any, x_ring: Any, full: Any, free: Any, **_: Any) -> None:  # fmt: skip
    """Keep the ring full, across tiles. What is to be added to a tile travels behind its inputs, in the same ring."""
    steps, stages = problem.inner // tiles.step, problem.stages(tiles)
    rows, half = pl.ds(0, tiles.rows), tiles.rows // 2

    def turn(t: Any, _: Any) -> None:
        row, out = tile(t)

        def next_slot(k: Any) -> Any:
            i = done + t * stages + k
            slot = lax.rem(i, depth)

            @pl.when(i >= depth)
            def _() -> None:
                plgpu.barrier_wait(free.at[slot])

            return slot

        def stage(k: Any, _: Any) -> None:
            slot = next_slot(k)
            inputs = pl.ds(k * tiles.step, tiles.step)
            plgpu.copy_gmem_to_smem(
                x_ref.at[pl.ds(row, tiles.rows), inputs],
                x_ring.at[slot, rows],
                full.at[slot],
                collective_axes="member" if tiles.pair else None,
            )
            for head in range(problem.heads):
                plgpu.copy_gmem_to_smem(
                    w_ref.at[pl.ds(head * problem.out + out, tiles.out), inputs],
                    w_ring.at[slot, pl.ds(head * tiles.out, tiles.out)],
                    full.at[slot],
                )

        lax.fori_loop(0, steps, stage, None)
        for j in range(problem.behind(tiles)):
            slot = next_slot(steps + j)
            for part in range(2):  # as many copies as a stage of inputs has, for the barrier counts them
                plgpu.copy_gmem_to_smem(
                    residual_ref.at[pl.ds(row + part * half, half), pl.ds(out + j * tiles.step, tiles.step)],
                    x_ring.at[slot, pl.ds(part * half, half)],
                    full.at[slot],
                )

    lax.fori_loop(0, turns, turn, None)


def _consume(me: Any, scales: Any, out_ref: Any, problem: Problem, depth: int, turns: Any, done: Any, tile: Any,
             tiles: WideTiles, *, w_ring: Any, x_ring: Any, finished: Any, full: Any, free: Any,
             widened: Any = None, traded: Any = None, given: Any = None, taken: Any = None) -> None:  # fmt: skip
    """Multiply this consumer's half of every tile, and write it."""
    fmt, steps, stages = problem.fmt, problem.inner // tiles.step, problem.stages(tiles)
    part = tiles.part
    columns = tiles.rows // CONSUMERS if tiles.by_rows else tiles.rows
    first_out = 0 if tiles.by_rows or tiles.trade else me * part
    heads = [me] if tiles.trade else list(range(problem.heads))  # those that this consumer multiplies
    my_rows = pl.ds(me * columns, columns) if tiles.by_rows else pl.ds(0, columns)
    accumulators = [plgpu.ACC((part, columns), jnp.float32) for _ in heads]

    group = min(fmt.group or tiles.step, tiles.step)

    def weights_of(slot: Any, head: Any) -> Any:
        return w_ring.at[slot, pl.ds(head * tiles.out + first_out, part)]

    def dense(accs: Any, first: Any, _out: Any) -> None:
        """Products of one stage stay in flight while the next is issued."""

        def stage(k: Any, _: Any) -> None:
            slot = lax.rem(first + k, depth)
            plgpu.barrier_wait(full.at[slot])
            for head, acc in zip(heads, accs, strict=True):
                plgpu.wgmma(acc, weights_of(slot, head), x_ring.at[slot, my_rows].T)
            plgpu.wgmma_wait(len(heads))

            @pl.when(k > 0)
            def _() -> None:
                plgpu.barrier_arrive(free.at[lax.rem(first + k - 1, depth)])

        lax.fori_loop(0, steps, stage, None)
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(free.at[lax.rem(first + steps - 1, depth)])

    def scaled(weights: jax.Array, i: int, head: Any, column: Any, out: Any) -> Any:
        """Weights of one group of inputs as wgmma's left operand. Scales of a group are applied here, before the
        rounding; scales of a row at the end."""
        if fmt.grouped:
            scale = scale_column(scales, head * problem.out + out + first_out, column, part)
            weights = (weights.astype(jnp.float32) * spread(scale, weights.shape)).astype(problem.dtype)
        if widened is None:
            return weights
        # The interpreter has no wgmma with an operand in registers.
        place = widened.at[me, pl.ds(i * part, part), pl.ds(0, group)]
        place[...] = weights
        plgpu.commit_smem()
        return place

    def quantized(accs: Any, first: Any, out: Any) -> None:
        """The integers of the next stage are loaded while the products of this one run."""

        def load(k: Any) -> list[jax.Array]:
            slot = lax.rem(first + k, depth)
            plgpu.barrier_wait(full.at[slot])
            return [load_integers(weights_of(slot, head), fmt) for head in heads]

        def multiply(k: Any, integers: list[jax.Array]) -> None:
            slot = lax.rem(first + k, depth)
            for i, (head, acc) in enumerate(zip(heads, accs, strict=True)):
                floats = widen(integers[i], problem.dtype)
                for g in range(0, tiles.step, group):
                    column = (k * tiles.step + g) // fmt.group if fmt.grouped else 0
                    weights = scaled(floats[:, g : g + group], i, head, column, out)
                    plgpu.wgmma(acc, weights, x_ring.at[slot, my_rows, pl.ds(g, group)].T)
                    if widened is not None:
                        plgpu.wgmma_wait(0)

        def release(k: Any) -> None:
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(free.at[lax.rem(first + k, depth)])

        def stage(k: Any, integers: list[jax.Array]) -> list[jax.Array]:
            multiply(k, integers)
            following = load(k + 1)
            release(k)
            return following

        multiply(steps - 1, lax.fori_loop(0, steps - 1, stage, load(0)))
        release(steps - 1)

    def swap(result: jax.Array, i: int, chunks: int) -> list[jax.Array]:
        """Chunk ``i`` of this consumer's half of the rows, as gate and up: one its own, one from the other."""

        def in_order(a: jax.Array, b: jax.Array) -> list[jax.Array]:
            return lax.cond(me == 0, lambda: [a, b], lambda: [b, a])

        first, second = (result[:, j * tiles.chunk : (j + 1) * tiles.chunk] for j in (i, i + chunks))
        mine, theirs = in_order(first, second)
        slot, other = i % 2, 1 - me
        if i >= 2:
            plgpu.barrier_wait(taken.at[2 * me + slot])
        traded[slot, me] = theirs.astype(problem.dtype)
        plgpu.barrier_arrive(given.at[2 * me + slot])
        plgpu.barrier_wait(given.at[2 * other + slot])
        received = plgpu.load(traded.at[slot, other], layout=plgpu.Layout.WGMMA).astype(jnp.float32)
        plgpu.barrier_arrive(taken.at[2 * other + slot])
        return in_order(mine, received)

    def turn(t: Any, _: Any) -> None:
        row, out = tile(t)
        first = done + t * stages

        def scoped(*accs: Any) -> list[jax.Array]:
            (quantized if fmt.quantized else dense)(accs, first, out)
            return [acc[...] for acc in accs]

        results = pl.run_scoped(scoped, *accumulators)
        if fmt.quantized and not fmt.grouped:
            results = [
                result * spread(scale_column(scales, head * problem.out + out + first_out, 0, part), result.shape)
                for head, result in zip(heads, results, strict=True)
            ]
        row = row + me * columns if tiles.by_rows else row
        behind = [lax.rem(first + steps + j, depth) for j in range(problem.behind(tiles))]
        for slot in behind:
            plgpu.barrier_wait(full.at[slot])
        chunks = columns // tiles.chunk // (2 if tiles.trade else 1)
        for i in range(chunks):
            rows = pl.ds(i * tiles.chunk, tiles.chunk)
            if tiles.trade:
                values = swap(results[0], i, chunks)
            else:
                values = [result[:, i * tiles.chunk : (i + 1) * tiles.chunk] for result in results]
            value = values[0] / (1 + jnp.exp(-values[0])) * values[1] if problem.swiglu else values[0]
            if behind:  # of these stages each consumer adds the one with its own outputs
                before = x_ring.at[lax.rem(first + steps + me, depth), rows].T
                before = plgpu.load(before, layout=plgpu.Layout.WGMMA_TRANSPOSED)
                value = value + plgpu.layout_cast(before, plgpu.Layout.WGMMA).astype(jnp.float32)
            place = finished.at[i % 2, me]
            # The copy from this buffer is the last but one; after an odd number of chunks the last tile's is the last.
            plgpu.wait_smem_to_gmem(1 if i or chunks % 2 == 0 else 0, wait_read_only=True)
            place.T[...] = plgpu.layout_cast(value.astype(problem.out_dtype), plgpu.Layout.WGMMA_TRANSPOSED)
            plgpu.commit_smem()
            target = pl.ds(row + (me * chunks + i if tiles.trade else i) * tiles.chunk, tiles.chunk)
            plgpu.copy_smem_to_gmem(place, out_ref.at[target, pl.ds(out + first_out, part)])
        for i in range(min(2, chunks) if tiles.trade else 0):
            plgpu.barrier_wait(taken.at[2 * me + i])
        for slot in behind:
            plgpu.barrier_arrive(free.at[slot])

    lax.fori_loop(0, turns, turn, None)

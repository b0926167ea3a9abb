"""What the two multiplying warpgroups of a product for many rows do: `large_m` has the launch."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..common.tiles import broadcast_rows, scale_column
from ..common.widen import load_integers, widen, widen_scaled
from .large_m_exchange import Trade
from .large_m_plan import CONSUMERS, Problem, Refs, WideTiles
from .large_m_rotary import angles, finish


def consume(me: Any, refs: Refs, problem: Problem, depth: int, turns: Any, done: Any, tile: Any, tiles: WideTiles, *,
            w_ring: Any, x_ring: Any, finished: Any, full: Any, free: Any, widened: Any = None, traded: Any = None,
            given: Any = None, taken: Any = None) -> None:  # fmt: skip
    """Multiply this consumer's half of every tile, and write it."""
    fmt, steps, stages = problem.fmt, problem.inner // tiles.step, problem.stages(tiles)
    part = tiles.part
    columns = tiles.rows // CONSUMERS if tiles.by_rows else tiles.rows
    first_out = 0 if tiles.by_rows or tiles.trade else me * part
    heads = [me] if tiles.trade else list(range(problem.heads))  # those that this consumer multiplies
    my_rows = pl.ds(me * columns, columns) if tiles.by_rows else pl.ds(0, columns)
    accumulators = [plgpu.ACC((part, columns), jnp.float32) for _ in heads]

    group = min(fmt.group or tiles.step, tiles.step)
    # The interpreter has no wgmma with an operand in registers, and no instructions to save.
    packed = widened is None and fmt.bits == 4 and fmt.grouped and refs["scale"].dtype.itemsize == 2

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

    def operand(integers: jax.Array, scale: Any, i: int) -> Any:
        """Weights of one group of inputs as wgmma's left operand. Scales of a group are applied here, before the
        rounding; scales of a row at the end."""
        if scale is None:
            weights = widen(integers, problem.dtype)
        elif packed:
            weights = widen_scaled(integers, scale, problem.dtype)
        else:
            floats = widen(integers, problem.dtype).astype(jnp.float32)
            weights = (floats * broadcast_rows(scale, floats.shape)).astype(problem.dtype)
        if widened is None:
            return weights
        place = widened.at[me, pl.ds(i * part, part), pl.ds(0, group)]
        place[...] = weights
        plgpu.commit_smem()
        return place

    def scales_of(head: Any, column: Any, out: Any) -> jax.Array:
        return scale_column(refs["scale"], head * problem.out + out + first_out, column, part)

    def quantized(accs: Any, first: Any, out: Any) -> None:
        """The integers of the next stage, and its groups' scales, are loaded while the products of this one run."""
        groups = range(0, tiles.step, group)

        def load(k: Any) -> list[Any]:
            slot, begin = lax.rem(first + k, depth), k * tiles.step
            scales = [
                [scales_of(h, (begin + g) // fmt.group, out) if fmt.grouped else None for g in groups] for h in heads
            ]
            plgpu.barrier_wait(full.at[slot])
            return [(load_integers(weights_of(slot, h), fmt), own) for h, own in zip(heads, scales, strict=True)]

        def multiply(k: Any, loaded: list[Any]) -> None:
            slot = lax.rem(first + k, depth)
            for i, (acc, (integers, scales)) in enumerate(zip(accs, loaded, strict=True)):
                for g, scale in zip(groups, scales, strict=True):
                    weights = operand(integers[:, g : g + group], scale, i)
                    plgpu.wgmma(acc, weights, x_ring.at[slot, my_rows, pl.ds(g, group)].T)
                    if widened is not None:
                        plgpu.wgmma_wait(0)

        def release(k: Any) -> None:
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(free.at[lax.rem(first + k, depth)])

        def stage(k: Any, loaded: list[Any]) -> list[Any]:
            multiply(k, loaded)
            following = load(k + 1)
            release(k)
            return following

        multiply(steps - 1, lax.fori_loop(0, steps - 1, stage, load(0)))
        release(steps - 1)

    # A consumer's partner is the other, or itself where its outputs are whole heads.
    alone = problem.rotary is not None and problem.rotary.head_dim == part
    trade = Trade(me, me if alone else 1 - me, part, traded, given, taken)

    def swap(result: jax.Array, i: int, chunks: int) -> list[jax.Array]:
        """Chunk ``i`` of this consumer's half of the rows, as gate and up: one its own, one from the other."""

        def in_order(a: jax.Array, b: jax.Array) -> list[jax.Array]:
            return lax.cond(me == 0, lambda: [a, b], lambda: [b, a])

        first, second = (result[:, j * tiles.chunk : (j + 1) * tiles.chunk] for j in (i, i + chunks))
        mine, theirs = in_order(first, second)
        trade.give(theirs, i)
        return in_order(mine, trade.take(i))

    def turn(t: Any, _: Any) -> None:
        row, out = tile(t)
        row = row + me * columns if tiles.by_rows else row
        first, my_out = done + t * stages, out + first_out
        # Fetched while products run.
        by = angles(refs, problem.rotary, my_out, row, (part, tiles.chunk)) if problem.rotary else None

        def scoped(*accs: Any) -> list[jax.Array]:
            (quantized if fmt.quantized else dense)(accs, first, out)
            return [acc[...] for acc in accs]

        results = pl.run_scoped(scoped, *accumulators)
        if fmt.quantized and not fmt.grouped:
            results = [
                result
                * broadcast_rows(
                    scale_column(refs["scale"], head * problem.out + out + first_out, 0, part), result.shape
                )
                for head, result in zip(heads, results, strict=True)
            ]
        behind = [lax.rem(first + steps + j, depth) for j in range(problem.behind(tiles))]
        for slot in behind:
            plgpu.barrier_wait(full.at[slot])
        chunks = columns // tiles.chunk // (2 if tiles.trade else 1)

        def write(i: int, value: jax.Array, copy: Callable[[Any], None]) -> None:
            """Bring chunk ``i`` into the order of memory, and ``copy`` it from there."""
            place = finished.at[i % 2, me]
            # The copy from this buffer is the last but one; after an odd number of chunks the last tile's is the last.
            plgpu.wait_smem_to_gmem(1 if i or chunks % 2 == 0 else 0, wait_read_only=True)
            place.T[...] = plgpu.layout_cast(value.astype(problem.out_dtype), plgpu.Layout.WGMMA_TRANSPOSED)
            plgpu.commit_smem()
            copy(place)

        def to_rows(i: int, place: Any) -> None:
            target = pl.ds(row + (me * chunks + i if tiles.trade else i) * tiles.chunk, tiles.chunk)
            plgpu.copy_smem_to_gmem(place, refs["out"].at[target, pl.ds(my_out, part)])

        if by is not None:
            sums = [results[0][:, i * tiles.chunk : (i + 1) * tiles.chunk] for i in range(chunks)]
            finish(refs, problem.rotary, sums, by, my_out, row, trade, write)
            return
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
            write(i, value, functools.partial(to_rows, i))
        if tiles.trade:
            trade.end(chunks)
        for slot in behind:
            plgpu.barrier_arrive(free.at[slot])

    lax.fori_loop(0, turns, turn, None)

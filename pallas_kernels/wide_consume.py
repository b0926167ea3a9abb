"""What the two multiplying warpgroups of a product for many rows do: `pallas_kernels.wide` has the launch."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.tiles import load_integers, scale_column, spread, widen
from pallas_kernels.wide_plan import CONSUMERS, Problem, WideTiles
from pallas_kernels.wide_rotary import look_up, put, turned

Refs = dict[str, Any]


def consume(me: Any, refs: Refs, problem: Problem, depth: int, turns: Any, done: Any, tile: Any, tiles: WideTiles, *,
            w_ring: Any, x_ring: Any, finished: Any, full: Any, free: Any, widened: Any = None, traded: Any = None,
            given: Any = None, taken: Any = None) -> None:  # fmt: skip
    """Multiply this consumer's half of every tile, and write it."""
    fmt, steps, stages = problem.fmt, problem.inner // tiles.step, problem.stages(tiles)
    part = tiles.part
    columns = tiles.rows // CONSUMERS if tiles.by_rows else tiles.rows
    first_out = 0 if tiles.by_rows or tiles.trade else me * part
    halves = [me] if tiles.trade else list(range(problem.halves))  # those that this consumer multiplies
    my_rows = pl.ds(me * columns, columns) if tiles.by_rows else pl.ds(0, columns)
    accumulators = [plgpu.ACC((part, columns), jnp.float32) for _ in halves]

    group = min(fmt.group or tiles.step, tiles.step)

    def weights_of(slot: Any, half: Any) -> Any:
        return w_ring.at[slot, pl.ds(half * tiles.out + first_out, part)]

    def scale(half: Any, column: Any, out: Any, shape: tuple[int, ...]) -> jax.Array:
        row = problem.scale_row(tiles, half, out) + first_out
        return spread(scale_column(refs["scale"], row, column, part), shape)

    def dense(accs: Any, first: Any, _out: Any) -> None:
        """Products of one stage stay in flight while the next is issued."""

        def stage(k: Any, _: Any) -> None:
            slot = lax.rem(first + k, depth)
            plgpu.barrier_wait(full.at[slot])
            for half, acc in zip(halves, accs, strict=True):
                plgpu.wgmma(acc, weights_of(slot, half), x_ring.at[slot, my_rows].T)
            plgpu.wgmma_wait(len(halves))

            @pl.when(k > 0)
            def _() -> None:
                plgpu.barrier_arrive(free.at[lax.rem(first + k - 1, depth)])

        lax.fori_loop(0, steps, stage, None)
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(free.at[lax.rem(first + steps - 1, depth)])

    def scaled(weights: jax.Array, i: int, half: Any, column: Any, out: Any) -> Any:
        """Weights of one group of inputs as wgmma's left operand. Scales of a group are applied here, before the
        rounding; scales of a row at the end."""
        if fmt.grouped:
            weights = (weights.astype(jnp.float32) * scale(half, column, out, weights.shape)).astype(problem.dtype)
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
            return [load_integers(weights_of(slot, half), fmt) for half in halves]

        def multiply(k: Any, integers: list[jax.Array]) -> None:
            slot = lax.rem(first + k, depth)
            for i, (half, acc) in enumerate(zip(halves, accs, strict=True)):
                floats = widen(integers[i], problem.dtype)
                for g in range(0, tiles.step, group):
                    column = (k * tiles.step + g) // fmt.group if fmt.grouped else 0
                    weights = scaled(floats[:, g : g + group], i, half, column, out)
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
        """Chunk ``i`` of this consumer's half of the rows, of both weight tiles: one its own, one from the other."""

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

    chunks = columns // tiles.chunk // (2 if tiles.trade else 1)
    first_row = me * chunks * tiles.chunk if tiles.by_rows or tiles.trade else 0
    writes = chunks * (2 if problem.rotary else 1)

    def turn(t: Any, _: Any) -> None:
        row, out = tile(t)
        row, first = row + first_row, done + t * stages

        def angles(i: int) -> Any:
            """What the chunk is turned by: fetched one ahead, the first of them while products run."""
            wanted = problem.rotary and i < chunks
            return look_up(refs, problem.rotary, out, row + i * tiles.chunk, tiles) if wanted else None

        def scoped(*accs: Any) -> list[jax.Array]:
            (quantized if fmt.quantized else dense)(accs, first, out)
            return [acc[...] for acc in accs]

        ahead = angles(0)
        results = pl.run_scoped(scoped, *accumulators)
        if fmt.quantized and not fmt.grouped:
            results = [result * scale(half, 0, out, result.shape) for half, result in zip(halves, results, strict=True)]
        behind = [lax.rem(first + steps + j, depth) for j in range(problem.behind(tiles))]
        for slot in behind:
            plgpu.barrier_wait(full.at[slot])
        for i in range(chunks):
            rows = pl.ds(i * tiles.chunk, tiles.chunk)
            here, ahead = ahead, angles(i + 1)
            if tiles.trade:
                values = swap(results[0], i, chunks)
            else:
                values = [result[:, i * tiles.chunk : (i + 1) * tiles.chunk] for result in results]
            if problem.swiglu:
                values = [values[0] / (1 + jnp.exp(-values[0])) * values[1]]
            if here is not None:
                values = turned(values, here)
            if behind:  # of these stages each consumer adds the one with its own outputs
                before = x_ring.at[lax.rem(first + steps + me, depth), rows].T
                before = plgpu.load(before, layout=plgpu.Layout.WGMMA_TRANSPOSED)
                values = [values[0] + plgpu.layout_cast(before, plgpu.Layout.WGMMA).astype(jnp.float32)]
            for half, value in enumerate(values):
                number = i * len(values) + half
                place = finished.at[number % 2, me]
                # What is copied from this buffer is the last but one; after an odd number of writes the last tile's is
                # the last.
                in_flight = problem.copies(tiles) if number or writes % 2 == 0 else 0
                plgpu.wait_smem_to_gmem(in_flight, wait_read_only=True)
                place.T[...] = plgpu.layout_cast(value.astype(problem.out_dtype), plgpu.Layout.WGMMA_TRANSPOSED)
                plgpu.commit_smem()
                if here is not None:
                    put(refs, problem.rotary, place, half, out, here)
                else:
                    target = pl.ds(row + i * tiles.chunk, tiles.chunk)
                    plgpu.copy_smem_to_gmem(place, refs["out"].at[target, pl.ds(out + first_out, part)])
        for i in range(min(2, chunks) if tiles.trade else 0):
            plgpu.barrier_wait(taken.at[2 * me + i])
        for slot in behind:
            plgpu.barrier_arrive(free.at[slot])

    lax.fori_loop(0, turns, turn, None)

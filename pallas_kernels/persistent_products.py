"""The product phases of a decode step as functions over tiles.

Every phase is: fill x into shared memory (all of it, or a chunk at a time), multiply the stages of weights that the
producer keeps coming, finish the sums of a tile. What x is and what becomes of the sums is in `persistent_ends`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.persistent_ends import Fill, Finish, batch_of, load
from pallas_kernels.persistent_layouts import outputs
from pallas_kernels.persistent_plan import ROWS, Plan, Product
from pallas_kernels.ring import claim, my_stages
from pallas_kernels.tiles import WGMMA_ROWS, load_integers, scale_column, spread, widen

Refs = dict[str, Any]


def first_row(p: Product, block: Any) -> Any:
    """Where this block's strip begins. The last is moved up where it would pass the end: two blocks then write the
    same values there, which is why no phase changes its input in place."""
    return pl.multiple_of(jnp.minimum(block * p.strip, p.out - p.strip), 8)


def steps_of(p: Product, block: Any, steps: int) -> Any:
    """``steps``, or none for a block that is left without a strip."""
    return jnp.where(block * p.strip < p.out, steps, 0)


def stream(p: Product, weight: Any, plan: Plan, block: Any, count: Any, smem: Refs) -> Any:
    """The producer's part: copy this block's weights into the ring, in the order in which `multiply` takes them.

    ``count`` stages went before; it does not wait for other blocks, so that the ring fills during a barrier too."""
    row = first_row(p, block)
    for offset, rows in p.tiles():
        for half in range(p.halves):

            def stage(k: Any, count: Any, first: Any = half * p.out + row + offset, rows: int = rows) -> Any:
                slot = claim(count, plan.depth, smem["free"])
                source = weight.at[pl.ds(pl.multiple_of(first, 8), rows), pl.ds(k * p.step, p.step)]
                plgpu.copy_gmem_to_smem(source, smem["ring"].at[slot, pl.ds(0, rows)], smem["full"].at[slot])
                return count + 1

            count = lax.fori_loop(0, steps_of(p, block, p.inner // p.step), stage, count)
    return count


def product(p: Product, scales: Any, fill: Fill, finish: Finish, plan: Plan, block: Any, me: Any, count: Any,
            smem: Refs) -> Any:  # fmt: skip
    """The consumers' part: x · weightᵀ over this block's strip, tile by tile, in one fixed order of sums."""
    row, chunks = first_row(p, block), list(p.chunks())
    tiles = list(p.tiles())

    def fill_chunk(chunk: tuple[int, int]) -> None:
        start, steps = chunk

        def put(i: Any, _: Any) -> None:
            step = (i * plan.tiles.consumers + me) * batch

            @pl.when(step < steps)
            def _() -> None:
                values = fill(start + step, batch)
                for j in range(batch):
                    smem["x"][step + j] = values[:, j * p.step : (j + 1) * p.step]

        batch = batch_of(steps, p.step)
        together(plan, smem)  # the last readers of x, or of what shares its place, are done
        lax.fori_loop(0, -(-steps // batch // plan.tiles.consumers), put, None)
        plgpu.commit_smem()
        together(plan, smem)

    if len(chunks) == 1:
        fill_chunk(chunks[0])
    for offset, rows in tiles:
        halves = []
        for half in range(p.halves):
            out = half * p.out + row + offset
            before = (lambda _: None) if len(chunks) == 1 else fill_chunk
            total, count = multiply(p, scales, out, before, plan, block, me, count, smem)
            halves.append(add_up(total, half, rows, plan, me, smem))

        @pl.when((me == plan.tiles.consumers - 1) & (block * p.strip < p.out))
        def _(offset: int = offset, rows: int = rows, halves: list[Any] = halves) -> None:
            finish(row + offset, rows, [load() for load in halves])

    return count


def multiply(p: Product, scales: Any, out: Any, before: Callable[[tuple[int, int]], None], plan: Plan, block: Any,
             me: Any, count: Any, smem: Refs) -> tuple[jax.Array, Any]:  # fmt: skip
    """This consumer's share of a tile's sums [64, 8], and the count after the tile's stages."""
    fmt = plan.shape.fmt

    def each(steps: int, count: Any, stage: Callable[[Any, Any, Any], Any], carry: Any) -> Any:
        """Fold ``stage(step, slot, carry)`` over the stages of a chunk that are this consumer's."""
        mine = steps_of(p, block, steps)
        return my_stages(me, plan.tiles.consumers, count, mine, plan.depth, smem["full"], smem["free"], stage, carry)

    accumulator = plgpu.ACC((WGMMA_ROWS, ROWS), jnp.float32)

    def one_scale_a_row(acc: Any) -> jax.Array:
        def stage(step: Any, slot: Any, carry: Any) -> Any:
            plgpu.wgmma(acc, operand(slot, plan, me, smem), smem["x"].at[step].T)
            plgpu.wgmma_wait(0)
            return carry

        for chunk, done in passes:
            before(chunk)
            each(chunk[1], count + done, stage, None)
        return acc[...]

    def one_scale_a_group() -> jax.Array:
        groups = p.step // fmt.group

        def stage(step: Any, slot: Any, total: Any, start: int) -> Any:
            weights = operand(slot, plan, me, smem)
            for g in range(groups):
                inputs = slice(g * fmt.group, (g + 1) * fmt.group)

                def part(acc: Any, inputs: slice = inputs) -> jax.Array:
                    a = weights.at[:, inputs] if "widened" in smem else weights[:, inputs]
                    plgpu.wgmma(acc, a, smem["x"].at[step, :, inputs].T)
                    plgpu.wgmma_wait(0)
                    return acc[...]

                scale = scale_column(scales, out, (start + step) * groups + g, WGMMA_ROWS)
                total = total + pl.run_scoped(part, accumulator) * spread(scale, (WGMMA_ROWS, ROWS))
            return total

        total = plgpu.layout_cast(jnp.zeros((WGMMA_ROWS, ROWS), jnp.float32), plgpu.Layout.WGMMA)
        for chunk, done in passes:
            before(chunk)
            total = each(chunk[1], count + done, functools.partial(stage, start=chunk[0]), total)
        return total

    passes, steps = [], 0
    for chunk in p.chunks():
        passes.append((chunk, steps_of(p, block, steps) if steps else 0))
        steps += chunk[1]
    total = one_scale_a_group() if fmt.grouped else pl.run_scoped(one_scale_a_row, accumulator)
    return total, count + steps_of(p, block, steps)


def operand(slot: Any, plan: Plan, me: Any, smem: Refs) -> Any:
    """A stage of weights as wgmma's left operand: where it lies, or widened in registers."""
    weights = smem["ring"].at[slot]
    if not plan.shape.fmt.quantized:
        return weights
    if "widened" not in smem:
        return widen(load_integers(weights, plan.shape.fmt), jnp.bfloat16)
    # The interpreter has no wgmma with an operand in registers.
    smem["widened"][me] = weights[...].astype(jnp.bfloat16)
    plgpu.commit_smem()
    return smem["widened"].at[me]


def add_up(total: jax.Array, half: int, rows: int, plan: Plan, me: Any, smem: Refs) -> Callable[[], jax.Array]:
    """Add the consumers' shares in the order of the consumers; the last gets how to load the sum as [8, rows]."""
    last = plan.tiles.consumers - 1
    if last:

        @pl.when(me < last)
        def _() -> None:
            smem["shares"][me] = total
            plgpu.barrier_arrive(smem["shared"])
            plgpu.barrier_wait(smem["taken"])

    @pl.when(me == last)
    def _() -> None:
        whole = total
        if last:
            plgpu.barrier_wait(smem["shared"])
            for other in range(last):
                whole = whole + plgpu.load(smem["shares"].at[other], layout=plgpu.Layout.WGMMA)
            plgpu.barrier_arrive(smem["taken"])
        # From here on a token's outputs are neighbours.
        smem["sums"].at[half].T[...] = plgpu.layout_cast(whole, plgpu.Layout.WGMMA_TRANSPOSED)

    return lambda: load(smem["sums"].at[half, :, pl.ds(0, rows)], outputs())


def together(plan: Plan, smem: Refs) -> None:
    """All consumers of the block meet here."""
    plgpu.barrier_arrive(smem["together"])
    plgpu.barrier_wait(smem["together"])

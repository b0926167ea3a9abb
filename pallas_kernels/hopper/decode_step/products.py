"""The product phases of a decode step as functions over tiles.

Every phase is: fill x into shared memory (all of it, or a chunk at a time), multiply the stages of weights that the
producer keeps coming, add up what the consumers have, finish. What x is and what becomes of the sums is in
`persistent_ends`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..common import ring
from ..common.limbs import INT4_FACTOR, load_int4_as_int8
from ..common.ring import acquire, consumer_barrier, fold_own_stages
from ..common.thread_ops import WARPGROUP_SIZE, load_per_thread, store_per_thread
from ..common.tiles import WGMMA_ROWS
from .plan import BLOCK, ROW_UNIT, TAKING_TURNS, Plan, Product
from .prologues import Fill, Finish, units_of
from .thread_ops import SUMS, fold, put_row, put_sums, scale_rows

Refs = dict[str, Any]


def first_row(p: Product, block: Any) -> Any:
    """Where this block's strip begins. The last is moved up where it would pass the end: two blocks then write the
    same values there, which is why no phase changes its input in place."""
    return pl.multiple_of(jnp.minimum(block * p.strip, p.out - p.strip), 8)


def steps_of(p: Product, block: Any, steps: int) -> Any:
    """``steps``, or none for a block that is left without a strip."""
    return jnp.where(block * p.strip < p.out, steps, 0)


# The producer


def stream(name: str, weight: Any, scales: Any, uses: Any, plan: Plan, block: Any, count: Any, smem: Refs) -> Any:
    """Copy this block's weights into the ring, in the order in which `multiply` takes them.

    ``count`` stages went before; it does not wait for other blocks, so that the ring fills during a barrier too."""
    p = plan.products[name]
    strip = first_row(p, block)
    if plan.shape.fmt.grouped:
        fetch_scales(name, scales, uses, plan, block, smem)
    for first, steps in p.chunks():
        for tile in range(p.tiles):
            pieces = list(p.pieces(tile))

            def stage(k: Any, count: Any, pieces: Any = pieces, first: int = first) -> Any:
                slot = acquire(count, plan.depth, smem["free"])
                for piece in pieces:
                    # A range with a step less than the others ends with any weights: x is zero there.
                    step = jnp.minimum(piece.cut * p.cut_steps + first + k, p.inner // p.step - 1)
                    rows = pl.ds(pl.multiple_of(piece.half * p.out + strip + piece.row, 8), piece.rows)
                    source = weight.at[rows, pl.ds(step * p.step, p.step)]
                    target = smem["ring"].at[slot, pl.ds(piece.place, piece.rows)]
                    plgpu.copy_gmem_to_smem(source, target, smem["full"].at[slot])
                for _ in range(plan.most_pieces - len(pieces)):
                    plgpu.barrier_arrive(smem["full"].at[slot])
                return count + 1

            count = lax.fori_loop(0, steps_of(p, block, steps), stage, count)
    return count


def fetch_scales(name: str, scales: Any, uses: Any, plan: Plan, block: Any, smem: Refs) -> None:
    """The scales of a whole phase at once. Two phases take turns, so that this may run a phase ahead; ``uses`` is how
    often this phase's place was filled before."""
    p, turn = plan.products[name], turn_of(name)
    strip = first_row(p, block)

    @pl.when(uses > 0)
    def _() -> None:
        plgpu.barrier_wait(smem["scales_free"].at[turn])

    # Blocks that are left without a strip take part: otherwise each would have its own count of uses.
    for half in range(p.halves):
        rows = pl.ds((half * p.out + strip) // 8, p.strip // 8)
        target = smem[f"scales_{name}"].at[half, pl.ds(0, p.strip // 8)]
        plgpu.copy_gmem_to_smem(scales.at[rows], target, smem["scales_full"].at[turn])
    for _ in range(2 - p.halves):
        plgpu.barrier_arrive(smem["scales_full"].at[turn])


def turn_of(name: str) -> int:
    """Which of the two places for scales a phase uses."""
    return next(i for i, names in enumerate(TAKING_TURNS) if name in names)


def drain(plan: Plan, count: Any, names: tuple[str, ...], smem: Refs) -> None:
    """Wait for the last stages, and scales of ``names``, to be used: a barrier's every completion must be awaited
    before the block ends."""
    ring.drain(count, plan.depth, smem["free"])
    if plan.shape.fmt.grouped:
        for turn in {turn_of(name) for name in names}:
            plgpu.barrier_wait(smem["scales_free"].at[turn])


# The consumers


def product(name: str, scales: Any, fill: Fill, finish: Finish, plan: Plan, block: Any, me: Any, count: Any,
            smem: Refs) -> Callable[[], Any]:  # fmt: skip
    """The consumers' part: x · weightᵀ over this block's strip, in one fixed order of sums. What can be read before
    the phase begins is read now; the rest is in the function that is returned, which gives the new count."""
    p, shape = plan.products[name], plan.shape
    mine = share_of(p, plan)
    row = pl.multiple_of(jnp.minimum(me * mine, p.strip - mine), 8)
    outer = pl.multiple_of(first_row(p, block) + row, 8)
    pieces = [(at, min(WARPGROUP_SIZE, mine - at)) for at in range(0, mine, WARPGROUP_SIZE)]
    by_row = shape.fmt.quantized and not shape.fmt.grouped

    def scales_of(at: int, some: int) -> list[jax.Array]:
        return [load_per_thread(plan, scales.at[:, 0], half * p.out + outer + at, some) for half in range(p.halves)]

    row_scales = [scales_of(*piece) if by_row else None for piece in pieces]
    if finish.residual is not None:  # the phase before did not write it; what is not needed yet lies beside
        each = [(token, at, some) for token in range(shape.rows) for at, some in pieces]
        before = [load_per_thread(plan, finish.residual.at[token], outer + at, some) for token, at, some in each]
        for (token, at, some), values in zip(each, before, strict=True):
            store_per_thread(plan, smem["residual"].at[me, token], at, values, some)

    def run() -> Any:
        after = multiply(name, fill, plan, block, me, count, smem)
        with jax.named_scope("together"):
            consumer_barrier(smem["together"])

        def whole(token: Any, half: int, at: int, some: int) -> jax.Array:
            """The consumers' shares and the cuts, in their order."""
            parts = [
                load_per_thread(
                    plan, smem["sums"][name].at[other, token], (half * p.cuts + cut) * p.strip + row + at, some
                )
                for other in range(plan.tiles.consumers)
                for cut in range(p.cuts)
            ]
            return functools.reduce(jnp.add, parts)

        def finished(token: Any, _: Any) -> None:
            for piece, factors in zip(pieces, row_scales, strict=True):
                sums = [whole(token, half, *piece) for half in range(p.halves)]
                if factors is not None:
                    sums = [a * b for a, b in zip(sums, factors, strict=True)]
                residual = None
                if finish.residual is not None:
                    residual = load_per_thread(plan, smem["residual"].at[me, token], *piece).astype(jnp.float32)
                done = finish.combine(sums, residual)
                store_per_thread(plan, finish.out.at[token], outer + piece[0], done.astype(finish.out.dtype), piece[1])

        pl.when(block * p.strip < p.out)(lambda: loop(shape.rows, finished, None))
        return after

    return run


def share_of(p: Product, plan: Plan) -> int:
    """Outputs of a strip that one consumer finishes. The last consumers' may overlap: they write the same values."""
    return 8 * -(-p.strip // 8 // plan.tiles.consumers)


def multiply(name: str, fill: Fill, plan: Plan, block: Any, me: Any, count: Any, smem: Refs) -> Any:
    """Put this consumer's share of the sums of the strip into shared memory; returns the count after all stages.

    Consumers share the tokens of x, or the columns of a single one."""
    p, fmt, consumers = plan.products[name], plan.shape.fmt, plan.tiles.consumers
    chunks, tile_sums = len(list(p.chunks())), integer_tile if fmt.quantized else float_tile

    def each(steps: Any, count: Any, stage: Callable[[Any, Any, Any], Any], carry: Any) -> Any:
        """Fold ``stage(step, slot, carry)`` over the stages of a tile that are this consumer's."""
        mine = steps_of(p, block, steps)
        release = not in_registers(plan)
        return fold_own_stages(
            me, consumers, count, mine, plan.depth, smem["full"], smem["free"], stage, carry, release=release
        )

    def chunk(index: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        count, fetched = carry
        first = index * p.held_steps
        steps = jnp.minimum(p.cut_steps - first, p.held_steps)
        if chunks > 1:
            # Not before the first: whoever read what is there is through, or this phase had not begun.
            pl.when(index > 0)(lambda: consumer_barrier(smem["together"]))
        with jax.named_scope("fill"):
            if lone:
                put_units(name, fill.make(fetched), 0, plan, me, smem)
            else:
                put_tokens(name, fill, first, plan, me, smem)
            plgpu.commit_smem()
            consumer_barrier(smem["together"])
        if lone and chunks > 1:  # the next chunk's x is on its way meanwhile
            fetched = fill.fetch(0, jnp.minimum(index + 1, chunks - 1) * p.held_steps)

        def tile(number: Any, count: Any) -> Any:
            tile_sums(name, plan, number, index, functools.partial(each, steps, count), me, smem)
            return count + steps_of(p, block, steps)

        with jax.named_scope("multiply"):
            return loop(p.tiles, tile, count), fetched

    lone = plan.shape.rows == 1
    if fmt.grouped:
        plgpu.barrier_wait(smem["scales_full"].at[turn_of(name)])
    count, _ = loop(chunks, chunk, (count, fill.fetch(0, 0) if lone else None))
    if fmt.grouped:
        plgpu.commit_smem()  # ordinary reads of scales are over before TMA writes others there
        plgpu.barrier_arrive(smem["scales_free"].at[turn_of(name)])
    return count


def put_tokens(name: str, fill: Fill, first: Any, plan: Plan, me: Any, smem: Refs) -> None:
    """Put this consumer's tokens into shared memory; each is fetched while the one before is made."""
    rows, consumers = plan.shape.rows, plan.tiles.consumers

    def token(i: Any, fetched: Any) -> Any:
        row = me + i * consumers
        ahead = fill.fetch(jnp.minimum(row + consumers, rows - 1), first)
        put_units(name, fill.make(fetched), row, plan, me, smem)
        return ahead

    lax.fori_loop(0, (rows - me + consumers - 1) // consumers, token, fill.fetch(jnp.minimum(me, rows - 1), first))


def put_units(name: str, values: list[jax.Array], row: Any, plan: Plan, me: Any, smem: Refs) -> None:
    """Put this consumer's units of a token into shared memory."""
    p = plan.products[name]
    for number, unit in zip(units_of(plan, p, me), values, strict=True):

        @pl.when(number < p.cuts * p.held_units)
        def _(number: Any = number, unit: jax.Array = unit) -> None:
            cut, at = lax.div(number, p.held_units), lax.rem(number, p.held_units)
            put_row(plan, p, smem["x"][name], smem["factors"][name], unit, cut, at * (ROW_UNIT // p.step), row)


def loop(times: int, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """A loop whose code is there once, or none where once is enough."""
    return body(jnp.int32(0), carry) if times == 1 else lax.fori_loop(0, times, body, carry)


def float_tile(name: str, plan: Plan, tile: Any, chunk: Any, each: Callable[..., Any], me: Any, smem: Refs) -> None:
    """Put a tile's sums into shared memory, of weights as they are."""
    p = plan.products[name]

    def scoped(sums: Any) -> jax.Array:
        def stage(step: Any, slot: Any, carry: Any) -> Any:
            plgpu.wgmma(sums, smem["ring"].at[slot], smem["x"][name].at[step].T)
            plgpu.wgmma_wait(0)
            return carry

        each(stage, None)
        return sums[...]

    total = pl.run_scoped(scoped, plgpu.ACC((WGMMA_ROWS, p.cuts * plan.shape.columns), jnp.float32))
    place = smem["sums"][name].at[me, :, pl.ds(pl.multiple_of(tile * WGMMA_ROWS, WGMMA_ROWS), WGMMA_ROWS)].T
    total = plgpu.layout_cast(own_columns(total, tile, p, plan), plgpu.Layout.WGMMA_TRANSPOSED)
    if len(list(p.chunks())) > 1:
        sofar = plgpu.load(place, layout=plgpu.Layout.WGMMA_TRANSPOSED, optimized=False)
        total = jnp.where(lax.broadcast(chunk, total.shape) > 0, total + sofar, total)
    place[...] = total


def integer_tile(name: str, plan: Plan, tile: Any, chunk: Any, each: Callable[..., Any], me: Any, smem: Refs) -> None:
    """Put a tile's sums into shared memory, of integer weights: whole numbers as long as weights and x each have one
    scale, a group's or a block's inputs. One scale a row of weights is for whoever finishes."""
    p, fmt = plan.products[name], plan.shape.fmt
    shape, inputs = (WGMMA_ROWS, p.cuts * plan.shape.columns), min(p.step, BLOCK, fmt.group or BLOCK)

    def stage(step: Any, slot: Any, total: Any) -> Any:
        weights = operand(slot, plan, me, smem)

        def scoped(*sums: Any) -> list[jax.Array]:
            for i, part in enumerate(sums):
                some = slice(i * inputs, (i + 1) * inputs)
                left = weights[:, some] if isinstance(weights, jax.Array) else weights.at[:, some]
                plgpu.wgmma(part, left, smem["x"][name].at[step, :, some].T)
            plgpu.wgmma_wait(0)
            return [part[...] for part in sums]

        for i, part in enumerate(pl.run_scoped(scoped, *[plgpu.ACC(shape, jnp.int32)] * (p.step // inputs))):
            group = (chunk * p.held_steps + step) * (p.step // inputs) + i
            scales = [scale_rows(plan, p, smem[f"scales_{name}"], tile, group)] if fmt.grouped else []
            factors = smem["factors"][name].at[(step * p.step + i * inputs) // BLOCK]
            total = fold(plan, p, part, factors, scales, tile, total)
        return total

    nothing = plgpu.layout_cast(jnp.zeros((WGMMA_ROWS, plan.shape.places), jnp.float32), SUMS)
    put_sums(plan, smem["sums"][name].at[me], each(stage, nothing), tile, chunk > 0)


def in_registers(plan: Plan) -> bool:
    """Whether weights are multiplied from registers, so that their slot is free as soon as they are there."""
    return plan.shape.fmt.quantized and plan.shape.fmt.bits == 4 and not plan.interpret


def operand(slot: Any, plan: Plan, me: Any, smem: Refs) -> Any:
    """A stage of integer weights as wgmma's left operand: bytes where they lie, 4 bits as bytes in registers."""
    weights = smem["ring"].at[slot]
    if plan.shape.fmt.bits == 8:
        return weights
    if in_registers(plan):
        taken = load_int4_as_int8(weights)
        plgpu.barrier_arrive(smem["free"].at[slot])  # the next stage may come while this one is multiplied
        return taken
    # The interpreter has no wgmma with an operand in registers.
    smem["in_bytes"][me] = weights[...].astype(jnp.int8) * INT4_FACTOR
    plgpu.commit_smem()
    return smem["in_bytes"].at[me]


def own_columns(total: jax.Array, tile: Any, p: Product, plan: Plan) -> jax.Array:
    """[64, columns] of [64, columns of all cuts]: each row's sums with the x of its own range of inputs."""
    columns = plan.shape.columns
    own = total[:, :columns]
    row = plgpu.broadcasted_iota(jnp.int32, own.shape, 0, layout=plgpu.Layout.WGMMA) + tile * WGMMA_ROWS
    for cut in range(1, p.cuts):
        own = jnp.where(
            lax.rem(lax.div(row, p.strip), p.cuts) == cut, total[:, cut * columns : (cut + 1) * columns], own
        )
    return own

"""What the multiplying warpgroups of a product for few rows do with integer weights: sums are whole numbers.

A row of x has one scale for all inputs of a block's range (see `small_m_prologue`), so that sums need none
until a piece, or a group of the weights' scales, is done. `small_m` has the launch.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from ..common.limbs import INT4_FACTOR, load_int4_as_int8
from ..common.ring import consumer_barrier
from ..common.thread_ops import (
    SCALAR,
    WARPGROUP_SIZE,
    add,
    load_per_thread,
    mul,
    prefetch_cache_line,
    store_per_thread,
    volatile_thread_in_warpgroup,
)
from ..common.tiles import WGMMA_ROWS, Format, swizzled
from .small_m_plan import DIGITS, Plan, SkinnyTiles
from .small_m_prologue import WARPS, fill
from .small_m_sums import sums_of

CHUNK = 256  # 4-bit inputs that are made bytes at a time, while the products of the last so many run
LINE = 128  # bytes of a line of the cache


def scratch_of(fmt: Format, p: Plan, tiles: SkinnyTiles) -> dict[str, Any]:
    """Shared memory and barriers beside the ring of weights."""
    scratch = {
        "x": swizzled((p.cut_steps, p.columns, tiles.step), jnp.int8, min_slice=fmt.group),
        "sizes": plgpu.SMEM((p.rows, WARPS * tiles.consumers), jnp.int32),
        "factors": plgpu.SMEM((p.columns,), jnp.float32),
        "sums": plgpu.SMEM((tiles.consumers, p.columns, p.wgmma_rows), jnp.float32),
        "together": plgpu.Barrier(num_arrivals=tiles.consumers),
    }
    if p.interpret and fmt.bits == 4:
        scratch["in_bytes"] = swizzled((tiles.consumers, WGMMA_ROWS, tiles.step), jnp.int8, min_slice=fmt.group)
    return scratch


def consume_integers(me: Any, x_ref: Any, scales: Any, out_ref: Any, turns: Any, piece: Any, fmt: Format, p: Plan,
                     tiles: SkinnyTiles, *, w_ring: Any, full: Any, free: Any, **smem: Any) -> None:  # fmt: skip
    """Multiply the stages whose turn it is, then finish some of the outputs."""
    row, _, first, end = piece(0)  # the range of the inputs is the same for all pieces of a block
    prefetch(scales, row, fmt, p, tiles, me)
    with jax.named_scope("digits"):
        fill(x_ref, first * tiles.step, end * tiles.step, fmt, p, tiles, me, smem)

    def multiply(step: Any, slot: Any, accs: list[Any], which: range) -> None:
        for tile, mine in zip(which, accs, strict=True):
            rows = w_ring.at[slot, pl.ds(p.tiles[tile], WGMMA_ROWS)]
            multiply_tile(rows, smem["x"].at[step - first], mine, fmt, p, tiles, smem.get("in_bytes"), me)
        plgpu.wgmma_wait(0)

    def turn(t: Any, count: Any) -> Any:
        row, cut, start, end = piece(t)
        pl.when(t + 1 < turns)(lambda: prefetch(scales, piece(t + 1)[0], fmt, p, tiles, me))
        # Loaded now, for the end: what comes from memory takes as long as several stages.
        row_scales = (
            None if fmt.grouped else [load_per_thread(p, scales.at[:, 0], row + at, n) for at, n in pieces_of(p)]
        )
        here, groups = (row, cut, start, end), scales if fmt.grouped else None
        totals = sums_of(here, count, me, groups, multiply, fmt, p, tiles, jnp.int32, full=full, free=free)
        for tile, total in zip(p.tiles, totals, strict=True):
            put_tile(smem["sums"].at[me, :, pl.ds(tile, WGMMA_ROWS)], total, smem["factors"], p)
        consumer_barrier(smem["together"])
        finish(out_ref if p.direct else out_ref.at[cut], smem["sums"], row, row_scales, me, p, tiles)
        pl.when(t + 1 < turns)(lambda: consumer_barrier(smem["together"]))  # sums may be written again
        return count + end - start

    lax.fori_loop(0, turns, turn, jnp.int32(0))


def prefetch(scales: Any, row: Any, fmt: Format, p: Plan, tiles: SkinnyTiles, me: Any) -> None:
    """Have the groups' scales of a strip brought near: a stage reads a few of each row, from memory at first."""
    if not fmt.grouped or p.interpret:
        return
    row_bytes = scales.shape[1] * scales.dtype.itemsize
    lines = math.ceil(p.strip * row_bytes / LINE) + 1

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR, SCALAR))
    def bring(_: Any, scales: Any, row: Any, me: Any) -> None:
        threads = WARPGROUP_SIZE * tiles.consumers
        begin = mul(row.registers.item(), row_bytes)
        thread = add(mul(me.registers.item(), WARPGROUP_SIZE), volatile_thread_in_warpgroup())
        for first in range(0, lines, threads):
            byte = add(begin, mul(add(thread, first), LINE))
            prefetch_cache_line(
                scales, byte, arith.cmpi(arith.CmpIPredicate.ult, byte, add(begin, p.strip * row_bytes))
            )

    bring(scales, row, me)  # type: ignore[call-arg]


def multiply_tile(weights: Any, x: Any, accs: list[Any], fmt: Format, p: Plan, tiles: SkinnyTiles, held: Any,
                  me: Any) -> None:  # fmt: skip
    """accs[group] += 64 rows of a stage of weights times its inputs: bytes where they lie, 4 bits as bytes in
    registers."""
    group = min(fmt.group or tiles.step, tiles.step)
    chunk = tiles.step if fmt.bits == 8 else min(CHUNK, tiles.step)
    if held is not None:  # the interpreter has no wgmma with an operand in registers
        held[me] = weights[...].astype(jnp.int8) * INT4_FACTOR
        plgpu.commit_smem()
        weights = held.at[me]
    converted = fmt.bits == 4 and held is None
    for begin in range(0, tiles.step, chunk):
        some = load_int4_as_int8(weights.at[:, begin : begin + chunk]) if converted else None
        width = min(group, chunk)
        for g in range(0, chunk, width):
            inputs = slice(begin + g, begin + g + width)
            left = weights.at[:, inputs] if some is None else some[:, g : g + width]
            plgpu.wgmma(accs[(begin + g) // group], left, x.at[:, inputs].T)
        if converted:
            plgpu.wgmma_wait(chunk // width)  # the last chunk's registers are free
    if held is not None:
        plgpu.wgmma_wait(0)


def put_tile(sums: Any, total: jax.Array, factors: Any, p: Plan) -> None:
    """Write a tile's sums [64, columns] to ``sums`` [columns, 64], times what the digits are worth."""
    worth = plgpu.load(factors, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
    total = total * lax.broadcast_in_dim(worth, total.shape, (1,))
    sums.T[...] = plgpu.layout_cast(total, plgpu.Layout.WGMMA_TRANSPOSED)


def pieces_of(p: Plan) -> list[tuple[int, int]]:
    """First outputs and sizes of the pieces of a strip in which every thread has one."""
    return [(at, min(WARPGROUP_SIZE, p.strip - at)) for at in range(0, p.strip, WARPGROUP_SIZE)]


def finish(out_ref: Any, sums: Any, row: Any, row_scales: list[jax.Array] | None, me: Any, p: Plan,
           tiles: SkinnyTiles) -> None:  # fmt: skip
    """Add up the consumers' sums and the digits, in their order, and write rows of the result. Rows and pieces of
    the strip are dealt out to the consumers."""
    consumers = tiles.consumers
    for number, (at, n) in enumerate(pieces_of(p)):
        first = lax.rem(me + consumers - number % consumers, consumers)

        def finished(turn: Any, _: Any, number: int = number, at: int = at, n: int = n, first: Any = first) -> None:
            token = first + turn * consumers
            columns = [p.column(digit, token) for digit in range(DIGITS)]
            places = [sums.at[other, column] for other in range(consumers) for column in columns]
            total = functools.reduce(jnp.add, [load_per_thread(p, place, p.shift(row) + at, n) for place in places])
            total = total if row_scales is None else total * row_scales[number]
            store_per_thread(p, out_ref.at[token], row + at, total.astype(out_ref.dtype), n)

        lax.fori_loop(0, (p.rows - first + consumers - 1) // consumers, finished, None)

"""What the multiplying warpgroups of a product for few rows do with integer weights: x becomes digits, and sums whole
numbers.

Every block makes the digits of its range of the inputs itself while its ring fills, and keeps them. A row of x has one
scale for all of them, so that sums need none until a piece, or a group of the weights' scales, is done.
`pallas_kernels.skinny` has the launch.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.fragmented_array import FragmentedArray
from jax.experimental.mosaic.gpu.utils import c
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith, memref

from pallas_kernels.digits import (
    HALF_BYTE,
    digits_of,
    floats,
    in_bytes,
    largest_of,
    of_warp,
    powers_of,
    shifted,
    swizzled_store,
    worth_of,
    write_digits,
)
from pallas_kernels.lanes import (
    LANES,
    SCALAR,
    aligned_load,
    least,
    minus,
    over,
    place,
    plus,
    prefetch_line,
    put_some,
    rest,
    some_of,
    thread_anew,
    thread_in_warpgroup,
    times,
)
from pallas_kernels.persistent_layouts import UNIT
from pallas_kernels.skinny_plan import Plan, SkinnyTiles
from pallas_kernels.skinny_sums import sums_of
from pallas_kernels.tiles import WGMMA_ROWS, Format, swizzled, transforms_of

CHUNK = 256  # 4-bit inputs that are made bytes at a time, while the products of the last so many run
WARPS = LANES // 32
LINE = 128  # bytes of a line of the cache
NEIGHBOURS = 8  # inputs that a thread takes at a time
MOST_VECTORS = 16  # of so many inputs that a thread fetches at a time


def scratch_of(fmt: Format, p: Plan, tiles: SkinnyTiles) -> dict[str, Any]:
    """Shared memory and barriers beside the ring of weights."""
    scratch = {
        "x": swizzled((p.cut_steps, p.columns, tiles.step), jnp.int8, run=fmt.group),
        "sizes": plgpu.SMEM((p.rows, WARPS * tiles.consumers), jnp.int32),
        "factors": plgpu.SMEM((p.columns,), jnp.float32),
        "sums": plgpu.SMEM((tiles.consumers, p.padded, p.wgmma_rows), jnp.float32),
        "together": plgpu.Barrier(num_arrivals=tiles.consumers),
    }
    if p.interpret and fmt.bits == 4:
        scratch["in_bytes"] = swizzled((tiles.consumers, WGMMA_ROWS, tiles.step), jnp.int8, run=fmt.group)
    return scratch


def consume_integers(me: Any, x_ref: Any, scales: Any, out_ref: Any, turns: Any, piece: Any, fmt: Format, p: Plan,
                     tiles: SkinnyTiles, *, w_ring: Any, full: Any, free: Any, **smem: Any) -> None:  # fmt: skip
    """Multiply the stages whose turn it is, then finish some of the outputs."""
    _, _, first, end = piece(0)  # the range of the inputs is the same for all pieces of a block
    prefetch(scales, piece(0)[0], fmt, p, tiles, me)
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
        outputs = Outputs(row, me, scales, fmt, p, tiles)
        totals = sums_of(
            (row, cut, start, end),
            count,
            me,
            scales if fmt.grouped else None,
            multiply,
            fmt,
            p,
            tiles,
            jnp.int32,
            full=full,
            free=free,
        )
        for tile, total in zip(p.tiles, totals, strict=True):
            put_tile(smem["sums"].at[me, :, pl.ds(tile, WGMMA_ROWS)], total, smem["factors"], p)
        together(smem)
        outputs.finish(out_ref if p.direct else out_ref.at[cut], smem["sums"])
        pl.when(t + 1 < turns)(lambda: together(smem))  # sums may be written again
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
        threads = LANES * tiles.consumers
        begin, thread = times(row.registers.item(), row_bytes), plus(times(me.registers.item(), LANES), thread_anew())
        for first in range(0, lines, threads):
            byte = plus(begin, times(plus(thread, first), LINE))
            prefetch_line(scales, byte, arith.cmpi(arith.CmpIPredicate.ult, byte, plus(begin, p.strip * row_bytes)))

    bring(scales, row, me)  # type: ignore[call-arg]


def multiply_tile(weights: Any, x: Any, accs: list[Any], fmt: Format, p: Plan, tiles: SkinnyTiles, held: Any,
                  me: Any) -> None:  # fmt: skip
    """accs[group] += 64 rows of a stage of weights times its inputs: bytes where they lie, 4 bits as bytes in
    registers."""
    group = min(fmt.group or tiles.step, tiles.step)
    chunk = tiles.step if fmt.bits == 8 else min(CHUNK, tiles.step)
    if held is not None:  # the interpreter has no wgmma with an operand in registers
        held[me] = weights[...].astype(jnp.int8) * HALF_BYTE
        plgpu.commit_smem()
        weights = held.at[me]
    converted = fmt.bits == 4 and held is None
    for begin in range(0, tiles.step, chunk):
        some = in_bytes(weights.at[:, begin : begin + chunk]) if converted else None
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
    """Write a tile's sums [64, columns] to ``sums`` [padded rows, 64], times what the digits are worth."""
    worth = plgpu.load(factors, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
    total = total * lax.broadcast_in_dim(worth, total.shape, (1,))
    if not p.apart:
        total = functools.reduce(jnp.add, [total[:, i * p.padded : (i + 1) * p.padded] for i in range(p.digits)])
    sums.T[...] = plgpu.layout_cast(total, plgpu.Layout.WGMMA_TRANSPOSED)


class Outputs:
    """The outputs of a strip, an output a thread. Rows and pieces of the strip are dealt out to the consumers."""

    def __init__(self, row: Any, me: Any, scales: Any, fmt: Format, p: Plan, tiles: SkinnyTiles) -> None:
        self.p, self.me, self.consumers = p, me, tiles.consumers
        self.within, self.outer = p.shift(row), row
        self.pieces = [(at, min(LANES, p.strip - at)) for at in range(0, p.strip, LANES)]
        # Loaded now, for the end: what comes from memory takes as long as several stages.
        self.scales = None if fmt.grouped else [some_of(p, scales.at[:, 0], row + at, n) for at, n in self.pieces]

    def finish(self, out_ref: Any, sums: Any) -> None:
        """Add up the consumers' sums and the digits that are apart, in their order, and write rows of the result."""
        p = self.p

        def finished(number: int, row: Any) -> None:
            at, n = self.pieces[number]
            columns = [p.column(digit, row) for digit in range(p.digits)] if p.apart else [row]
            places = [sums.at[other, column] for other in range(self.consumers) for column in columns]
            total = functools.reduce(jnp.add, [some_of(p, place, self.within + at, n) for place in places])
            total = total if self.scales is None else total * self.scales[number]
            put_some(p, out_ref.at[row], self.outer + at, total.astype(out_ref.dtype), n)

        for number in range(len(self.pieces)):
            first = lax.rem(self.me + self.consumers - number % self.consumers, self.consumers)

            def each(turn: Any, _: Any, number: int = number, first: Any = first) -> None:
                finished(number, first + turn * self.consumers)

            lax.fori_loop(0, (p.rows - first + self.consumers - 1) // self.consumers, each, None)


def together(smem: Any) -> None:
    """All consumers of the block meet here."""
    plgpu.barrier_arrive(smem["together"])
    plgpu.barrier_wait(smem["together"])


# x as digits


def fill(x_ref: Any, first: Any, last: Any, fmt: Format, p: Plan, tiles: SkinnyTiles, me: Any, smem: Any) -> None:
    """Put the digits of x [rows, inputs], from input ``first`` to ``last``, into shared memory, and into ``factors``
    what they are worth against these weights. Consumers share the inputs of a row; first they look for its largest."""
    if p.interpret:
        _fill_interpreted(x_ref, first, last, fmt, p, tiles, me, smem)
        plgpu.commit_smem()
        together(smem)
        return
    # Where a thread's inputs of a row begin, 8 at a time; the last of all once more where there are none left.
    count = math.ceil(p.cut_steps * tiles.step / NEIGHBOURS / LANES / tiles.consumers)
    parts = [(me + i * tiles.consumers, first, last) for i in range(count)]

    def fetch(row: Any) -> list[jax.Array]:
        return [_fetch(x_ref, row, *part) for part in parts]

    def put(row: Any, fetched: list[jax.Array]) -> None:
        _put(fetched, parts, row, fmt, p, tiles, smem)

    on_their_way = max(1, MOST_VECTORS // count)
    fetched = []
    for begin in range(0, p.rows, on_their_way):
        rows = range(begin, min(begin + on_their_way, p.rows))
        fetched = [fetch(row) for row in rows]
        for row, values in zip(rows, fetched, strict=True):
            _measure(values, row, me, smem["sizes"])
    together(smem)
    if p.rows == 1:
        put(0, fetched[0])
    else:

        def each(row: Any, fetched: Any) -> Any:
            ahead = fetch(jnp.minimum(row + 1, p.rows - 1))
            put(row, fetched)
            return ahead

        lax.fori_loop(0, p.rows, each, fetch(0))
    plgpu.commit_smem()
    together(smem)


def _begin(unit: Any, first: Any, last: Any) -> Any:
    """Where this thread's inputs of a unit of 1024 begin."""
    number = plus(times(unit, LANES), thread_in_warpgroup())
    return least(plus(first, times(number, NEIGHBOURS)), minus(last, NEIGHBOURS))


def _fetch(x_ref: Any, row: Any, unit: Any, first: Any, last: Any) -> jax.Array:
    """A unit's inputs of a row, 8 to a thread."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), *[SCALAR] * 4),
        return_type=plgpu.ShapeDtypeStruct((WARPS, 32, NEIGHBOURS), x_ref.dtype, layout=UNIT),
    )
    def load(_: Any, x_ref: Any, row: Any, unit: Any, first: Any, last: Any) -> Any:
        row, unit, first, last = (a.registers.item() for a in (row, unit, first, last))
        layout = UNIT.to_mgpu()
        registers = np.empty(layout.registers_shape((WARPS, 32, NEIGHBOURS)), dtype=object)
        registers[...] = aligned_load(x_ref, place(row, _begin(unit, first, last)), NEIGHBOURS)
        return FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return load(x_ref, row, unit, first, last)  # type: ignore[call-arg]


def _measure(values: list[jax.Array], row: Any, me: Any, sizes: Any) -> None:
    """Write the largest of a warp's inputs of a row to ``sizes`` [rows, warps]."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), (UNIT,) * len(values), SCALAR, SCALAR))
    def measure(_: Any, sizes: Any, values: Any, row: Any, me: Any) -> None:
        mine = [largest_of(floats(a.registers.item())) for a in values]
        warp = plus(times(me.registers.item(), WARPS), over(thread_in_warpgroup(), 32))
        # A warp's threads write the same.
        memref.store(of_warp(functools.reduce(arith.maxui, mine)), sizes, place(row.registers.item(), warp))

    measure(sizes, tuple(values), row, me)  # type: ignore[call-arg]


def _put(values: list[jax.Array], parts: list[tuple[Any, Any, Any]], row: Any, fmt: Format, p: Plan,
         tiles: SkinnyTiles, smem: Any) -> None:  # fmt: skip
    """Write a thread's inputs of a row as digits."""
    transforms = transforms_of(tiles.step, jnp.int8, fmt.group)
    units, first, last = [unit for unit, _, _ in parts], *parts[0][1:]
    refs = plgpu.RefType(transforms), plgpu.RefType(), plgpu.RefType()

    @plgpu.inline_mgpu(
        arg_types=(refs, (UNIT,) * len(values), (SCALAR,) * len(units), *[SCALAR] * 3),
    )
    def put(_: Any, refs: Any, values: Any, units: Any, row: Any, first: Any, last: Any) -> None:
        x, sizes, factors = refs
        row, first, last = (a.registers.item() for a in (row, first, last))
        all_sizes = [memref.load(sizes, place(row, warp)) for warp in range(WARPS * tiles.consumers)]
        scale, inverse = powers_of(functools.reduce(arith.maxui, all_sizes))

        def column(number: int) -> Any:
            return plus(row, p.column(number, 0))

        for unit, eight in zip(units, values, strict=True):
            own = minus(_begin(unit.registers.item(), first, last), first)
            slab = over(own, tiles.step)

            def write(number: int, within: Any, value: Any, slab: Any = slab) -> None:
                swizzled_store(value, x, transforms, 16, slab, column(number), within)

            whole = shifted(floats(eight.registers.item()), inverse, p.digits)
            write_digits(whole, p.digits, fmt.bits, rest(own, tiles.step), write)
        worth = worth_of(p.digits, fmt.bits)
        for number in range(p.digits):  # all threads write the same
            here = arith.mulf(scale, c(worth * 256 ** (p.digits - 1 - number), scale.type))
            memref.store(here, factors, place(column(number)))

    refs = smem["x"], smem["sizes"], smem["factors"]
    put(refs, tuple(values), tuple(units), row, first, last)  # type: ignore[call-arg]


def _fill_interpreted(x_ref: Any, first: Any, last: Any, fmt: Format, p: Plan, tiles: SkinnyTiles, me: Any,
                      smem: Any) -> None:  # fmt: skip
    def steps_of(row: int) -> list[jax.Array]:
        begins = [jnp.minimum(first + i * tiles.step, last - tiles.step) for i in range(p.cut_steps)]
        return [x_ref[row, pl.ds(begin, tiles.step)] for begin in begins]

    for row in range(p.rows):

        @pl.when(me == row % tiles.consumers)
        def _(row: int = row) -> None:
            digits, scale = digits_of(jnp.stack(steps_of(row)).reshape(1, -1), p.digits)
            worth = worth_of(p.digits, fmt.bits)
            for number, digit in enumerate(digits):
                column = p.column(number, row)
                smem["factors"][column] = scale[0] * (worth * 256 ** (p.digits - 1 - number))
                for i, some in enumerate(digit.reshape(p.cut_steps, tiles.step)):
                    smem["x"].at[i, column][...] = some

"""Products and epilogue of a medium-M GEMM with float weights. Accumulators have rows of x, so sums go from registers
to the result's rows."""

import contextlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.utils import bitcast, bitwidth, c, shfl_bfly, when
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from ..common.thread_ops import SCALAR, add, aligned_store, as_i32, as_indices, div, mul, rem, thread_in_warpgroup
from ..common.tiles import WGMMA_ROWS
from .medium_m_block import Block, WorkTile

CHUNK = 32  # columns that are finished at a time, because SwiGLU takes registers


def multiply_rows_first(block: Block, accs: Any, slot: Any) -> None:
    """Add the products of this consumer's rows of a stage's x to the accumulators, 64 rows each."""
    for i, acc in enumerate(accs):
        rows = pl.ds(block.first_row + i * WGMMA_ROWS, WGMMA_ROWS)
        plgpu.wgmma(acc, block.scratch.x_ring.at[slot, rows], block.scratch.w_ring.at[slot].T)


def write_rows_first(block: Block, tile: WorkTile, sums: list[jax.Array]) -> None:
    """Write the sums [64, n_tile] of this consumer's rows, after SwiGLU where it is asked for."""
    p = block.plan
    out = block.out.at[tile.k_split if p.k_splits > 1 else 0]
    for i, total in enumerate(sums):
        parts = _chunks(total[:, : p.n_out])
        if p.problem.swiglu:
            both = zip(parts, _chunks(total[:, p.n_out :]), strict=True)
            parts = [gate / (1 + jnp.exp(-gate)) * up for gate, up in both]
        _store(block, out, tile.out, i * WGMMA_ROWS, [part.astype(out.dtype) for part in parts])


def _chunks(total: jax.Array) -> list[jax.Array]:
    return [total[:, begin : begin + CHUNK] for begin in range(0, total.shape[1], CHUNK)]


def _store(block: Block, out: Any, first_out: Any, skipped: int, parts: list[jax.Array]) -> None:
    """Write neighbouring parts [64, columns] of the result, after the ``skipped`` first of this consumer's rows. Left
    out are rows past the result's end, and those that the consumer before this one has, too."""
    p, rows = block.plan, block.plan.problem.rows
    if p.interpret:
        values = jnp.concatenate(parts, axis=1)
        for me in range(p.consumers):
            begin = min(me * p.consumer_rows, p.x_rows - p.consumer_rows) + skipped
            first, n = max(begin, me * p.consumer_rows), min(begin + WGMMA_ROWS, rows)

            @pl.when(block.me == me)
            def _(begin: int = begin, first: int = first, n: int = n - first) -> None:
                if n > 0:
                    out[pl.ds(first, n), pl.ds(first_out, values.shape[1])] = values[first - begin :][:n]

        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *[SCALAR] * 3, (plgpu.Layout.WGMMA,) * len(parts)))
    def put(_: Any, out: Any, first_out: Any, first_row: Any, own: Any, parts: Any) -> None:
        first_out, first_row, own = (a.registers.item() for a in (first_out, first_row, own))
        warp, lane = div(thread_in_warpgroup(), 32), rem(thread_in_warpgroup(), 32)
        # In wgmma's layout a thread has the rows lane / 4 and lane / 4 + 8 of its warp's 16.
        row = add(first_row, add(mul(warp, 16), div(lane, 4)))
        by_row = zip(*[two for part in parts for two in part.registers.reshape(-1, 2)], strict=True)
        for at, registers in zip((row, add(row, 8)), by_row, strict=True):
            vectors = _widest(registers, rem(lane, 4))
            within = arith.cmpi(arith.CmpIPredicate.ult, at, as_i32(rows))
            inside = arith.andi(within, arith.cmpi(arith.CmpIPredicate.uge, at, own))
            with when(inside) if rows % p.consumer_rows else contextlib.nullcontext():
                row_index, column_index = as_indices(at, first_out)
                for (column, own_column), numbers in vectors:
                    place = arith.addi(arith.addi(column_index, own_column), c(column, column_index.type))
                    aligned_store(numbers, out, [row_index, place])

    own = block.me * p.consumer_rows
    put(out, first_out, block.first_row + skipped, own, tuple(parts))  # type: ignore[call-arg]


def _widest(registers: Sequence[Any], quad: Any) -> list[tuple[tuple[int, Any], Any]]:
    """What this thread writes of a row: its columns, as a constant and a number of its own, and a vector for each.

    ``registers`` are those of wgmma's layout: each has two neighbours of 8 columns, which lie in the four threads of a
    quad. Of two with 16-bit numbers a thread gets four neighbours, so that a quad writes 32 bytes."""
    pairs = len(registers) // 2 if bitwidth(registers[0].type) == 32 else 0
    odd = arith.cmpi(arith.CmpIPredicate.ne, rem(quad, 2), as_i32(0))
    [own] = as_indices(add(mul(rem(quad, 2), 8), mul(div(quad, 2), 4)))
    i32, vectors = ir.IntegerType.get_signless(32), []
    for i in range(pairs):
        pair = registers[2 * i : 2 * i + 2]
        # An even thread gets its neighbour's first two of the pair, an odd one the second two.
        first, second = (bitcast(two, i32) for two in pair)
        kept, sent = arith.select(odd, second, first), arith.select(odd, first, second)
        received = shfl_bfly(sent, 1)
        words = arith.select(odd, received, kept), arith.select(odd, kept, received)
        low, high = (bitcast(word, pair[0].type) for word in words)
        vectors.append(((16 * i, own), vector.shuffle(low, high, [0, 1, 2, 3])))
    [own] = as_indices(mul(quad, 2))
    vectors += [((8 * i, own), registers[i]) for i in range(2 * pairs, len(registers))]
    return vectors

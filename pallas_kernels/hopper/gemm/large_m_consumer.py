"""Consumers of a large-M GEMM: each multiplies its half of every tile and writes it."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..common.tiles import broadcast_rows, scale_column
from ..common.widen import load_integers, widen, widen_scaled
from .large_m_block import Block, PassWork
from .large_m_exchange import Exchange
from .large_m_plan import LargeMTiles
from .large_m_rotary import load_angles, rotary_epilogue


def consume(block: Block, work: PassWork) -> None:
    """Multiply this consumer's half of every tile of a pass, and write it."""
    problem, scratch, tiles, me = block.problem, block.scratch, work.tiles, block.me
    part, columns = tiles.consumer_out, tiles.consumer_rows
    products = Products(
        block=block,
        tiles=tiles,
        first_out=0 if tiles.split_rows or tiles.exchange else me * part,
        projections=[me] if tiles.exchange else list(range(problem.projections)),
        rows=pl.ds(me * columns, columns) if tiles.split_rows else pl.ds(0, columns),
    )
    # A consumer exchanges with the other, or with itself if its outputs are whole heads.
    alone = problem.rotary is not None and problem.rotary.head_dim == part
    exchange = Exchange(me, me if alone else 1 - me, part, scratch.exchanged, scratch.sent, scratch.received)
    stages = problem.stages(tiles)

    def turn(t: Any, _: Any) -> None:
        row, out = work.tile(t)
        row = row + me * columns if tiles.split_rows else row
        first, own_out = work.done + t * stages, out + products.first_out
        # Loaded before the products run, used after them.
        angles = None
        if problem.rotary:
            angles = load_angles(block.operands, problem.rotary, own_out, row, (part, tiles.chunk))
        epilogue = Epilogue(block, tiles, exchange, first, row, own_out)
        sums = products.sums(first, out)
        if angles is None:
            epilogue.write_all(sums)
        else:
            epilogue.rotate_and_write(sums[0], angles)

    lax.fori_loop(0, work.turns, turn, None)


@dataclass(frozen=True)
class Products:
    """The products of one consumer."""

    block: Block
    tiles: LargeMTiles
    first_out: Any  # of this consumer's outputs in a tile
    projections: list[Any]  # gate, up or both
    rows: Any  # of a stage of x

    @property
    def steps(self) -> int:
        """Stages of inputs of a tile."""
        return self.block.problem.inner // self.tiles.step

    @property
    def group(self) -> int:
        """Inputs of a stage that share a scale."""
        return min(self.block.problem.fmt.group or self.tiles.step, self.tiles.step)

    @property
    def packed(self) -> bool:
        """Whether 4-bit integers are widened and scaled by `widen_scaled`. The interpreter cannot run it."""
        fmt, scale = self.block.problem.fmt, self.block.operands.scale
        on_gpu = self.block.scratch.widened is None
        return on_gpu and fmt.bits == 4 and fmt.grouped and scale is not None and scale.dtype.itemsize == 2

    def sums(self, first: Any, out: Any) -> list[jax.Array]:
        """The sums of each projection [consumer_out, consumer_rows] for the tile at output ``out``, whose stages begin
        with number ``first``."""
        fmt = self.block.problem.fmt

        def scoped(*accs: Any) -> list[jax.Array]:
            (self._multiply_integers if fmt.quantized else self._multiply_floats)(accs, first, out)
            return [acc[...] for acc in accs]

        shape = self.tiles.consumer_out, self.tiles.consumer_rows
        sums = pl.run_scoped(scoped, *[plgpu.ACC(shape, jnp.float32) for _ in self.projections])
        if fmt.quantized and not fmt.grouped:
            sums = [
                total * broadcast_rows(self._scales(projection, 0, out), total.shape)
                for projection, total in zip(self.projections, sums, strict=True)
            ]
        return sums

    def _weights(self, slot: Any, projection: Any) -> Any:
        first = projection * self.tiles.out + self.first_out
        return self.block.scratch.w_ring.at[slot, pl.ds(first, self.tiles.consumer_out)]

    def _scales(self, projection: Any, column: Any, out: Any) -> jax.Array:
        row = projection * self.block.problem.out + out + self.first_out
        return scale_column(self.block.operands.scale, row, column, self.tiles.consumer_out)

    def _multiply_floats(self, accs: Any, first: Any, _out: Any) -> None:
        """The products of one stage run while those of the next are issued."""
        scratch, depth = self.block.scratch, self.block.depth

        def stage(k: Any, _: Any) -> None:
            slot = lax.rem(first + k, depth)
            plgpu.barrier_wait(scratch.full.at[slot])
            for projection, acc in zip(self.projections, accs, strict=True):
                plgpu.wgmma(acc, self._weights(slot, projection), scratch.x_ring.at[slot, self.rows].T)
            plgpu.wgmma_wait(len(self.projections))

            @pl.when(k > 0)
            def _() -> None:
                plgpu.barrier_arrive(scratch.free.at[lax.rem(first + k - 1, depth)])

        lax.fori_loop(0, self.steps, stage, None)
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(scratch.free.at[lax.rem(first + self.steps - 1, depth)])

    def _multiply_integers(self, accs: Any, first: Any, out: Any) -> None:
        """The integers and group scales of the next stage are loaded while the products of this one run."""
        fmt, scratch, depth = self.block.problem.fmt, self.block.scratch, self.block.depth
        groups = range(0, self.tiles.step, self.group)

        def load(k: Any) -> list[Any]:
            slot, begin = lax.rem(first + k, depth), k * self.tiles.step
            scales = [
                [self._scales(p, (begin + g) // fmt.group, out) if fmt.grouped else None for g in groups]
                for p in self.projections
            ]
            plgpu.barrier_wait(scratch.full.at[slot])
            both = zip(self.projections, scales, strict=True)
            return [(load_integers(self._weights(slot, p), fmt), own) for p, own in both]

        def multiply(k: Any, loaded: list[Any]) -> None:
            slot = lax.rem(first + k, depth)
            for i, (acc, (integers, scales)) in enumerate(zip(accs, loaded, strict=True)):
                for g, scale in zip(groups, scales, strict=True):
                    weights = self._operand(integers[:, g : g + self.group], scale, i)
                    plgpu.wgmma(acc, weights, scratch.x_ring.at[slot, self.rows, pl.ds(g, self.group)].T)
                    if scratch.widened is not None:
                        plgpu.wgmma_wait(0)

        def release(k: Any) -> None:
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(scratch.free.at[lax.rem(first + k, depth)])

        def stage(k: Any, loaded: list[Any]) -> list[Any]:
            multiply(k, loaded)
            following = load(k + 1)
            release(k)
            return following

        multiply(self.steps - 1, lax.fori_loop(0, self.steps - 1, stage, load(0)))
        release(self.steps - 1)

    def _operand(self, integers: jax.Array, scale: Any, i: int) -> Any:
        """The weights of one group of inputs as wgmma's left operand.

        A group's scale is applied here, before the rounding. A row's scale is applied to the sums."""
        dtype, widened = self.block.problem.dtype, self.block.scratch.widened
        if scale is not None and self.packed:
            return widen_scaled(integers, scale, dtype)
        weights = widen(integers, dtype) if widened is None else integers.astype(dtype)
        if scale is not None:
            weights = (weights.astype(jnp.float32) * broadcast_rows(scale, weights.shape)).astype(dtype)
        if widened is None:
            return weights
        # What follows runs only in Pallas's interpreter, on a CPU. On a GPU, the tensor cores' instruction (wgmma)
        # reads these weights from registers. The interpreter's version reads only shared memory: write them there.
        part = self.tiles.consumer_out
        place = widened.at[self.block.me, pl.ds(i * part, part), pl.ds(0, self.group)]
        place[...] = weights
        plgpu.commit_smem()
        return place


@dataclass(frozen=True)
class Epilogue:
    """What one consumer does with the sums of one tile."""

    block: Block
    tiles: LargeMTiles
    exchange: Exchange
    first: Any  # number of the tile's first stage
    row: Any  # first row of this consumer
    out: Any  # its first output

    @property
    def chunks(self) -> int:
        """Chunks that this consumer writes."""
        return self.tiles.consumer_rows // self.tiles.chunk // (2 if self.tiles.exchange else 1)

    def rotate_and_write(self, sums: jax.Array, angles: tuple[jax.Array, jax.Array]) -> None:
        """The end of a QKV product."""
        rotary = self.block.problem.rotary
        assert rotary is not None
        chunks = [self._chunk(sums, i) for i in range(self.chunks)]
        operands = self.block.operands
        rotary_epilogue(operands, rotary, chunks, angles, self.out, self.row, self.exchange, self._write)

    def write_all(self, sums: list[jax.Array]) -> None:
        """Apply SwiGLU or add the residual, and write."""
        scratch, depth = self.block.scratch, self.block.depth
        problem, steps = self.block.problem, self.block.problem.inner // self.tiles.step
        residual = [lax.rem(self.first + steps + j, depth) for j in range(problem.residual_stages(self.tiles))]
        for slot in residual:
            plgpu.barrier_wait(scratch.full.at[slot])
        for i in range(self.chunks):
            rows = pl.ds(i * self.tiles.chunk, self.tiles.chunk)
            own = self._gate_and_up if self.tiles.exchange else self._own_chunks
            values = own(sums, i)
            value = values[0] / (1 + jnp.exp(-values[0])) * values[1] if problem.swiglu else values[0]
            if residual:  # each consumer adds the stage with its own outputs
                before = scratch.x_ring.at[lax.rem(self.first + steps + self.block.me, depth), rows].T
                before = plgpu.load(before, layout=plgpu.Layout.WGMMA_TRANSPOSED)
                value = value + plgpu.layout_cast(before, plgpu.Layout.WGMMA).astype(jnp.float32)
            self._write(i, value, functools.partial(self._to_rows, i))
        if self.tiles.exchange:
            self.exchange.finish(self.chunks)
        for slot in residual:
            plgpu.barrier_arrive(scratch.free.at[slot])

    def _chunk(self, sums: jax.Array, i: int) -> jax.Array:
        return sums[:, i * self.tiles.chunk : (i + 1) * self.tiles.chunk]

    def _own_chunks(self, sums: list[jax.Array], i: int) -> list[jax.Array]:
        return [self._chunk(total, i) for total in sums]

    def _gate_and_up(self, sums: list[jax.Array], i: int) -> list[jax.Array]:
        """Chunk ``i`` of this consumer's half of the rows: one projection is its own, the other is received."""
        me = self.block.me

        def in_order(a: jax.Array, b: jax.Array) -> list[jax.Array]:
            return lax.cond(me == 0, lambda: [a, b], lambda: [b, a])

        first, second = (self._chunk(sums[0], j) for j in (i, i + self.chunks))
        own, others = in_order(first, second)
        self.exchange.send(others, i)
        return in_order(own, self.exchange.receive(i))

    def _write(self, i: int, value: jax.Array, copy: Callable[[Any], None]) -> None:
        """Put chunk ``i`` into shared memory in the order of the result, and ``copy`` it from there."""
        place = self.block.scratch.finished.at[i % 2, self.block.me]
        # Two buffers alternate. The copy from this one is the last but one, so one copy may still be running. If the
        # number of chunks is odd, the first chunk of a tile reuses the buffer of the very last copy.
        running = 1 if i or self.chunks % 2 == 0 else 0
        plgpu.wait_smem_to_gmem(running, wait_read_only=True)
        value = value.astype(self.block.problem.out_dtype)
        place.T[...] = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()
        copy(place)

    def _to_rows(self, i: int, place: Any) -> None:
        chunk = self.block.me * self.chunks + i if self.tiles.exchange else i
        rows = pl.ds(self.row + chunk * self.tiles.chunk, self.tiles.chunk)
        plgpu.copy_smem_to_gmem(place, self.block.operands.out.at[rows, pl.ds(self.out, self.tiles.consumer_out)])

"""What the producer and the consumers of a large-M GEMM know in common: operands, shared memory, and the tiles."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from .large_m_plan import LargeMProblem, LargeMTiles, Pass

Ref = Any  # Pallas has no public type for a reference


@dataclass(frozen=True)
class Operands:
    """References to global memory. Those of operands that a product does not have are None."""

    x: Ref  # [rows, inner]
    w: Ref  # [projections * out, inner], of one layer
    out: Ref  # [rows, columns]
    scale: Ref = None  # [projections * out, groups], of one layer
    residual: Ref = None  # [rows, out]
    # A QKV product also has these.
    cache_layer: Ref = None  # [1]
    start: Ref = None  # [batch], cached tokens of each sequence; for a cache without pages
    places: Ref = None  # [rows / chunk, 2], see `large_m_cache.page_places`; for a cache with pages
    cos: Ref = None  # [head_dim, rows], see `large_m_rotary.tables`
    sin: Ref = None
    k: Ref = None  # [layers * batch * kv_heads, max_len, head_dim], or [layers * pages * kv_heads, size, head_dim]
    v: Ref = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scratch:
    """Shared memory and barriers of a block. Pallas lays them out in the order of the fields."""

    finished: Ref  # [2, consumers, chunk, consumer_out], results on their way to global memory
    free: Ref  # a barrier a stage: both consumers are done with it
    full: Ref  # a barrier a stage: its copies have arrived
    sent: Ref | None  # two barriers a consumer: a chunk of sums is in `exchanged`
    received: Ref | None  # two barriers a consumer: it has been read
    exchanged: Ref | None  # [consumers, 2 * consumer_out, chunk]
    w_ring: Ref  # [depth, projections * tile outputs, step]
    widened: Ref | None  # [consumers, projections * consumer_out, step], only for the interpreter
    x_ring: Ref  # [depth, tile rows, step]


@dataclass(frozen=True)
class Block:
    """One warpgroup of one block."""

    problem: LargeMProblem
    tiles: LargeMTiles
    passes: list[Pass]
    units: int  # blocks, or pairs of blocks
    depth: int  # stages of the ring
    me: Any  # index of this warpgroup
    unit: Any  # index of this block, or of its pair
    member: Any  # index of this block in its pair
    operands: Operands
    scratch: Scratch

    def each_pass(self, work: Callable[["PassWork"], None]) -> Any:
        """Do ``work`` for this block's tiles of every pass. Returns how many stages of the ring that took."""
        done = jnp.int32(0)
        for p in self.passes:
            turns = (p.count - self.unit + self.units - 1) // self.units
            work(PassWork(p.tiles, turns, done, functools.partial(self._tile, p)))
            done += turns * self.problem.stages(self.tiles)
        return done

    def _tile(self, p: Pass, turn: Any) -> tuple[Any, Any]:
        """First row and first output of the tile that this block computes at this turn of a pass."""
        size = self.tiles.cluster
        grid = (self.problem.rows // self.tiles.rows, self.problem.out // self.tiles.out // size)
        index = p.first + turn * self.units + self.unit
        row, out = plgpu.planar_snake(index // p.row_splits, grid, 0, min(self.tiles.band, grid[0]))
        first_row = row * self.tiles.rows + lax.rem(index, p.row_splits) * p.tiles.rows
        return first_row, (out * size + self.member) * self.tiles.out


@dataclass(frozen=True)
class PassWork:
    """This block's tiles of one pass."""

    tiles: LargeMTiles
    turns: Any  # how many
    done: Any  # stages of the ring before them
    tile: Callable[[Any], tuple[Any, Any]]  # of a turn: first row and first output

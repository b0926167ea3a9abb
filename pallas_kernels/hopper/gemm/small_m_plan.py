"""How a small-M GEMM is divided among the multiprocessors: plain arithmetic, no kernel.

A work tile is an N tile (a range of output rows of the weight) over one K split (a range of the inputs). The plan is
found by trying all candidates against a cost model of the busiest block. The constants of the model were fitted to
measurements on one H200.
"""

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from ...arch import planned
from ..common.tiles import WGMMA_ROWS, Format, nbytes

# Costs, in bytes of a block's share of the memory bandwidth.
WORK_TILE_COST = 20_000  # to finish a work tile
FUSION_COST = 53_000  # the XLA fusion after a kernel that leaves K splits: a launch, and all sums once more
MULTIPLY_COST = {4: 0.63, 8: 0.9, 16: 0.2}  # a byte of weights of so many bits: widening an integer, and wgmma
LIMB_MULTIPLY_COST = {4: 0.25, 8: 0.19}  # the same where integers are multiplied as they are
L2_COST = 0.3  # a byte that comes from the L2 cache
ENOUGH_IN_FLIGHT = 48_000  # bytes that a block must have requested to keep its share of the memory busy

MIN_COLUMNS = 8  # of wgmma's right operand: up to so many cost the same
LIMBS = 3  # of an input in a small-M GEMM: see `limbs`
MAX_ROWS_AS_LIMBS = MIN_COLUMNS // LIMBS
SCRATCH_RESERVE = 4096  # bytes of shared memory for barriers, and for scratch that the compiler adds


@dataclass(frozen=True)
class SmallMTiles:
    """What can be tuned."""

    step: int  # inputs of a stage
    consumers: int  # warpgroups that multiply
    n_tile: int = 192  # output rows of a work tile, at most
    k_splits: int = 4  # at most
    depth: int = 16  # stages in flight, at most
    limbs: bool = False  # split inputs into int8 limbs; otherwise integer weights are widened to the inputs' dtype


def tiles_for(fmt: Format, out: int, inner: int, rows: int) -> SmallMTiles:
    """The measured choice for one H200."""
    long_steps = inner % 256 == 0
    if fmt.quantized and rows <= MAX_ROWS_AS_LIMBS and (fmt.group or 128) % 128 == 0:
        # A small N tile makes small stages, whose scales take as long to arrive, so more consumers wait at a time. It
        # also leaves registers for the accumulators of more consumers.
        wgmma_tiles = math.ceil(out / (WGMMA_ROWS * planned().sms))
        consumers = max(2, 5 - wgmma_tiles) if fmt.bits == 4 else 2
        step = max(256 if long_steps else 128, fmt.group or 1)
        return SmallMTiles(step=step, consumers=consumers, n_tile=256, k_splits=8, depth=24, limbs=True)
    if not fmt.quantized and rows <= MIN_COLUMNS:
        return SmallMTiles(step=128, consumers=3, n_tile=256)
    step = 256 if fmt.quantized and long_steps and rows <= 16 else 128
    return SmallMTiles(step=step, consumers=3 if fmt.bits == 4 and rows <= 16 else 2)


@dataclass(frozen=True)
class SmallMPlan:
    """`SmallMTiles` made concrete for one product: ``n_tiles * k_splits`` work tiles, dealt out to ``blocks``."""

    fmt: Format
    tiles: SmallMTiles
    out: int
    rows: int
    steps: int  # stages over all inputs
    n_tile: int
    n_tiles: int
    k_splits: int
    blocks: int
    depth: int
    interpret: bool = False

    @property
    def step(self) -> int:
        """Inputs of a stage."""
        return self.tiles.step

    @property
    def consumers(self) -> int:
        """Warpgroups that multiply."""
        return self.tiles.consumers

    @property
    def limbs(self) -> bool:
        """Whether inputs are split into limbs."""
        return self.tiles.limbs

    @property
    def padded(self) -> int:
        """Rows of x, rounded up to what wgmma takes."""
        return 8 * math.ceil(self.rows / 8)

    @property
    def columns(self) -> int:
        """Columns of wgmma's right operand: the rows of x, or their limbs."""
        return MIN_COLUMNS if self.limbs else self.padded

    def limb_column(self, limb: int, row: Any) -> Any:
        """The column that holds a limb of a row."""
        return limb * self.rows + row

    @property
    def split_steps(self) -> int:
        """Stages of a K split, at most."""
        return math.ceil(self.steps / self.k_splits)

    @property
    def group(self) -> int:
        """Inputs of a stage that share a scale."""
        return min(self.fmt.group or self.step, self.step)

    @property
    def stage_rows(self) -> int:
        """Rows of weights of a stage in shared memory: wgmma takes 64 at a time."""
        return max(self.n_tile, WGMMA_ROWS)

    @property
    def padded_stage_rows(self) -> int:
        """The same, rounded up to whole wgmma tiles."""
        return WGMMA_ROWS * math.ceil(self.stage_rows / WGMMA_ROWS)

    @property
    def wgmma_tiles(self) -> tuple[int, ...]:
        """First row of each wgmma tile of 64 rows. The last is moved up if it would pass the end of the N tile: some
        rows are then computed twice."""
        return tuple(min(i, self.stage_rows - WGMMA_ROWS) for i in range(0, self.n_tile, WGMMA_ROWS))

    def shift(self, row: Any) -> Any:
        """Where in a stage the N tile begins that starts at output ``row``. Scales are read for 64 rows at a time.
        Near the last output those rows must begin before a smaller N tile, so the tile lies further down."""
        if self.n_tile >= WGMMA_ROWS or self.out < WGMMA_ROWS:
            return 0
        return pl.multiple_of(jnp.maximum(row + WGMMA_ROWS - self.out, 0), 8)

    @property
    def direct(self) -> bool:
        """Whether the kernel writes finished results, not K splits for a fusion to add."""
        return self.k_splits == 1 and self.padded == 8


def plan(out: int, inner: int, rows: int, fmt: Format, tiles: SmallMTiles, sms: int) -> SmallMPlan:
    """The cheapest division of the work for ``sms`` multiprocessors."""
    n_tiles = range(8, min(tiles.n_tile, out) + 1, 8)
    k_splits = range(1, min(tiles.k_splits, inner // tiles.step, sms) + 1)
    candidates = (_candidate(out, inner, rows, fmt, tiles, sms, *c) for c in itertools.product(n_tiles, k_splits))
    return min((p for p in candidates if p.depth > 0), key=lambda p: _cost(p, sms))


def _candidate(
    out: int, inner: int, rows: int, fmt: Format, tiles: SmallMTiles, sms: int, n_tile: int, k_splits: int
) -> SmallMPlan:
    """The plan with these N tiles and K splits, and as many stages as shared memory has room for."""
    n_tiles = math.ceil(out / n_tile)
    # A block keeps the limbs of its inputs, so all of its work tiles must be of one K split.
    blocks = min(sms // k_splits * k_splits if tiles.limbs else sms, n_tiles * k_splits)
    p = SmallMPlan(fmt, tiles, out, rows, inner // tiles.step, n_tile, n_tiles, k_splits, blocks, depth=0)
    stage = nbytes((p.stage_rows, p.step), fmt.bits)
    if p.limbs:
        held = nbytes((p.split_steps * p.step, p.columns), 8)
        sums = nbytes((p.consumers, p.columns, p.padded_stage_rows), 32)
    else:
        held, stage = 0, stage + nbytes((p.columns, p.step), 16)
        buffers = max(1, p.consumers - 1) + (2 if k_splits == 1 else 0)
        sums = nbytes((buffers, p.stage_rows, p.columns), 32)
    room = planned().shared_bytes - SCRATCH_RESERVE - sums - held
    return replace(p, depth=min(tiles.depth, room // stage) // p.consumers * p.consumers)


def _cost(p: SmallMPlan, sms: int) -> float:
    """The bytes that the busiest block reads, and all other work expressed in bytes."""
    bits = p.fmt.bits
    turns = math.ceil(p.n_tiles * p.k_splits / p.blocks)
    multiplied = nbytes((WGMMA_ROWS * len(p.wgmma_tiles), p.step), 8)
    multiplied *= (LIMB_MULTIPLY_COST if p.limbs else MULTIPLY_COST)[bits]
    weights = max(nbytes((p.n_tile, p.step), bits), multiplied)  # copies and products overlap: the slower one counts
    activations = nbytes((p.padded, p.step), 16) * L2_COST
    stages_in_flight = p.depth - 1 if p.limbs else p.depth  # besides a stage that is being multiplied
    in_flight = stages_in_flight * nbytes((p.n_tile, p.step), bits)
    stage = weights + (0 if p.limbs else activations)
    reading = turns * p.split_steps * stage * max(1, ENOUGH_IN_FLIGHT / max(1, in_flight))
    once = p.split_steps * activations if p.limbs else 0
    fusion = 0 if p.direct else FUSION_COST + p.k_splits * nbytes((p.out, p.padded), 2 * 32) / sms
    return reading + once + turns * WORK_TILE_COST + fusion

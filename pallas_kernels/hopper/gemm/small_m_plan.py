"""How a product for few rows is cut into pieces for the multiprocessors: plain arithmetic, no kernel.

A piece is a strip of output rows over a range of the inputs. The plan is found by trying them all against a model of
what the busiest block has to do, whose constants were fitted to measurements on one H200.
"""

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from ...arch import planned
from ..common.tiles import WGMMA_ROWS, Format, nbytes

PIECE_COST = 20_000  # finishing a piece takes as long as so many bytes of a block's share of the bandwidth
FUSION_COST = 53_000  # likewise what follows the kernel where it leaves parts: a launch, and all sums once more
MULTIPLY_COST = {4: 0.63, 8: 0.9, 16: 0.2}  # likewise of a weight of so many bits: widening an integer, wgmma
L2_COST = 0.3  # of a byte that comes from the cache, in bytes that come from memory
DIGITS_COST = {4: 0.25, 8: 0.19}  # the same of an integer that is multiplied as one
COLUMNS = 8  # of wgmma at least: so many digits cost no more than one
DIGITS = 3  # of an input, see `limbs`
MOST_ROWS_AS_DIGITS = COLUMNS // DIGITS
ENOUGH_IN_FLIGHT = 48_000  # bytes that a block must have asked for to keep its share of the memory busy


@dataclass(frozen=True)
class SkinnyTiles:
    """How the work is cut. ``step``: inputs a stage; ``consumers``: warpgroups that multiply; ``strip``: the most
    output rows of a piece; ``cuts``: the most ranges of the inputs; ``depth``: the most stages in flight; ``digits``:
    whether inputs are made of them, else integer weights are widened to the inputs' dtype."""

    step: int
    consumers: int
    strip: int = 192
    cuts: int = 4
    depth: int = 16
    digits: bool = False


def tiles_for(fmt: Format, out: int, inner: int, rows: int) -> SkinnyTiles:
    """The measured choice for one H200."""
    wide = inner % 256 == 0
    if fmt.quantized and rows <= MOST_ROWS_AS_DIGITS and (fmt.group or 128) % 128 == 0:
        # The shorter a block's strip, the less there is in a stage, whose scales take as long to come; and the more
        # accumulators have room in registers.
        high = math.ceil(out / (WGMMA_ROWS * planned().sms))
        consumers = max(2, 5 - high) if fmt.bits == 4 else 2
        step = max(256 if wide else 128, fmt.group or 1)
        return SkinnyTiles(step=step, consumers=consumers, strip=256, cuts=8, depth=24, digits=True)
    if not fmt.quantized and rows <= COLUMNS:
        return SkinnyTiles(step=128, consumers=3, strip=256)
    step = 256 if fmt.quantized and wide and rows <= 16 else 128
    return SkinnyTiles(step=step, consumers=3 if fmt.bits == 4 and rows <= 16 else 2)


@dataclass(frozen=True)
class Plan:
    """`SkinnyTiles` made concrete for one product: ``strips * cuts`` pieces, dealt out to ``blocks``."""

    out: int
    rows: int
    steps: int  # stages over all inputs
    strip: int
    strips: int
    cuts: int
    blocks: int
    depth: int
    digits: bool
    interpret: bool = False

    @property
    def padded(self) -> int:
        """Rows of x, and those that wgmma takes beside."""
        return 8 * math.ceil(self.rows / 8)

    @property
    def columns(self) -> int:
        """Columns of x in a product: its rows, or their digits."""
        return COLUMNS if self.digits else self.padded

    def column(self, digit: int, row: Any) -> Any:
        """Where a row's digit is."""
        return digit * self.rows + row

    @property
    def cut_steps(self) -> int:
        """Stages over a range of the inputs, at most."""
        return math.ceil(self.steps / self.cuts)

    @property
    def height(self) -> int:
        """Rows of a stage in shared memory: wgmma takes 64 at a time."""
        return max(self.strip, WGMMA_ROWS)

    @property
    def wgmma_rows(self) -> int:
        """The same in whole tiles."""
        return WGMMA_ROWS * math.ceil(self.height / WGMMA_ROWS)

    @property
    def tiles(self) -> tuple[int, ...]:
        """Where each 64 rows begin. The last are moved up where they would pass the end: some sums are formed twice."""
        return tuple(min(i, self.height - WGMMA_ROWS) for i in range(0, self.strip, WGMMA_ROWS))

    def shift(self, row: Any) -> Any:
        """How far down in a stage the strip lies that begins at ``row``. Scales are read 64 rows at a time, and near
        the end those rows begin before the strip."""
        if self.strip >= WGMMA_ROWS or self.out < WGMMA_ROWS:
            return 0
        return pl.multiple_of(jnp.maximum(row + WGMMA_ROWS - self.out, 0), 8)

    @property
    def direct(self) -> bool:
        """Whether the kernel finishes its sums itself."""
        return self.cuts == 1 and self.padded == 8


def plan(out: int, inner: int, rows: int, fmt: Format, tiles: SkinnyTiles, sms: int) -> Plan:
    """The cut that keeps the busiest block least busy."""
    steps = inner // tiles.step

    def piece(strip: int, cuts: int) -> Plan:
        strips = math.ceil(out / strip)
        # As digits, x stays in its block, which so keeps to one range of the inputs.
        blocks = min(sms // cuts * cuts if tiles.digits else sms, strips * cuts)
        made = Plan(out, rows, steps, strip, strips, cuts, blocks, 0, tiles.digits)
        stage = nbytes((made.height, tiles.step), fmt.bits)
        if tiles.digits:
            held = nbytes((made.cut_steps * tiles.step, made.columns), 8)
            sums = nbytes((tiles.consumers, made.columns, made.wgmma_rows), 32)
        else:
            held, stage = 0, stage + nbytes((made.columns, tiles.step), 16)
            several = max(1, tiles.consumers - 1) + (2 if cuts == 1 else 0)
            sums = nbytes((several, made.height, made.columns), 32)
        room = planned().shared_bytes - 4096 - sums - held
        return replace(made, depth=min(tiles.depth, room // stage) // tiles.consumers * tiles.consumers)

    def cost(p: Plan) -> float:
        """What the busiest block reads, in bytes, and everything else as so many bytes."""
        turns = math.ceil(p.strips * p.cuts / p.blocks)
        multiplied = nbytes((WGMMA_ROWS * len(p.tiles), tiles.step), 8)
        multiplied *= (DIGITS_COST if tiles.digits else MULTIPLY_COST)[fmt.bits]
        weights = max(nbytes((p.strip, tiles.step), fmt.bits), multiplied)  # one waits for the other
        activations = nbytes((p.padded, tiles.step), 16) * L2_COST
        underway = p.depth - 1 if tiles.digits else p.depth  # beside a stage that is being multiplied
        in_flight = underway * nbytes((p.strip, tiles.step), fmt.bits)
        each = weights + (0 if tiles.digits else activations)
        reading = turns * p.cut_steps * each * max(1, ENOUGH_IN_FLIGHT / max(1, in_flight))
        once = p.cut_steps * activations if tiles.digits else 0
        fusion = 0 if p.direct else FUSION_COST + p.cuts * nbytes((out, p.padded), 2 * 32) / sms
        return reading + once + turns * PIECE_COST + fusion

    strips = range(8, min(tiles.strip, out) + 1, 8)
    cuts = range(1, min(tiles.cuts, steps, sms) + 1)
    candidates = (piece(*c) for c in itertools.product(strips, cuts))
    return min((p for p in candidates if p.depth > 0), key=cost)

"""How a product for few rows is cut into pieces for the multiprocessors: plain arithmetic, no kernel.

A piece is a strip of output rows over a range of the inputs. The plan is found by trying them all against a model of
what the busiest block has to do, whose constants were fitted to measurements on one H200.
"""

import itertools
import math
from dataclasses import dataclass

from pallas_kernels.tiles import SHARED_BYTES, WGMMA_ROWS, Format, nbytes

PIECE_COST = 20_000  # finishing a piece takes as long as so many bytes of a block's share of the bandwidth
L2_COST = 0.3  # of a byte that comes from the cache, in bytes that come from memory
ENOUGH_IN_FLIGHT = 48_000  # bytes that a block must have asked for to keep its share of the memory busy


@dataclass(frozen=True)
class SkinnyTiles:
    """How the work is cut. ``step``: inputs a stage; ``consumers``: warpgroups that multiply; ``strip``: the most
    output rows of a piece; ``cuts``: the most ranges of the inputs; ``depth``: the most stages in flight."""

    step: int
    consumers: int
    strip: int = 192
    cuts: int = 4
    depth: int = 16


def tiles_for(fmt: Format, inner: int, rows: int) -> SkinnyTiles:
    """The measured choice for one H200."""
    step = 256 if fmt.quantized and inner % 256 == 0 and rows <= 16 else 128
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

    @property
    def height(self) -> int:
        """Rows of a tile in shared memory: wgmma takes 64 at a time, the surplus is never loaded nor stored."""
        return WGMMA_ROWS * math.ceil(self.strip / WGMMA_ROWS)


def plan(out: int, inner: int, rows: int, fmt: Format, tiles: SkinnyTiles, sms: int) -> Plan:
    """The cut that keeps the busiest block least busy."""
    # Scales of a group are read in whole wgmma tiles; a surplus there could lie beyond the array.
    grain = WGMMA_ROWS if fmt.grouped else 8
    steps = inner // tiles.step

    def piece(strip: int, cuts: int) -> Plan:
        strips = math.ceil(out / strip)
        height = WGMMA_ROWS * math.ceil(strip / WGMMA_ROWS)
        stage = nbytes((height, tiles.step), fmt.bits) + nbytes((rows, tiles.step), 16)
        room = SHARED_BYTES - 4096 - max(1, tiles.consumers - 1) * nbytes((height, rows), 32)
        depth = min(tiles.depth, room // stage) // tiles.consumers * tiles.consumers
        return Plan(out, rows, steps, strip, strips, cuts, min(sms, strips * cuts), depth)

    def cost(p: Plan) -> float:
        """What the busiest block reads, in bytes, and everything else as so many bytes."""
        turns, stages = math.ceil(p.strips * p.cuts / p.blocks), math.ceil(steps / p.cuts)
        surplus = (p.height - p.strip) * (0.4 if fmt.quantized else 0.1)  # costs widening and room, no bandwidth
        weights = nbytes((math.ceil(p.strip + surplus), tiles.step), fmt.bits)
        activations = nbytes((rows, tiles.step), 16) * L2_COST
        in_flight = p.depth * nbytes((p.strip, tiles.step), fmt.bits)
        reading = turns * stages * (weights + activations) * max(1, ENOUGH_IN_FLIGHT / in_flight)
        return reading + turns * PIECE_COST + p.cuts * nbytes((out, rows), 2 * 32) / sms

    strips = range(grain, min(tiles.strip, out) + 1, grain)
    cuts = range(1, min(tiles.cuts, steps) + 1)
    candidates = (piece(*c) for c in itertools.product(strips, cuts))
    return min((p for p in candidates if p.depth), key=cost)

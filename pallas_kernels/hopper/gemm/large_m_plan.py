"""The plan of a large-M GEMM: the problem, the tiles, and whether the kernel can run them."""

import math
from dataclasses import dataclass, replace
from typing import Any

import jax

from ...arch import planned
from ...dispatch import Unsupported
from ..common.tiles import Format, Weight, check_operands, format_of

CONSUMERS = 2


@dataclass(frozen=True)
class LargeMTiles:
    """What can be tuned. A tile of a block is ``rows`` rows of x by ``out`` outputs."""

    out: int
    rows: int
    step: int = 64  # inputs of a stage
    split_rows: bool = False  # the two consumers halve the rows of a tile; otherwise its outputs
    exchange: bool = False  # SwiGLU: one consumer multiplies gate, the other up; they exchange halves of the rows
    band: int = 8  # row tiles that are walked through together, so that they share what is in the L2 cache
    pair: bool = False  # two blocks with neighbouring outputs form a cluster; each fetches half of x for both
    row_splits: int = 1  # into how many parts the rows of a tile are split if whole tiles would not fill the last wave
    chunk: int = 32  # rows that are written at a time
    depth: int = 8  # stages in flight, at most

    @property
    def consumer_out(self) -> int:
        """Outputs of one consumer."""
        return self.out if self.split_rows or self.exchange else self.out // CONSUMERS

    @property
    def consumer_rows(self) -> int:
        """Rows of x of one consumer."""
        return self.rows // CONSUMERS if self.split_rows else self.rows

    @property
    def cluster(self) -> int:
        """Blocks of a cluster."""
        return 2 if self.pair else 1


@dataclass(frozen=True)
class Pass:
    """Tiles of one size: ``count`` of them from number ``first``, counted as if all tiles were of this size."""

    tiles: LargeMTiles
    row_splits: int
    first: int
    count: int


@dataclass(frozen=True)
class Rotary:
    """The sizes of a QKV product. Its outputs are the heads of q, k and v, its rows the tokens of several sequences."""

    head_dim: int
    heads: int
    kv_heads: int
    batch: int
    tokens: int  # of a sequence
    pages: int | None = None  # of the cache, if it has pages

    @property
    def queries(self) -> int:
        """Outputs that are q's: the first."""
        return self.heads * self.head_dim

    @property
    def rotated(self) -> int:
        """Outputs that are q's or k's. Those after them are v's and stay as they are."""
        return (self.heads + self.kv_heads) * self.head_dim


@dataclass(frozen=True)
class LargeMProblem:
    """One product: its sizes, and what the epilogue does with the sums."""

    fmt: Format
    rows: int
    inner: int
    out: int  # outputs, after SwiGLU
    dtype: Any
    out_dtype: Any
    swiglu: bool = False
    residual: bool = False
    rotary: Rotary | None = None

    @property
    def projections(self) -> int:
        """Weight tiles that one tile of the result needs: gate and up, or just one."""
        return 2 if self.swiglu else 1

    @property
    def columns(self) -> int:
        """Columns of the result array. Keys and values are written to the cache instead."""
        return self.rotary.queries if self.rotary else self.out

    def residual_stages(self, tiles: LargeMTiles) -> int:
        """Stages of the ring with the residual of a tile. They follow those with its inputs."""
        return tiles.out // tiles.step if self.residual else 0

    def stages(self, tiles: LargeMTiles) -> int:
        """Stages of the ring that a tile takes."""
        return self.inner // tiles.step + self.residual_stages(tiles)


def passes(problem: LargeMProblem, tiles: LargeMTiles, units: int) -> list[Pass]:
    """The tiles in the order in which they are computed. ``units`` run at a time: blocks, or pairs of blocks."""
    count = (problem.rows // tiles.rows) * (problem.out // tiles.out) // tiles.cluster
    whole = count if tiles.row_splits == 1 else count // units * units
    fine = replace(tiles, rows=tiles.rows // tiles.row_splits)
    n = tiles.row_splits
    both = [Pass(tiles, 1, 0, whole), Pass(fine, n, whole * n, (count - whole) * n)]
    return [p for p in both if p.count]


def tiles_for(fmt: Format, rows: int, out: int, swiglu: bool, sms: int) -> LargeMTiles:
    """The measured choice for one H200."""
    if swiglu and rows <= 128:
        return LargeMTiles(out=64, rows=128, exchange=True)
    if swiglu and not fmt.quantized:  # float weights are best shared by the consumers, widened ones must not be
        pair = rows >= 4096 and out % 128 == 0 and sms % 2 == 0
        return LargeMTiles(out=64, rows=256, split_rows=True, pair=pair)
    large = LargeMTiles(out=64, rows=256, exchange=True) if swiglu else LargeMTiles(out=128, rows=256)
    count = math.ceil(rows / large.rows) * (out // large.out)
    if not swiglu and count < 0.9 * sms:
        return replace(large, rows=128)
    # Halve the tiles of the last wave if one wave can then take them all.
    return replace(large, row_splits=2 if count > sms and 0 < 2 * (count % sms) <= sms else 1)


def check_large_m(x: jax.Array, w: Weight, *, swiglu: bool = False, tiles: LargeMTiles | None = None) -> None:
    """Raise `Unsupported` where `large_m_gemm` cannot run; ``x`` is [rows, in]."""
    check_operands(x, w)
    fmt = format_of(w)
    out = w.shape[-2] // (2 if swiglu else 1)
    tiles = tiles or tiles_for(fmt, x.shape[0], out, swiglu, planned().sms)
    if x.shape[1] % tiles.step:
        raise Unsupported(f"{x.shape[1]} inputs: must be a multiple of {tiles.step}")
    side_by_side = tiles.out * tiles.cluster
    if out % side_by_side:
        raise Unsupported(f"{out} outputs: must be a multiple of {side_by_side}")
    if tiles.pair and fmt.quantized:  # ordinary loads read their stages, and a cluster barrier does not wait for those
        raise Unsupported("pairs of blocks are for float weights")
    if fmt.group is not None and fmt.group % tiles.step and tiles.step % fmt.group:
        raise Unsupported(f"groups of {fmt.group} inputs do not fit steps of {tiles.step}")

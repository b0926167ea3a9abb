"""The plan of a product for many rows: its sizes, its tiles, and whether `large_m` can run it."""

import math
from dataclasses import dataclass, replace
from typing import Any

import jax

from ...dispatch import Unsupported
from ..common.tiles import Format, Weight, check_operands, format_of

CONSUMERS = 2
Refs = dict[str, Any]  # what the kernel is given, by name


@dataclass(frozen=True)
class WideTiles:
    """``out`` x ``rows``: the tile of a block; ``step``: inputs a stage; ``by_rows``: the two consumers halve the rows
    (else the outputs); ``band``: tiles of rows that are walked through together, so that they share what L2 holds;
    ``pair``: two blocks with neighbouring outputs form a cluster, and each fetches half of the activations for both;
    ``parts``: the rows of a tile are cut so often where the last tiles would leave blocks without any."""

    out: int
    rows: int
    step: int = 64
    by_rows: bool = False
    trade: bool = False  # SwiGLU: one consumer has the gate's tile, the other up's; they trade halves of the results
    band: int = 8
    pair: bool = False
    parts: int = 1
    chunk: int = 32  # rows that are written at a time
    depth: int = 8

    @property
    def part(self) -> int:
        """Outputs of one consumer."""
        return self.out if self.by_rows or self.trade else self.out // CONSUMERS


@dataclass(frozen=True)
class Pass:
    """Tiles of one size: ``count`` of them from ``first``, numbered as if all were of this size."""

    tiles: WideTiles
    parts: int
    first: int
    count: int


@dataclass(frozen=True)
class Rotary:
    """The sizes of a QKV product: its outputs are the heads of q, k and v, its rows the tokens of several sequences."""

    head_dim: int
    heads: int
    kv_heads: int
    batch: int
    tokens: int  # of a sequence

    @property
    def queries(self) -> int:
        """Outputs that are q's, the first."""
        return self.heads * self.head_dim

    @property
    def turned(self) -> int:
        """Outputs that are q's or k's; values behind them stay as they are."""
        return (self.heads + self.kv_heads) * self.head_dim


@dataclass(frozen=True)
class Problem:
    """One product: its sizes and what is done with the result before it is written."""

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
    def heads(self) -> int:
        """Weight tiles that belong to one tile of the result: gate and up, or just one."""
        return 2 if self.swiglu else 1

    @property
    def columns(self) -> int:
        """Of what is written; keys and values go elsewhere."""
        return self.rotary.queries if self.rotary else self.out

    def behind(self, tiles: WideTiles) -> int:
        """Stages that follow a tile's inputs, with what is added to it."""
        return tiles.out // tiles.step if self.residual else 0

    def stages(self, tiles: WideTiles) -> int:
        """Turns of the ring that a tile takes."""
        return self.inner // tiles.step + self.behind(tiles)


def passes(problem: Problem, tiles: WideTiles, units: int) -> list[Pass]:
    """The tiles in the order in which they are computed; ``units`` take them side by side: blocks, or pairs of them."""
    count = (problem.rows // tiles.rows) * (problem.out // tiles.out) // (2 if tiles.pair else 1)
    whole = count if tiles.parts == 1 else count // units * units
    fine = replace(tiles, rows=tiles.rows // tiles.parts)
    both = [Pass(tiles, 1, 0, whole), Pass(fine, tiles.parts, whole * tiles.parts, (count - whole) * tiles.parts)]
    return [p for p in both if p.count]


def tiles_for(fmt: Format, rows: int, out: int, swiglu: bool, sms: int) -> WideTiles:
    """The measured choice for one H200."""
    if swiglu and rows <= 128:
        return WideTiles(out=64, rows=128, trade=True)
    if swiglu and not fmt.quantized:  # float weights are best shared by the consumers, widened ones must not be
        return WideTiles(out=64, rows=256, by_rows=True, pair=rows >= 4096 and out % 128 == 0 and sms % 2 == 0)
    large = WideTiles(out=64, rows=256, trade=True) if swiglu else WideTiles(out=128, rows=256)
    count = math.ceil(rows / large.rows) * (out // large.out)
    if not swiglu and count < 0.9 * sms:
        return replace(large, rows=128)
    # Halves of the tiles that are left over, where one wave can take them all.
    return replace(large, parts=2 if count > sms and 0 < 2 * (count % sms) <= sms else 1)


def check_wide(x: jax.Array, w: Weight, *, swiglu: bool = False, tiles: WideTiles | None = None) -> None:
    """Raise `Unsupported` where `wide` cannot run; ``x`` is [rows, in]."""
    check_operands(x, w)
    fmt = format_of(w)
    out = w.shape[-2] // (2 if swiglu else 1)
    tiles = tiles or tiles_for(fmt, x.shape[0], out, swiglu, 132)
    if x.shape[1] % tiles.step:
        raise Unsupported(f"{x.shape[1]} inputs: must be a multiple of {tiles.step}")
    side_by_side = tiles.out * (2 if tiles.pair else 1)
    if out % side_by_side:
        raise Unsupported(f"{out} outputs: must be a multiple of {side_by_side}")
    if tiles.pair and fmt.quantized:  # their stages are read by ordinary loads, which a pair's barrier does not await
        raise Unsupported("pairs of blocks are for float weights")
    if fmt.group is not None and fmt.group % tiles.step and tiles.step % fmt.group:
        raise Unsupported(f"groups of {fmt.group} inputs do not fit steps of {tiles.step}")

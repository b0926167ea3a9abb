"""How a decode step is cut up for one launch: plain arithmetic, no kernel.

A product gives every block one strip of output rows, a multiple of the 8 rows of a TMA tile, as even as that allows.
A strip that does not fill wgmma's tiles of 64 rows is stacked: gate above up, or the ranges of the inputs one above
the other, each with columns of x of its own. A tile is walked in *stages* of ``step`` inputs; the producer and the
consumers of a block walk all in the same order, each by itself, so that nothing but the ring passes between them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from jax import lax
from jax.experimental import pallas as pl

from ...arch import planned
from ..common.tiles import WGMMA_ROWS, Format, nbytes

ROWS = 8  # token rows of a step: the least that wgmma takes, so that 1 costs what 8 cost
SMALL = 8192  # bytes of shared memory for barriers, and for scratch that the compiler adds
MAX_SPLITS = 16  # parts of a row's keys
MAX_CUTS = 3  # ranges of the inputs
DIGITS = 2  # of x, where weights are integers: see `Shape.digits`
BLOCK = 256  # inputs of x whose digits have a scale in common: those of a warp
ROW_UNIT = 1024  # columns of one token that a warpgroup reads at a time: 8 a thread
TAKING_TURNS = (("qkv", "gate_up", "head"), ("o", "down"))  # products whose scales share a place


@dataclass(frozen=True)
class Tiles:
    """What can be tuned. ``step``: inputs a stage; ``consumers``: warpgroups that multiply; ``chunk``: inputs of x that
    are held at a time, in all cuts; ``keys``: cached keys a tile; ``stages``: tiles of keys in flight; ``depth``: the
    most stages of weights in flight."""

    step: int = 128
    consumers: int = 2
    chunk: int = 4096
    keys: int = 64
    stages: int = 2
    depth: int = 32


@dataclass(frozen=True)
class Shape:
    """The sizes of one step: ``batch`` rows of ``queries`` new tokens each."""

    batch: int
    queries: int
    dim: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    layers: int
    max_len: int
    fmt: Format
    eps: float

    @property
    def rows(self) -> int:
        """Tokens of a step."""
        return self.batch * self.queries

    @property
    def digits(self) -> int:
        """Columns of a token in a product: x itself, or its digits."""
        return DIGITS if self.fmt.quantized else 1

    @property
    def columns(self) -> int:
        """Columns of x in a product: those of all tokens, and those that wgmma takes beside."""
        return 8 * math.ceil(self.digits * self.rows / 8)

    @property
    def places(self) -> int:
        """Tokens that the columns have room for, and the sums of a product: the digits of one are put together."""
        return self.columns // self.digits

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class Piece:
    """Rows of a tile that are neighbours in memory: ``rows`` at ``row`` of the strip, in ``half`` and ``cut``."""

    place: int  # first row within the tile
    half: int
    cut: int
    row: int
    rows: int


@dataclass(frozen=True)
class Product:
    """One weight's part of a phase. A block has a strip of the output rows of each of ``halves`` (2 where gate and up
    are multiplied side by side), over each of ``cuts`` ranges of the inputs. All of them are stacked and walked in
    tiles of 64 rows: wgmma takes no fewer, and multiplies whatever a tile lacks for nothing."""

    inner: int
    out: int  # of each half
    halves: int
    strip: int
    cuts: int
    step: int
    chunk: int  # inputs of x that are held at a time

    @property
    def stacked(self) -> int:
        """Rows of the stack: halves, in them cuts, in them the strip."""
        return self.halves * self.cuts * self.strip

    @property
    def tiles(self) -> int:
        """Tiles of 64 rows that hold the stack."""
        return math.ceil(self.stacked / WGMMA_ROWS)

    @property
    def cut_steps(self) -> int:
        """Stages over a range of the inputs. The last range may have fewer: x is zero there."""
        return math.ceil(self.inner / self.step / self.cuts)

    @property
    def held_steps(self) -> int:
        """Stages of each range whose x is held at a time."""
        return self.chunk // self.cuts // ROW_UNIT * ROW_UNIT // self.step

    @property
    def padded(self) -> int:
        """Inputs that `chunks` may read, in whole units of `ROW_UNIT`."""
        first, _ = list(self.chunks())[-1]
        end = ((self.cuts - 1) * self.cut_steps + first) * self.step + self.held_units * ROW_UNIT
        return ROW_UNIT * math.ceil(end / ROW_UNIT)

    @property
    def held_units(self) -> int:
        """Units of `ROW_UNIT` columns that are read for a chunk of one range."""
        return math.ceil(min(self.cut_steps, self.held_steps) * self.step / ROW_UNIT)

    def column(self, first: Any, number: Any) -> Any:
        """Where a chunk's unit begins in a row of x: the units of the first cut, then those of the next."""
        cut, at = lax.div(number, self.held_units), lax.rem(number, self.held_units)
        return pl.multiple_of((cut * self.cut_steps + first) * self.step + at * ROW_UNIT, math.gcd(self.step, ROW_UNIT))

    def pieces(self, tile: int) -> Iterator[Piece]:
        """What a tile is made of."""
        start = tile * WGMMA_ROWS
        end = min(start + WGMMA_ROWS, self.stacked)
        at = start
        while at < end:
            part, row = divmod(at, self.strip)
            rows = min(self.strip - row, end - at)
            yield Piece(at - start, part // self.cuts, part % self.cuts, row, rows)
            at += rows

    def chunks(self) -> Iterator[tuple[int, int]]:
        """First stage and number of stages of each part of the ranges whose x is held at a time."""
        for first in range(0, self.cut_steps, self.held_steps):
            yield first, min(self.held_steps, self.cut_steps - first)


@dataclass(frozen=True)
class Plan:
    """A `Shape` and `Tiles` made concrete for a number of blocks."""

    shape: Shape
    tiles: Tiles
    blocks: int
    splits: int
    depth: int
    products: dict[str, Product]
    interpret: bool = False
    patience: int = 0  # looks at the others' count before a block gives up waiting; 0: it never does

    @property
    def most_pieces(self) -> int:
        """Copies of a stage, at most."""
        return max(len(list(p.pieces(tile))) for p in self.products.values() for tile in range(p.tiles))

    @property
    def items(self) -> int:
        """Pieces of attention: a row of the batch, a key head, a part of the keys."""
        return self.shape.batch * self.shape.kv_heads * self.splits


def plan(shape: Shape, tiles: Tiles, blocks: int) -> Plan:
    """Cut ``shape`` for ``blocks`` blocks."""
    heads = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    sizes = {
        "qkv": (shape.dim, heads, 1),
        "o": (shape.heads * shape.head_dim, shape.dim, 1),
        "gate_up": (shape.dim, shape.hidden, 2),
        "down": (shape.hidden, shape.dim, 1),
        "head": (shape.dim, shape.vocab, 1),
    }
    products = {name: product(*size, tiles, blocks) for name, size in sizes.items()}
    splits = max(1, min(blocks // (shape.batch * shape.kv_heads), MAX_SPLITS, math.ceil(shape.max_len / tiles.keys)))
    stage = nbytes((WGMMA_ROWS, tiles.step), shape.fmt.bits)
    made = Plan(shape, tiles, blocks, splits, 0, products)
    room = planned().shared_bytes - SMALL - shared_bytes(made)
    return replace(made, depth=min(tiles.depth, room // stage) // tiles.consumers * tiles.consumers)


def product(inner: int, out: int, halves: int, tiles: Tiles, blocks: int) -> Product:
    """The number of cuts that fills the tiles best; as few as give nearly that."""
    strip = 8 * math.ceil(out / 8 / blocks)

    def cut(cuts: int) -> Product:
        return Product(inner, out, halves, strip, cuts, tiles.step, tiles.chunk)

    def waste(p: Product) -> float:
        return p.tiles * WGMMA_ROWS / p.stacked

    candidates = [cut(cuts) for cuts in range(1, min(MAX_CUTS, inner // tiles.step, tiles.chunk // ROW_UNIT) + 1)]
    least = min(map(waste, candidates))
    return next(p for p in candidates if waste(p) <= least + 0.1)


def shared_bytes(plan: Plan) -> int:
    """Bytes of shared memory beside the ring of weights: x and sums, or what attention needs; scales of two phases."""
    shape, tiles = plan.shape, plan.tiles
    x = nbytes((shape.columns, tiles.chunk), 8 if shape.fmt.quantized else 16)
    sums = max(nbytes(sums_shape(p, plan), 32) for p in plan.products.values())
    attention = nbytes((WGMMA_ROWS + 2 * tiles.stages * tiles.keys, shape.head_dim), 16)
    new = nbytes((2, ROWS, shape.head_dim), 16)
    scales = sum(max(nbytes(scales_shape(plan.products[n], plan), 16) for n in names) for names in TAKING_TURNS)
    factors = max(nbytes(factors_shape(p, plan), 32) for p in plan.products.values())
    return max(x + factors + sums, attention) + new + (scales if shape.fmt.grouped else 0)


def sums_shape(p: Product, plan: Plan) -> tuple[int, ...]:
    """All consumers' sums of a phase, a token's outputs side by side."""
    return plan.tiles.consumers, plan.shape.places, p.tiles * WGMMA_ROWS


def factors_shape(p: Product, plan: Plan) -> tuple[int, ...]:
    """What x's digits are worth, for every block of the inputs that x is held of."""
    return plan.tiles.chunk // p.cuts // BLOCK, p.cuts * plan.shape.places


def scales_shape(p: Product, plan: Plan) -> tuple[int, ...]:
    """A strip's scales as they lie in memory, 8 rows side by side and cut into lines of 16: every size a multiple of
    what the copy engine takes. A half begins at a multiple of 128 bytes."""
    group = plan.shape.fmt.group or p.inner
    return p.halves, 4 * math.ceil(p.strip / 32), p.inner // group // 2, 16

"""How a decode step is cut up for one launch: plain arithmetic, no kernel.

A product gives every block one strip of output rows, a multiple of the 8 rows of a TMA tile, as even as that allows.
A strip is walked in tiles of 64 rows (a wgmma tile), a tile in *stages* of ``step`` inputs; the producer and the
consumers of a block walk it in the same order, each by itself, so that nothing but the ring passes between them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from pallas_kernels.tiles import SHARED_BYTES, WGMMA_ROWS, Format, nbytes

ROWS = 8  # token rows of a step: the least that wgmma takes, so that 1 costs what 8 cost
SMALL = 8192  # bytes of shared memory for barriers, and for scratch that the compiler adds
MAX_SPLITS = 16  # parts of a row's keys


@dataclass(frozen=True)
class Tiles:
    """What can be tuned. ``step``: inputs a stage; ``consumers``: warpgroups that multiply; ``chunk``: inputs of x that
    are held at a time; ``keys``: cached keys a tile; ``stages``: tiles of keys in flight; ``depth``: the most stages of
    weights in flight."""

    step: int = 128
    consumers: int = 1
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
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class Product:
    """One weight's part of a phase: ``halves`` is 2 where gate and up are multiplied side by side."""

    inner: int
    out: int  # of each half
    halves: int
    strip: int
    step: int
    chunk: int

    def tiles(self) -> Iterator[tuple[int, int]]:
        """First row within a strip, and rows, of each tile."""
        for first in range(0, self.strip, WGMMA_ROWS):
            yield first, min(WGMMA_ROWS, self.strip - first)

    def chunks(self) -> Iterator[tuple[int, int]]:
        """First step and number of steps of each range of inputs that is held in shared memory at a time."""
        steps, most = self.inner // self.step, self.chunk // self.step
        for first in range(0, steps, most):
            yield first, min(most, steps - first)


@dataclass(frozen=True)
class Plan:
    """A `Shape` and `Tiles` made concrete for a number of blocks."""

    shape: Shape
    tiles: Tiles
    blocks: int
    splits: int
    depth: int
    products: dict[str, Product]

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
    products = {
        name: Product(inner, out, halves, 8 * math.ceil(out / 8 / blocks), tiles.step, tiles.chunk)
        for name, (inner, out, halves) in sizes.items()
    }
    splits = max(1, min(blocks // (shape.batch * shape.kv_heads), MAX_SPLITS, math.ceil(shape.max_len / tiles.keys)))
    stage = nbytes((WGMMA_ROWS, tiles.step), shape.fmt.bits)
    room = SHARED_BYTES - SMALL - shared_bytes(shape, tiles)
    depth = min(tiles.depth, room // stage) // tiles.consumers * tiles.consumers
    return Plan(shape, tiles, blocks, splits, depth, products)


def shared_bytes(shape: Shape, tiles: Tiles) -> int:
    """Bytes of shared memory beside the ring of weights: x or what attention needs, and sums on their way out."""
    x = nbytes((ROWS, tiles.chunk), 16)
    attention = nbytes((WGMMA_ROWS + 2 * tiles.stages * tiles.keys, shape.head_dim), 16)
    new = nbytes((2, ROWS, shape.head_dim), 16)
    sums = nbytes((max(1, tiles.consumers - 1) + 2, WGMMA_ROWS, ROWS), 32)
    return max(x, attention) + new + sums

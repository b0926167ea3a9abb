"""How a decode step is tiled for one launch: plain arithmetic, no kernel.

A product gives every block one N tile: output rows, a multiple of the 8 rows of a TMA tile, as even as that allows.
An N tile that does not fill wgmma's tiles of 64 rows is stacked: gate above up, or the K splits one above the other,
each with columns of x of its own. A wgmma tile is walked in *stages* of ``step`` inputs; `schedule` has their order.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ...arch import planned
from ..common.tiles import WGMMA_ROWS, Format, nbytes
from .phase import Phase, ProductPhase, check_table

MAX_TOKENS = 8  # wgmma's right operand has at least 8 columns, so that 1 token costs what 8 cost
RESERVED_BYTES = 8192  # of shared memory: barriers, small arrays, and scratch that the compiler adds
MAX_KEY_SPLITS = 16
MAX_K_SPLITS = 3
LIMBS = 2  # of an element of x where weights are integers: see `StepShape.limbs`
LIMB_BLOCK = 256  # inputs of x whose limbs share a scale: those that one warp makes
UNIT_COLUMNS = 1024  # columns of one token that a warpgroup loads at a time: 8 per thread


@dataclass(frozen=True)
class StepTiles:
    """What can be tuned. ``step``: inputs per stage; ``consumers``: warpgroups that multiply; ``chunk``: inputs of x
    that shared memory holds at a time, in all K splits; ``keys``: cached keys per tile; ``stages``: tiles of keys in
    flight; ``depth``: at most so many stages of weights in flight."""

    step: int = 128
    consumers: int = 2
    chunk: int = 4096
    keys: int = 64
    stages: int = 2
    depth: int = 32


@dataclass(frozen=True)
class StepShape:
    """The sizes of one step: ``batch`` rows of ``queries`` new tokens each. ``devices`` along
    the mesh axis ``axis`` share the model, and each has so many of the heads, the hidden units and the vocabulary."""

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
    devices: int = 1
    axis: str | None = None

    @property
    def tokens(self) -> int:
        """New tokens of the whole batch."""
        return self.batch * self.queries

    @property
    def q_width(self) -> int:
        """Columns of all query heads."""
        return self.heads * self.head_dim

    @property
    def qkv_width(self) -> int:
        """Columns of all query, key and value heads."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def heads_per_key(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.kv_heads

    @property
    def limbs(self) -> int:
        """Columns of a token in a product: x itself, or its int8 limbs where weights are integers."""
        return LIMBS if self.fmt.quantized else 1

    @property
    def columns(self) -> int:
        """Columns of x in a product: those of all tokens, padded to wgmma's multiple of 8."""
        return 8 * math.ceil(self.limbs * self.tokens / 8)

    @property
    def token_slots(self) -> int:
        """Tokens that the columns have room for, and columns of a product's sums once limbs are combined."""
        return self.columns // self.limbs


@dataclass(frozen=True)
class TileCopy:
    """One copy of a stage: rows that are neighbours in memory, from ``row`` of an N tile in a half and K split."""

    tile_row: int  # first row within the wgmma tile
    half: int
    k_split: int
    row: int
    rows: int


@dataclass(frozen=True)
class ProductPlan:
    """How one product is tiled. A block has an N tile of each of ``halves`` (2 for gate and up), over each of
    ``k_splits`` ranges of the inputs. All are stacked and walked in wgmma tiles of 64 rows."""

    inner: int
    outer: int  # of each half
    halves: int
    n_tile: int
    k_splits: int
    step: int
    chunk: int  # inputs of x that are held at a time

    @property
    def stacked_rows(self) -> int:
        """Rows of the stack: halves, in them K splits, in them the N tile."""
        return self.halves * self.k_splits * self.n_tile

    @property
    def wgmma_tiles(self) -> int:
        """Tiles of 64 rows that hold the stack."""
        return math.ceil(self.stacked_rows / WGMMA_ROWS)

    @property
    def steps(self) -> int:
        """Stages over all inputs. The last may have fewer inputs: TMA fills the rest with zeros."""
        return math.ceil(self.inner / self.step)

    @property
    def split_steps(self) -> int:
        """Stages over a K split. The last split may have fewer inputs: x is zero beyond them."""
        return math.ceil(self.steps / self.k_splits)

    @property
    def held_steps(self) -> int:
        """Stages of each K split whose x is held at a time."""
        return self.chunk // self.k_splits // UNIT_COLUMNS * UNIT_COLUMNS // self.step

    @property
    def chunks(self) -> int:
        """How often x is filled into shared memory."""
        return math.ceil(self.split_steps / self.held_steps)

    @property
    def held_units(self) -> int:
        """Units of `UNIT_COLUMNS` columns that are read for a chunk of one K split."""
        return math.ceil(min(self.split_steps, self.held_steps) * self.step / UNIT_COLUMNS)

    @property
    def padded_inner(self) -> int:
        """Columns of x that the prologue may read, in whole units of `UNIT_COLUMNS`."""
        last_chunk = (self.chunks - 1) * self.held_steps
        end = ((self.k_splits - 1) * self.split_steps + last_chunk) * self.step + self.held_units * UNIT_COLUMNS
        return UNIT_COLUMNS * math.ceil(end / UNIT_COLUMNS)

    def column(self, first_step: Any, unit: Any) -> Any:
        """Where a unit of a chunk begins in a row of x: the units of the first K split, then those of the next."""
        split, number = lax.div(unit, self.held_units), lax.rem(unit, self.held_units)
        begin = (split * self.split_steps + first_step) * self.step + number * UNIT_COLUMNS
        return pl.multiple_of(begin, math.gcd(self.step, UNIT_COLUMNS))

    def copies(self, tile: int) -> Iterator[TileCopy]:
        """What a wgmma tile is made of."""
        at = start = tile * WGMMA_ROWS
        end = min(start + WGMMA_ROWS, self.stacked_rows)
        while at < end:
            part, row = divmod(at, self.n_tile)
            rows = min(self.n_tile - row, end - at)
            yield TileCopy(at - start, part // self.k_splits, part % self.k_splits, row, rows)
            at += rows

    def first_row(self, block: Any) -> Any:
        """Where a block's N tile begins. The last tile is moved up where it would pass the end: two blocks then write
        the same values there, which is why no product phase writes what it reads."""
        return pl.multiple_of(jnp.minimum(block * self.n_tile, self.outer - self.n_tile), 8)

    def has_tile(self, block: Any) -> Any:
        """Whether a block has an N tile: with few outputs some blocks have none."""
        return block * self.n_tile < self.outer


@dataclass(frozen=True)
class StepPlan:
    """A `StepShape` and `StepTiles` made concrete for a number of blocks and a table of phases."""

    shape: StepShape
    tiles: StepTiles
    blocks: int
    layer_phases: tuple[Phase, ...]
    head: ProductPhase
    products: dict[str, ProductPlan]  # by the phase's name
    key_splits: int  # parts of a row's cached keys
    depth: int  # stages of the weight ring
    interpret: bool = False
    spin_limit: int = 0  # polls of the grid barrier before a block gives up; 0: it waits forever

    @property
    def product_phases(self) -> tuple[ProductPhase, ...]:
        """Every phase with a weight, the head last."""
        return tuple(p for p in (*self.layer_phases, self.head) if isinstance(p, ProductPhase))

    def product(self, phase: ProductPhase) -> ProductPlan:
        """How a phase's product is tiled."""
        return self.products[phase.name]

    @property
    def weight_slice(self) -> int:
        """Columns of which every row of every weight has a whole number, and a stage, too: TMA's tiles have no more."""
        return math.gcd(self.tiles.step, *(p.inner for p in self.products.values()))

    @property
    def copies_per_stage(self) -> int:
        """Copies of a stage, at most: what the ring's ``full`` barrier counts."""
        return max(len(list(p.copies(tile))) for p in self.products.values() for tile in range(p.wgmma_tiles))

    @property
    def attention_items(self) -> int:
        """Work items of attention: a row of the batch, a key head, a split of the keys."""
        return self.shape.batch * self.shape.kv_heads * self.key_splits

    def arrivals_before(self, phase: Phase, layer: Any) -> Any:
        """Blocks that have arrived at the grid barrier once all phases before this one are done."""
        position = 0 if phase is self.head else self.layer_phases.index(phase)
        return (layer * len(self.layer_phases) + position) * self.blocks

    def exchanges(self, phase: ProductPhase) -> bool:
        """Whether a phase's sums are added up over devices."""
        return phase.over_devices and self.shape.devices > 1

    def exchange_number(self, phase: Phase, layer: Any) -> Any:
        """Which exchange of the launch this phase of this layer makes, from 1 on."""
        exchanging = [p for p in self.layer_phases if isinstance(p, ProductPhase) and p.over_devices]
        return layer * len(exchanging) + exchanging.index(phase) + 1  # type: ignore[arg-type]

    @property
    def scale_slots(self) -> tuple[tuple[ProductPhase, ...], ...]:
        """The phases that share each slot for scales, in their order."""
        slots = sorted({p.scale_slot for p in self.product_phases})
        return tuple(tuple(p for p in self.product_phases if p.scale_slot == slot) for slot in slots)

    def scale_fills_before(self, phase: ProductPhase, layer: Any) -> Any:
        """How often this phase's slot for scales was filled before this phase of this layer."""
        sharing = [p for p in self.scale_slots[phase.scale_slot] if p is not self.head]
        return len(sharing) * layer + (0 if phase is self.head else sharing.index(phase))


def plan_step(
    shape: StepShape, tiles: StepTiles, blocks: int, layer_phases: tuple[Phase, ...], head: ProductPhase
) -> StepPlan:
    """Tile ``shape`` for ``blocks`` blocks."""
    check_table(layer_phases, head)
    products = {
        p.name: plan_product(getattr(shape, p.inner), getattr(shape, p.outer), p.halves, tiles, blocks)
        for p in (*layer_phases, head)
        if isinstance(p, ProductPhase)
    }
    per_head = blocks // (shape.batch * shape.kv_heads)
    key_splits = max(1, min(per_head, MAX_KEY_SPLITS, math.ceil(shape.max_len / tiles.keys)))
    plan = StepPlan(shape, tiles, blocks, layer_phases, head, products, key_splits, depth=0)
    stage = nbytes((WGMMA_ROWS, tiles.step), shape.fmt.bits)
    room = planned().shared_bytes - RESERVED_BYTES - shared_bytes(plan)
    return replace(plan, depth=min(tiles.depth, room // stage) // tiles.consumers * tiles.consumers)


def plan_product(inner: int, outer: int, halves: int, tiles: StepTiles, blocks: int) -> ProductPlan:
    """As few K splits as fill wgmma's tiles nearly as well as the best number does."""
    n_tile = 8 * math.ceil(outer / 8 / blocks)

    def split(k_splits: int) -> ProductPlan:
        return ProductPlan(inner, outer, halves, n_tile, k_splits, tiles.step, tiles.chunk)

    def waste(p: ProductPlan) -> float:
        return p.wgmma_tiles * WGMMA_ROWS / p.stacked_rows

    most = min(MAX_K_SPLITS, math.ceil(inner / tiles.step), tiles.chunk // UNIT_COLUMNS)
    candidates = [split(k_splits) for k_splits in range(1, most + 1)]
    least = min(map(waste, candidates))
    return next(p for p in candidates if waste(p) <= least + 0.1)


def shared_bytes(plan: StepPlan) -> int:
    """Bytes of shared memory beside the ring: x and sums, or what attention needs; scales of all slots."""
    shape, tiles = plan.shape, plan.tiles
    x = nbytes((shape.columns, tiles.chunk), 8 if shape.fmt.quantized else 16)
    sums = max(nbytes(sums_shape(p, plan), 32) for p in plan.products.values())
    limb_scales = max(nbytes(limb_scales_shape(p, plan), 32) for p in plan.products.values())
    attention = nbytes((WGMMA_ROWS + 2 * tiles.stages * tiles.keys, shape.head_dim), 16)
    new_keys = nbytes((2, MAX_TOKENS, shape.head_dim), 16)
    scales = sum(max(nbytes(scales_shape(plan.product(p), plan), 16) for p in slot) for slot in plan.scale_slots)
    return max(x + limb_scales + sums, attention) + new_keys + (scales if shape.fmt.grouped else 0)


def sums_shape(p: ProductPlan, plan: StepPlan) -> tuple[int, ...]:
    """All consumers' sums of a phase; a token's outputs are neighbours."""
    return plan.tiles.consumers, plan.shape.token_slots, p.wgmma_tiles * WGMMA_ROWS


def limb_scales_shape(p: ProductPlan, plan: StepPlan) -> tuple[int, ...]:
    """The scale of x's limbs for every block of the inputs that are held, and every token of every K split."""
    return plan.tiles.chunk // p.k_splits // LIMB_BLOCK, p.k_splits * plan.shape.token_slots


def n_share(p: ProductPlan, plan: StepPlan) -> int:
    """Outputs of an N tile that one consumer finishes. The last consumers' may overlap: they write the same values."""
    return 8 * math.ceil(p.n_tile // 8 / plan.tiles.consumers)


def scales_shape(p: ProductPlan, plan: StepPlan) -> tuple[int, ...]:
    """An N tile's scales as they lie in memory: 8 rows at a time, in lines of 16, or of 8 where a row has an odd number
    of them, so that every size is a multiple of what TMA copies. Each half begins at a multiple of 128 bytes."""
    groups = p.inner // (plan.shape.fmt.group or p.inner)
    line = scales_in_line(groups)
    units = 64 // line  # of 8 rows: a multiple of 128 bytes
    return p.halves, units * math.ceil(p.n_tile / 8 / units), 8 * groups // line, line


def scales_in_line(groups: int) -> int:
    """Scales in a line of `scales_shape`."""
    return 8 if groups % 2 else 16

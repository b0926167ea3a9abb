"""The order of the work, written once for the producer and the consumers.

The producer copies stages of weights into the ring and the consumers multiply them. Nothing but the ring's barriers
passes between them: they agree because both walk `over_phases` and, in each product phase, `over_tiles`. The order is
layers, in them phases, in them chunks of x, in them wgmma tiles, in them steps of inputs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax

from ..common import ring
from .block import Block
from .phase import Phase, ProductPhase
from .plan import ProductPlan, StepPlan


def over_phases(plan: StepPlan, visit: Callable[[Phase, Any, Any], Any]) -> Any:
    """Fold ``visit(phase, layer, count)`` over all phases; ``count`` is the number of stages that went before."""

    def one_layer(layer: Any, count: Any) -> Any:
        for phase in plan.layer_phases:
            count = visit(phase, layer, count)
        return count

    count = lax.fori_loop(0, plan.shape.layers, one_layer, jnp.int32(0))
    return visit(plan.head, plan.shape.layers, count)


@dataclass(frozen=True)
class TileStages:
    """The stages of one wgmma tile over one chunk of x."""

    product: ProductPlan
    block: Any
    chunk: Any
    tile: Any
    first_step: Any  # of every K split
    steps: Any

    @property
    def number(self) -> Any:
        """How many stages: none for a block that has no N tile."""
        return jnp.where(self.product.has_tile(self.block), self.steps, 0)

    def each(self, count: Any, copy: Callable[[Any, Any], None]) -> Any:
        """The producer's part: ``copy(step, count)`` for all stages, which returns the count after them."""

        def one(step: Any, count: Any) -> Any:
            copy(step, count)
            return count + 1

        return lax.fori_loop(0, self.number, one, count)

    def own(self, b: Block, count: Any, stage: Callable[[Any, Any, Any], Any], carry: Any, *, release: bool) -> Any:
        """A consumer's part: fold ``stage(step, slot, carry)`` over the stages that are this consumer's."""
        s, consumers = b.scratch, b.plan.tiles.consumers
        return ring.fold_own_stages(
            b.warpgroup, consumers, count, self.number, b.plan.depth, s.ring_full, s.ring_free, stage, carry,
            release=release,
        )  # fmt: skip

    def after(self, count: Any) -> Any:
        """The count after these stages."""
        return count + self.number


def over_tiles(
    b: Block,
    phase: ProductPhase,
    count: Any,
    visit: Callable[[TileStages, Any], Any],
    *,
    fill: Callable[[Any, Any, Any], Any] | None = None,
    carry: Any = None,
    unroll: bool = False,
) -> Any:
    """Fold ``visit(stages, count)`` over the tiles of a phase, and return the count after them.

    ``fill(chunk, first_step, carry)`` runs before the tiles of a chunk. With ``unroll`` a tile is a Python integer: the
    producer's copies have static shapes."""
    p = b.product(phase)

    def one_chunk(chunk: Any, state: tuple[Any, Any]) -> tuple[Any, Any]:
        count, carry = state
        first_step = chunk * p.held_steps
        steps = jnp.minimum(p.split_steps - first_step, p.held_steps)
        if fill is not None:
            carry = fill(chunk, first_step, carry)

        def one_tile(tile: Any, count: Any) -> Any:
            return visit(TileStages(p, b.index, chunk, tile, first_step, steps), count)

        return loop(p.wgmma_tiles, one_tile, count, unroll=unroll), carry

    return loop(p.chunks, one_chunk, (count, carry))[0]


def over_items(b: Block, count: int, visit: Callable[[Any, Any], None]) -> None:
    """``visit(item, turn)`` for this block's share of ``count`` work items, which the blocks are dealt in turn."""

    def one_turn(turn: Any, _: Any) -> None:
        visit(turn * b.plan.blocks + b.index, turn)

    lax.fori_loop(0, (count - b.index + b.plan.blocks - 1) // b.plan.blocks, one_turn, None)


def loop(times: int, body: Callable[[Any, Any], Any], carry: Any, *, unroll: bool = False) -> Any:
    """A loop whose code exists once; without a loop where once is enough."""
    if unroll:
        for i in range(times):
            carry = body(i, carry)
        return carry
    return body(jnp.int32(0), carry) if times == 1 else lax.fori_loop(0, times, body, carry)

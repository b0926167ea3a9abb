"""A ring of stages in shared memory: what its producer and its consumers do with the two barriers of every slot.

``full`` completes when a slot's copies have arrived, ``free`` when its readers are done. Stages are counted over the
whole life of a block, so that the ring runs ahead from one work tile into the next.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def acquire(count: Any, depth: int, free: Any) -> Any:
    """The slot of stage ``count``, once its previous contents have been read."""
    slot = lax.rem(count, depth)

    @pl.when(count >= depth)
    def _() -> None:
        plgpu.barrier_wait(free.at[slot])

    return slot


def drain(count: Any, depth: int, free: Any) -> None:
    """Wait until the last of ``count`` stages have been read. Every completion of a barrier must be waited for before
    the block ends."""

    def wait(i: Any, _: Any) -> None:
        plgpu.barrier_wait(free.at[lax.rem(i, depth)])

    lax.fori_loop(jnp.maximum(count - depth, 0), count, wait, None)


def first_own_stage(me: Any, consumers: int, count: Any) -> Any:
    """How many stages from ``count`` on come before the first of consumer ``me``. Consumers take stages in turn."""
    return lax.rem(me + consumers - lax.rem(count, consumers), consumers)


def fold_own_stages(me: Any, consumers: int, count: Any, stages: Any, depth: int, full: Any, free: Any,
              stage: Callable[[Any, Any, Any], Any], carry: Any, *, release: bool = True) -> Any:  # fmt: skip
    """Fold ``stage(number, slot, carry)`` over those of the next ``stages`` that are this consumer's. Without
    ``release``, ``stage`` itself must arrive at the ``free`` barrier of its slot.

    A slot always belongs to the same consumer, so ``depth`` must be a multiple of ``consumers``: a warpgroup tracks the
    phase of a barrier by waiting for every one."""
    first = first_own_stage(me, consumers, count)

    def body(j: Any, carry: Any) -> Any:
        number = first + j * consumers
        slot = lax.rem(count + number, depth)
        plgpu.barrier_wait(full.at[slot])
        carry = stage(number, slot, carry)
        if release:
            plgpu.barrier_arrive(free.at[slot])
        return carry

    return lax.fori_loop(0, (stages - first + consumers - 1) // consumers, body, carry)


def consumer_barrier(barrier: Any) -> None:
    """Wait until all consumers of the block have come here."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


@dataclasses.dataclass(frozen=True)
class TileRing:
    """Tiles on their way from the producer to the consumers. Tile j is number ``first + j`` of all tiles."""

    smem: Any
    full: Any
    free: Any
    stages: int
    first: Any = 0

    def from_here(self, first: Any) -> "TileRing":
        """The same ring, with tile 0 at this number."""
        return dataclasses.replace(self, first=first)

    def slot(self, j: Any) -> Any:
        """The slot of tile j."""
        return lax.rem(self.first + j, self.stages)

    def tile(self, j: Any) -> Any:
        """Tile j in shared memory."""
        return self.smem.at[self.slot(j)]

    def fetch(self, j: Any, load: Callable[[Any, Any], None]) -> None:
        """Start to load tile j as soon as its slot is free: ``load(tile, barrier)`` issues the copies."""
        slot = acquire(self.first + j, self.stages, self.free)
        load(self.smem.at[slot], self.full.at[slot])

    def wait(self, j: Any) -> None:
        """Wait for tile j."""
        plgpu.barrier_wait(self.full.at[self.slot(j)])

    def release(self, j: Any) -> None:
        """This warpgroup is done with tile j."""
        plgpu.barrier_arrive(self.free.at[self.slot(j)])

    def drain(self) -> None:
        """Wait until the last tiles before ``first`` are released, see `drain`."""
        drain(self.first, self.stages, self.free)

"""How the two consumers of a product for many rows hand chunks of their sums to each other, through shared memory."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


@dataclass(frozen=True)
class Trade:
    """What one consumer gives and takes. ``other`` may be itself, ``me``: of a whole head, laid down twice in a row,
    the halves come back in the other order, and there is room for one chunk instead of two."""

    me: Any
    other: Any
    part: int  # outputs of a chunk
    traded: Any  # [consumers, 2 * part, chunk]
    given: Any  # barriers, two of each consumer
    taken: Any

    @property
    def slots(self) -> int:
        """How many chunks may have been given and not yet been taken."""
        return 1 if self.other is self.me else 2

    def give(self, mine: jax.Array, i: int) -> None:
        """Give the ``i``-th chunk of a tile."""
        slot = i % self.slots
        if i >= self.slots:
            plgpu.barrier_wait(self.taken.at[2 * self.me + slot])
        for place in range(slot, 2, self.slots):
            self.traded[self.me, pl.ds(place * self.part, self.part)] = mine.astype(self.traded.dtype)
        plgpu.barrier_arrive(self.given.at[2 * self.me + slot])

    def take(self, i: int) -> jax.Array:
        """The ``i``-th chunk that is given here."""
        slot = i % self.slots
        plgpu.barrier_wait(self.given.at[2 * self.other + slot])
        first = slot * self.part if self.slots == 2 else self.part // 2
        place = self.traded.at[self.other, pl.ds(first, self.part)]
        received = plgpu.load(place, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
        plgpu.barrier_arrive(self.taken.at[2 * self.other + slot])
        return received

    def end(self, chunks: int) -> None:
        """Wait until all ``chunks`` of a tile are taken."""
        for i in range(min(self.slots, chunks)):
            plgpu.barrier_wait(self.taken.at[2 * self.me + i])

"""How the two consumers of a large-M GEMM exchange chunks of their sums through shared memory."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

Ref = Any  # Pallas has no public type for a reference


@dataclass(frozen=True)
class Exchange:
    """What one consumer sends and receives.

    A consumer that owns a whole head exchanges with itself (``other`` is ``me``): it writes the chunk twice back to
    back and reads from the middle. That swaps its halves, as rotate-half needs. There is then room for one chunk
    instead of two."""

    me: Any
    other: Any
    consumer_out: int  # outputs of a chunk
    exchanged: Ref  # [consumers, 2 * consumer_out, chunk]
    sent: Ref  # barriers, two a consumer
    received: Ref

    @property
    def slots(self) -> int:
        """How many chunks may have been sent and not yet received."""
        return 1 if self.other is self.me else 2

    def send(self, chunk: jax.Array, i: int) -> None:
        """Send the ``i``-th chunk of a tile."""
        slot = i % self.slots
        if i >= self.slots:
            plgpu.barrier_wait(self.received.at[2 * self.me + slot])
        for copy in range(slot, 2, self.slots):
            self.exchanged[self.me, pl.ds(copy * self.consumer_out, self.consumer_out)] = chunk.astype(
                self.exchanged.dtype
            )
        plgpu.barrier_arrive(self.sent.at[2 * self.me + slot])

    def receive(self, i: int) -> jax.Array:
        """The ``i``-th chunk that the other consumer sends."""
        slot = i % self.slots
        plgpu.barrier_wait(self.sent.at[2 * self.other + slot])
        first = slot * self.consumer_out if self.slots == 2 else self.consumer_out // 2
        place = self.exchanged.at[self.other, pl.ds(first, self.consumer_out)]
        chunk = plgpu.load(place, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
        plgpu.barrier_arrive(self.received.at[2 * self.other + slot])
        return chunk

    def finish(self, chunks: int) -> None:
        """Wait until all ``chunks`` of a tile have been received."""
        for i in range(min(self.slots, chunks)):
            plgpu.barrier_wait(self.received.at[2 * self.me + i])

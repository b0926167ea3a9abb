"""The barrier of the whole grid between two phases.

A launch waits forever if its blocks are not all on the device at once. There are therefore never more blocks than
multiprocessors, one on each; `checks.check` refuses any other grid.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .block import Block
from .phase import Phase
from .plan import StepPlan


@dataclass(frozen=True)
class GridBarrier:
    """A count of arrivals, in a semaphore of the device. With a single block it is the consumer barrier alone."""

    arrivals: Any  # None with a single block

    @staticmethod
    def of(plan: StepPlan) -> "GridBarrier":
        """The barrier of a launch."""
        return GridBarrier(pl.get_global(plgpu.SemaphoreType.REGULAR) if plan.blocks > 1 else None)

    def wait(self, b: Block, phase: Phase) -> None:
        """Wait until every block is done with the phases before this one."""
        if self.arrivals is None:
            b.consumer_barrier()
            return
        wanted = b.plan.arrivals_before(phase, b.layer)
        complete = self._poll(b, phase, wanted) if b.plan.spin_limit else True

        @pl.when(complete)
        def _() -> None:
            plgpu.semaphore_wait(self.arrivals, wanted, decrement=False, memory_scope="gpu")

    def arrive(self, b: Block) -> None:
        """Say that this block is done with a phase."""
        if self.arrivals is not None:
            b.consumer_barrier()
            pl.when(b.warpgroup == 0)(lambda: plgpu.semaphore_signal(self.arrivals, memory_scope="gpu"))

    def _poll(self, b: Block, phase: Phase, wanted: Any) -> Any:
        """Hang detector: poll the grid barrier up to `spin_limit` times, then report phase and layer and stop waiting,
        in later phases too. Returns whether all blocks arrived."""
        gave_up = b.scratch.gave_up
        limit = jnp.where(gave_up[b.warpgroup] > 0, 0, b.plan.spin_limit)

        def waiting(state: Any) -> Any:
            return (state[0] < limit) & (state[1] < wanted)

        seen = pl.semaphore_read(self.arrivals)
        poll = lambda state: (state[0] + 1, pl.semaphore_read(self.arrivals))  # noqa: E731
        _, seen = lax.while_loop(waiting, poll, (jnp.int32(0), seen))
        # Each thread has read the count at another time. All go on with what one of them saw: if some gave up and some
        # did not, the next barrier would wait forever.
        b.scratch.arrived[0] = seen
        b.consumer_barrier()
        seen = b.scratch.arrived[0]

        @pl.when((seen < wanted) & (limit > 0))
        def _() -> None:
            message = f"decode_step: block {{}} stopped waiting for {phase.name} of layer {{}}: {{}} of {{}} arrived"
            pl.debug_print(message, b.index, b.layer, seen, wanted)
            gave_up[b.warpgroup] = 1

        return seen >= wanted

"""A ring of stages in shared memory: what its producer and its consumers do with the two barriers of every slot.

``full`` completes when a slot's copies have arrived, ``free`` when its readers are done. Stages are counted over the
whole life of a block, so that the ring runs ahead from one piece of work to the next.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def claim(count: Any, depth: int, free: Any) -> Any:
    """The slot of stage ``count``, once nobody reads what was in it."""
    slot = lax.rem(count, depth)

    @pl.when(count >= depth)
    def _() -> None:
        plgpu.barrier_wait(free.at[slot])

    return slot


def drain(count: Any, depth: int, free: Any) -> None:
    """Wait for the last of ``count`` stages to be used: a barrier's every completion must be awaited before the block
    ends."""

    def wait(i: Any, _: Any) -> None:
        plgpu.barrier_wait(free.at[lax.rem(i, depth)])

    lax.fori_loop(jnp.maximum(count - depth, 0), count, wait, None)


def first_of_mine(me: Any, consumers: int, count: Any) -> Any:
    """How many of the stages from ``count`` on precede the first of consumer ``me``: they take stages in turn."""
    return lax.rem(me + consumers - lax.rem(count, consumers), consumers)


def my_stages(me: Any, consumers: int, count: Any, stages: Any, depth: int, full: Any, free: Any,
              stage: Callable[[Any, Any, Any], Any], carry: Any, *, release: bool = True) -> Any:  # fmt: skip
    """Fold ``stage(number, slot, carry)`` over those of the next ``stages`` that are this consumer's. Without
    ``release`` a stage says by itself that its slot is ``free``.

    A slot always belongs to the same consumer (``depth`` is a multiple of ``consumers``): a warpgroup keeps count of a
    barrier's phases by waiting for each of them."""
    first = first_of_mine(me, consumers, count)

    def body(j: Any, carry: Any) -> Any:
        number = first + j * consumers
        slot = lax.rem(count + number, depth)
        plgpu.barrier_wait(full.at[slot])
        carry = stage(number, slot, carry)
        if release:
            plgpu.barrier_arrive(free.at[slot])
        return carry

    return lax.fori_loop(0, (stages - first + consumers - 1) // consumers, body, carry)


def together(barrier: Any) -> None:
    """All consumers of the block meet here."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def consumer_registers(consumers: int, producer: int) -> int:
    """What a thread of a consumer may have once the producer has given up all but ``producer`` registers."""
    each = 65536 // (128 * (consumers + 1)) // 8 * 8  # what the launch gives
    return min(240, (each + (each - producer) // consumers) // 8 * 8)

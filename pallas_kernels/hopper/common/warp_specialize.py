"""A block split by role: one producer warpgroup issues copies, the others are consumers and compute.

The producer needs few registers. It gives the rest to the consumers, whose accumulators fill theirs.
"""

from collections.abc import Callable
from typing import Any

from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .thread_ops import WARPGROUP_SIZE

REGISTER_FILE = 65536  # 32-bit registers of a multiprocessor
MAX_REGISTERS = 240  # that a thread asks for: the hardware's limit is 255, in steps of 8


def warp_specialize(
    warpgroup: Any,
    producer: Callable[[], None],
    consumer: Callable[[], None],
    *,
    consumers: int,
    producer_registers: int | None,
) -> None:
    """Run ``consumer`` in warpgroups 0 to ``consumers - 1`` and ``producer`` in the one after them.

    ``warpgroup`` is the index of this warpgroup. ``producer_registers`` is how many registers a thread of the producer
    keeps. With None (the interpreter) or one consumer, which has enough, all warpgroups keep those of the launch.
    """
    registers = producer_registers if consumers > 1 else None

    @pl.when(warpgroup == consumers)
    def _() -> None:
        if registers is not None:
            plgpu.set_max_registers(registers, action="decrease")
        producer()

    @pl.when(warpgroup < consumers)
    def _() -> None:
        if registers is not None:
            plgpu.set_max_registers(consumer_registers(consumers, registers), action="increase")
        consumer()


def consumer_registers(consumers: int, producer: int) -> int:
    """Registers of a consumer's thread once the producer keeps ``producer`` of its own."""
    at_launch = launch_registers(consumers)
    return min(MAX_REGISTERS, (at_launch + (at_launch - producer) // consumers) // 8 * 8)


def launch_registers(consumers: int) -> int:
    """Registers of every thread at the launch. ptxas refuses a single instruction that needs more."""
    return min(MAX_REGISTERS, REGISTER_FILE // (WARPGROUP_SIZE * (consumers + 1)) // 8 * 8)

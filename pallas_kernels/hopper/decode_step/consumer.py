"""The consumers: the warpgroups that compute."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
from jax.experimental import pallas as pl

from .block import Block
from .grid import GridBarrier
from .phase import ItemPhase, Phase, ProductPhase
from .product import product
from .schedule import over_phases


def consume(b: Block, barrier: GridBarrier) -> None:
    """A consumer's whole step."""

    def visit(phase: Phase, layer: Any, count: Any) -> Any:
        here = replace(b, layer=layer)
        run = prepare(here, phase, count)
        with jax.named_scope(f"wait_{phase.name}"):
            barrier.wait(here, phase)
        with jax.named_scope(phase.name):
            count = run()
            if phase is not b.plan.head:
                barrier.arrive(here)
        return count

    if b.plan.spin_limit:
        b.scratch.gave_up[b.warpgroup] = 0
    if b.plan.shape.devices > 1:
        b.ops.find_peers(b)
    over_phases(b.plan, visit)


def prepare(b: Block, phase: Phase, count: Any) -> Callable[[], Any]:
    """Do what can be done before the grid barrier. Returns what is left to do after it, which gives the count of stages
    after the phase."""
    if isinstance(phase, ProductPhase):
        return product(b, phase, count)
    assert isinstance(phase, ItemPhase)
    return _items(b, phase, count)


def _items(b: Block, phase: ItemPhase, count: Any) -> Callable[[], Any]:
    """One consumer computes, the others wait."""
    b.consumer_barrier()  # all are done with the sums of the previous phase, whose memory the prefetch may overwrite
    pl.when(b.warpgroup == 0)(lambda: phase.prefetch(b))

    def run() -> Any:
        pl.when(b.warpgroup == 0)(lambda: phase.work(b))
        return count

    return run

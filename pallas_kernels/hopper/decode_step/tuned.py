"""How this device runs a step of given sizes."""

from dataclasses import replace

from ...arch import planned
from ..common.tiles import Format
from .phase import Phase
from .plan import StepPlan, StepShape, StepTiles, plan_step
from .table import HEAD, LAYER_PHASES


def tiles_for(fmt: Format) -> StepTiles:
    """What was quickest on an H200. More stages of int4 in flight only delay the signals between blocks."""
    if not fmt.quantized:
        return StepTiles(step=128)
    return StepTiles(step=256, depth=10) if fmt.bits == 4 else StepTiles(step=256)


def ring_fits(plan: StepPlan) -> bool:
    """Whether every consumer can multiply one stage while another arrives."""
    return plan.depth >= 2 * plan.tiles.consumers


def plan_for_device(
    shape: StepShape,
    tiles: StepTiles | None = None,
    blocks: int | None = None,
    layer_phases: tuple[Phase, ...] = LAYER_PHASES,
) -> StepPlan:
    """The plan for a block on every multiprocessor; with less of x at a time where that leaves too little shared memory
    for the ring."""
    blocks, wanted = blocks or planned().sms, tiles or tiles_for(shape.fmt)
    plan = plan_step(shape, wanted, blocks, layer_phases, HEAD)
    if tiles or ring_fits(plan):
        return plan
    return plan_step(shape, replace(wanted, chunk=2048), blocks, layer_phases, HEAD)

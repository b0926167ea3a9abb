"""What a phase of the decode step is. The phases themselves are the table in `table`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import jax

if TYPE_CHECKING:
    from .block import Block

# Fields of `StepBuffers`.
BufferName = Literal["x", "x_mid", "qkv", "parts", "logs", "hidden", "logits", "exchange", "k", "v"]
WeightName = Literal["wqkv", "wo", "w_gate_up", "w_down", "head"]  # fields of `StepWeights`
GainName = Literal["attn_norm", "ffn_norm", "norm"]  # fields of `StepWeights`
SizeName = Literal["dim", "hidden", "q_width", "qkv_width", "vocab"]  # fields and properties of `StepShape`


@dataclass(frozen=True)
class Phase:
    """What all blocks do between two grid barriers.

    ``reads``: buffers that other blocks wrote in earlier phases. ``writes``: buffers that this phase fills."""

    name: str
    reads: tuple[BufferName, ...]
    writes: tuple[BufferName, ...]


@dataclass(frozen=True)
class Prologue:
    """How a product's x is made, in two parts, so that loads are in flight while something else is computed.

    ``fetch(token, first_step)`` loads what ``make`` turns into this consumer's units of a chunk, each [4, 32, 8]."""

    fetch: Callable[[Any, Any], Any]
    make: Callable[[Any], list[jax.Array]]


# float32 sums of each half, and the residual or None -> the float32 result; all are [n].
Epilogue = Callable[[list[jax.Array], jax.Array | None], jax.Array]


@dataclass(frozen=True, kw_only=True)
class ProductPhase(Phase):
    """A phase that multiplies with a weight: prologue, x · weightᵀ, epilogue. It writes one buffer.

    A product phase must not write what it reads: every block reads all of x, and the last block's N tile may overlap
    its neighbour's (see `ProductPlan.first_row`), so that both compute the same outputs from the same inputs."""

    weight: WeightName
    inner: SizeName
    outer: SizeName  # of each half
    prologue: Callable[["Block", "ProductPhase"], Prologue]  # makes x of the first buffer that the phase reads
    epilogue: Epilogue  # makes the output of the sums
    halves: int = 1  # weights stacked in one array whose outputs the epilogue combines, like gate and up
    gain: GainName | None = None  # of the prologue's norm
    residual: BufferName | None = None  # what the epilogue adds; prefetched: the previous phase must not write it
    over_devices: bool = False  # whether its inputs are divided over the devices that share the model: see `exchange`
    scale_slot: int = 0  # where the scales of int4 weights lie; phases in a row should alternate


@dataclass(frozen=True, kw_only=True)
class ItemPhase(Phase):
    """A phase without a weight: work items that are dealt out to the blocks, computed by one warpgroup of each."""

    prefetch: Callable[["Block"], None]  # runs before the grid barrier: reads only what no block writes
    work: Callable[["Block"], None]


def check_table(layer_phases: tuple[Phase, ...], head: ProductPhase) -> None:
    """Raise `ValueError` where phases do not fit together: they would read what another block is about to write."""
    names = [phase.name for phase in (*layer_phases, head)]
    if len(set(names)) < len(names):
        raise ValueError(f"phases must have different names, found {', '.join(names)}")
    written: set[str] = {"x", "k", "v"}
    before = layer_phases[-1]  # of the first phase of all layers but the first
    for phase in (*layer_phases, head):
        if missing := set(phase.reads) - written:
            raise ValueError(f"{phase.name}: no earlier phase writes {', '.join(sorted(missing))}")
        if isinstance(phase, ProductPhase):
            if phase.over_devices and (phase.halves > 1 or phase is head):
                raise ValueError(f"{phase.name}: only a phase of every layer with one half can be summed over devices")
            if phase.residual in before.writes:
                found = f"{before.name} writes its residual {phase.residual}"
                raise ValueError(f"{phase.name}: {found}, which is prefetched before that phase ends")
            if {*phase.reads, phase.residual} & set(phase.writes):
                raise ValueError(f"{phase.name}: a product phase must not write what it reads, {phase.writes[0]}")
        written |= set(phase.writes)
        before = phase

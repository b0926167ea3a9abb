"""What every function of the kernel's body is given: which block, warpgroup and layer it runs for, and on what."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from ..common import ring
from .memory import AttentionScratch, ProductScratch, Ref, Scratch, StepBuffers, StepInputs
from .phase import ProductPhase
from .plan import ProductPlan, StepPlan


@dataclass(frozen=True)
class TileOps:
    """Operations that Pallas cannot express: which thread reads and writes which element. `thread_ops` has them in
    Mosaic's terms, `interpreted` has their meaning in jax.numpy."""

    load: Callable[..., jax.Array]
    load_units: Callable[..., list[list[jax.Array]]]
    load_rows: Callable[..., list[jax.Array]]
    load_scalars: Callable[..., list[jax.Array]]
    rotate_heads: Callable[..., jax.Array]
    broadcast_to_unit: Callable[..., jax.Array]
    store_x: Callable[..., None]
    load_scales: Callable[..., jax.Array]
    combine_limbs: Callable[..., jax.Array]
    store_sums: Callable[..., None]
    load_int4: Callable[..., Any]
    find_peers: Callable[..., None]
    send: Callable[..., None]
    receive: Callable[..., jax.Array]
    int4_frees_slot: bool  # whether `load_int4` says by itself that the ring's slot is free


@dataclass(frozen=True)
class Block:
    """One warpgroup of one block, in one layer."""

    plan: StepPlan
    inputs: StepInputs
    buffers: StepBuffers
    scratch: Scratch
    ops: TileOps
    index: Any  # of the block
    warpgroup: Any  # consumers from 0 on; the producer is the last
    layer: Any = 0

    def product(self, phase: ProductPhase) -> ProductPlan:
        """How the phase's product is tiled."""
        return self.plan.product(phase)

    def memory(self, phase: ProductPhase) -> ProductScratch:
        """The phase's x and sums in shared memory."""
        return self.scratch.overlay[self.plan.product_phases.index(phase)]

    @property
    def attention(self) -> AttentionScratch:
        """Attention's tiles in shared memory."""
        return self.scratch.overlay[len(self.plan.product_phases)]

    @property
    def attention_output(self) -> Ref:
        """Attention's output [64, head_dim] in shared memory: it takes the place of the keys."""
        return self.scratch.overlay[len(self.plan.product_phases) + 1]

    def scales(self, phase: ProductPhase) -> Ref:
        """The phase's scales in shared memory."""
        return self.scratch.scales[phase.scale_slot][self.plan.scale_slots[phase.scale_slot].index(phase)]

    def weight(self, phase: ProductPhase) -> tuple[Ref, Ref]:
        """The phase's weight in global memory, and its scales: those of this layer."""
        weight = getattr(self.inputs.weights, phase.weight)
        data, scale = (weight.data, weight.scale) if self.plan.shape.fmt.quantized else (weight, None)
        if phase is self.plan.head:
            return data, scale
        return data.at[self.layer], None if scale is None else scale.at[self.layer]

    def gain(self, phase: ProductPhase) -> Ref:
        """The gain of the phase's norm: that of this layer."""
        assert phase.gain is not None
        gain = getattr(self.inputs.weights, phase.gain)
        return gain if phase is self.plan.head else gain.at[self.layer]

    def consumer_barrier(self) -> None:
        """The consumer barrier: all consumers of the block wait for one another."""
        ring.consumer_barrier(self.scratch.consumers)

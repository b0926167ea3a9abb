"""What exists only for Pallas's interpreter on a CPU, which has no semaphores between blocks and no wgmma with its left
operand in registers: a launch per phase, and the operations of `thread_ops` in jax.numpy.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..common.limbs import INT4_FACTOR, lowest_limb_value, split_into_limbs
from ..common.thread_ops import WARPGROUP_SIZE
from ..common.tiles import WGMMA_ROWS
from .block import Block, TileOps
from .consumer import prepare
from .launch import call
from .memory import BufferName, Ref, StepBuffers, StepInputs, buffer_shapes, written_columns
from .outputs import own_outputs
from .phase import Phase, ProductPhase
from .plan import LIMB_BLOCK, LIMBS, UNIT_COLUMNS, StepPlan
from .producer import copy_phase, drain


def launch_per_phase(
    plan: StepPlan, inputs: Sequence[StepInputs], buffers: Sequence[StepBuffers], interpret: Any
) -> list[StepBuffers]:
    """The phases of a step, each in a launch of its own: its end is the grid barrier. Of every device that shares the
    model there are inputs and buffers: they are simulated one after the other, and the exchange lies between two
    launches."""
    launch = jax.jit(functools.partial(_launch_phase, plan, interpret), static_argnums=(0, 1))

    def all_devices(work: Callable[..., Any], phase: Phase, layer: int, buffers: Sequence[StepBuffers]) -> Any:
        # The interpreter simulates one launch at a time.
        at = jnp.full(1, layer, jnp.int32)
        return [jax.block_until_ready(launch(work, phase, at, *both)) for both in zip(inputs, buffers, strict=True)]

    for layer in range(plan.shape.layers):
        for phase in plan.layer_phases:
            buffers = all_devices(_whole_phase, phase, layer, buffers)
            if isinstance(phase, ProductPhase) and plan.exchanges(phase):
                buffers = all_devices(_receive_only, phase, layer, _exchanged(buffers))
    return all_devices(_whole_phase, plan.head, 0, buffers)


def _launch_phase(
    plan: StepPlan,
    interpret: Any,
    work: Callable[[Block, Phase], None],
    phase: Phase,
    layer: jax.Array,
    inputs: StepInputs,
    buffers: StepBuffers,
) -> StepBuffers:
    return call(
        plan, INTERPRETED, lambda b: work(b, phase), inputs, buffers, f"decode_step_{phase.name}", interpret, layer
    )


def _whole_phase(b: Block, phase: Phase) -> None:
    @pl.when(b.warpgroup == b.plan.tiles.consumers)
    def _() -> None:
        products = (phase,) if isinstance(phase, ProductPhase) else ()
        count = jnp.int32(0)
        for one in products:
            count = copy_phase(b, one, count, scale_fills=jnp.int32(0))
        drain(b, count, products)

    @pl.when(b.warpgroup < b.plan.tiles.consumers)
    def _() -> None:
        prepare(b, phase, jnp.int32(0))()


def _receive_only(b: Block, phase: ProductPhase) -> None:
    """What a phase does after the exchange."""
    pl.when(b.warpgroup < b.plan.tiles.consumers)(lambda: own_outputs(b, phase).receive())


def _exchanged(buffers: Sequence[StepBuffers]) -> list[StepBuffers]:
    """What all devices have after an exchange: each has put its words where the first device's belong."""
    own = jnp.stack([one.exchange[:, 0] for one in buffers], axis=1)  # [2, devices, tokens, dim, 2]
    return [replace(one, exchange=own) for one in buffers]


def in_whole_steps(plan: StepPlan, weight: Any) -> Any:
    """A weight with zeros where TMA would read beyond the end of a row."""

    def padded(a: jax.Array) -> jax.Array:
        return jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, -a.shape[-1] % plan.tiles.step)])

    return replace(weight, data=padded(weight.data)) if plan.shape.fmt.quantized else padded(weight)


def nan_buffers(plan: StepPlan) -> dict[BufferName, jax.Array]:
    """Buffers before a step, full of NaN where a phase must write before another reads."""

    def buffer(name: BufferName, shape: jax.ShapeDtypeStruct) -> jax.Array:
        if shape.dtype == jnp.int32:
            return jnp.zeros(shape.shape, shape.dtype)
        nan = jnp.full(shape.shape, jnp.nan, shape.dtype)
        return nan.at[..., written[name] :].set(0) if name in written else nan

    written = written_columns(plan)
    return {name: buffer(name, shape) for name, shape in buffer_shapes(plan).items()}


# The operations of `thread_ops`


def _load(ref: Ref, layout: Any) -> jax.Array:
    return plgpu.load(ref, layout=layout, optimized=False)


def _load_units(rows: Ref, begins: Sequence[Any], neighbours: int = 8) -> list[list[jax.Array]]:
    shape = (4, 32, 8) if neighbours == 8 else (4, 32)
    size = math.prod(shape)
    return [
        [rows[(*row, pl.ds(begin, size))].reshape(shape) for begin in begins] for row in np.ndindex(rows.shape[:-1])
    ]


def _load_rows(rows: Ref, numbers: Sequence[Any]) -> list[jax.Array]:
    return [rows[number] for number in numbers]


def _load_scalars(numbers: Ref, places: Sequence[tuple[Any, ...]]) -> list[jax.Array]:
    return [numbers[place] for place in places]


def _rotate_heads(b: Block, head: Any, count: int) -> jax.Array:
    half = b.plan.shape.head_dim // 2
    cos, sin = b.inputs.cos[...], b.inputs.sin[...]

    def rotated(head: Any) -> jax.Array:
        a, c = (b.buffers.qkv[:, pl.ds((2 * head + i) * half, half)].astype(jnp.float32) for i in range(2))
        return jnp.concatenate([a * cos - c * sin, c * cos + a * sin], axis=1).astype(jnp.bfloat16)

    return jnp.concatenate([rotated(head + i) for i in range(count)])


def _broadcast_to_unit(factors: jax.Array) -> jax.Array:
    return lax.broadcast_in_dim(factors, (4, 32, 8), (0, 1))


def _store_x(b: Block, phase: ProductPhase, units: Sequence[jax.Array], numbers: Sequence[Any], token: Any) -> None:
    p = b.product(phase)
    for unit, number in zip(units, numbers, strict=True):

        @pl.when(number < p.k_splits * p.held_units)
        def _(unit: jax.Array = unit, number: Any = number) -> None:
            split, at = lax.div(number, p.held_units), lax.rem(number, p.held_units)
            _store_unit(b, phase, unit, split, at * (UNIT_COLUMNS // p.step), token)


def _store_unit(b: Block, phase: ProductPhase, unit: jax.Array, split: Any, step: Any, token: Any) -> None:
    p, memory, shape = b.product(phase), b.memory(phase), b.plan.shape
    column, steps = split * shape.columns + token * shape.limbs, UNIT_COLUMNS // p.step
    rows: Any = [unit]
    if shape.fmt.quantized:
        rows, scale = split_into_limbs(unit.reshape(-1, LIMB_BLOCK))
        for i in range(UNIT_COLUMNS // LIMB_BLOCK):
            lowest = scale[i] * lowest_limb_value(LIMBS, shape.fmt.bits)
            memory.limb_scales[step * p.step // LIMB_BLOCK + i, split * shape.token_slots + token] = lowest
    for limb, row in enumerate(rows):
        for i in range(steps):
            memory.x.at[step + i, column + limb][...] = row.reshape(steps, p.step)[i]


def _load_scales(b: Block, phase: ProductPhase, tile: Any, group: Any) -> jax.Array:
    p, scales, size = b.product(phase), b.scales(phase), b.plan.shape.fmt.group or 1
    groups, split_groups = p.inner // size, p.split_steps * p.step // size
    stacked = jnp.minimum(tile * WGMMA_ROWS + lax.iota(jnp.int32, WGMMA_ROWS), p.stacked_rows - 1)
    part, row = stacked // p.n_tile, stacked % p.n_tile
    flat = scales[:, : p.n_tile // 8].reshape(p.halves * p.n_tile * groups)
    column = jnp.minimum(group + part % p.k_splits * split_groups, groups - 1)
    return flat[((part // p.k_splits) * p.n_tile + row) * groups + column].astype(jnp.float32)


def _combine_limbs(b: Block, phase: ProductPhase, sums: jax.Array, limb_scales: Ref, scales: list[jax.Array],
                   tile: Any, total: jax.Array) -> jax.Array:  # fmt: skip
    p, slots = b.product(phase), b.plan.shape.token_slots
    split = (tile * WGMMA_ROWS + jnp.arange(WGMMA_ROWS)) // p.n_tile % p.k_splits
    limbs = sums.reshape(WGMMA_ROWS, p.k_splits, slots, LIMBS)
    whole = functools.reduce(lambda a, b: a * 256 + b, [limbs[..., i] for i in range(LIMBS)])
    own = jnp.take_along_axis(whole, split[:, None, None], axis=1)[:, 0]
    scale = functools.reduce(lambda a, b: a * b[:, None], scales, limb_scales[...].reshape(p.k_splits, slots)[split])
    return total + own.astype(jnp.float32) * scale


def _store_sums(b: Block, sums: Ref, total: jax.Array, tile: Any, accumulate: Any) -> None:
    del b
    here = sums.at[:, pl.ds(tile * WGMMA_ROWS, WGMMA_ROWS)]
    here[...] = jnp.where(accumulate, here[...], 0) + total.T


def _load_int4(b: Block, slot: Any, ranges: int) -> Ref:
    """One array, in shared memory instead of in registers; the slot is free once the product is done."""
    del ranges
    bytes_of_consumer = b.scratch.int8_weights.at[b.warpgroup]
    bytes_of_consumer[...] = b.scratch.ring.at[slot][...].astype(jnp.int8) * INT4_FACTOR
    plgpu.commit_smem()
    return bytes_of_consumer


def _find_peers(b: Block) -> None:
    del b


def _send(b: Block, phase: ProductPhase, token: Any, outer: Any, lowest: Any, sums: jax.Array, count: int) -> None:
    """The words of this device, where those of the first belong: see `_exchanged`."""
    number = b.plan.exchange_number(phase, b.layer)
    place = b.buffers.exchange.at[lax.rem(number, 2), 0, token, pl.ds(outer, count)]
    words = jnp.stack([lax.bitcast_convert_type(sums[:count], jnp.int32), jnp.full(count, number, jnp.int32)], axis=-1)
    own = (outer + jnp.arange(count) >= lowest)[:, None]
    place[...] = jnp.where(own, words, place[...])


def _receive(b: Block, phase: ProductPhase, token: Any, outer: Any, count: int) -> jax.Array:
    number = b.plan.exchange_number(phase, b.layer)
    words = [
        b.buffers.exchange[lax.rem(number, 2), device, token, pl.ds(outer, count)]
        for device in range(b.plan.shape.devices)
    ]
    parts = [jnp.where(w[:, 1] == number, lax.bitcast_convert_type(w[:, 0], jnp.float32), jnp.nan) for w in words]
    total = functools.reduce(jnp.add, parts)
    return jnp.concatenate([total, jnp.broadcast_to(total[-1:], (WARPGROUP_SIZE - count,))])


INTERPRETED = TileOps(
    _load, _load_units, _load_rows, _load_scalars, _rotate_heads, _broadcast_to_unit, _store_x,
    _load_scales, _combine_limbs, _store_sums, _load_int4, _find_peers, _send, _receive, int4_frees_slot=False,
)  # fmt: skip

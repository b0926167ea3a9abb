"""A decode step from arrays to arrays: what is done before and after the launch."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from ...quantized import QuantizedTensor
from ...step_weights import StepWeights
from .checks import shape_of
from .interpreted import INTERPRETED, in_whole_steps, launch_per_phase, nan_buffers
from .launch import launch_step
from .memory import StepBuffers, StepInputs, empty_buffers
from .phase import Phase
from .plan import MAX_TOKENS, StepPlan, StepTiles, scales_in_line
from .table import LAYER_PHASES
from .thread_ops import MOSAIC
from .tuned import plan_for_device


def run_phases(
    x: jax.Array,
    weights: StepWeights,
    k: jax.Array,
    v: jax.Array,
    start: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    eps: float,
    table: jax.Array | None = None,
    axis: str | None = None,
    tiles: StepTiles | None = None,
    blocks: int | None = None,
    spin_limit: int = 0,
    interpret: Any = None,
    layer_phases: tuple[Phase, ...] = LAYER_PHASES,
) -> StepBuffers:
    """The step, and what its phases left behind: buffers as the last layer left them, logits and the cache. ``axis``:
    under `jax.shard_map`, the mesh axis along which other devices have the rest of the model.

    ``spin_limit`` finds out why a step hangs: a block polls the grid barrier so many times, and each word of an
    exchange, then prints which phase it waited for and goes on, to wrong results. 0: it waits forever."""
    plan = plan_for_device(shape_of(x, weights, k, eps, table, axis), tiles, blocks, layer_phases)
    plan = replace(plan, interpret=bool(interpret), spin_limit=spin_limit)
    inputs, buffers = step_arrays(plan, x, weights, k, v, start, cos, sin, table=table)
    if interpret and plan.blocks > 1:
        return launch_per_phase(plan, [inputs], [buffers], interpret)[0]
    return launch_step(plan, INTERPRETED if interpret else MOSAIC, inputs, buffers, interpret)


def step_arrays(
    plan: StepPlan,
    x: jax.Array,
    weights: StepWeights,
    k: jax.Array,
    v: jax.Array,
    start: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    table: jax.Array | None = None,
) -> tuple[StepInputs, StepBuffers]:
    """The arrays of a step as the launch takes them."""
    empty: dict[str, Any] = dict(nan_buffers(plan) if plan.interpret else empty_buffers(plan))
    columns = empty["x"].shape[1]

    def tokens_first(a: jax.Array) -> jax.Array:
        """[B, T, n] -> [8, n]."""
        return jnp.pad(a.reshape(plan.shape.tokens, a.shape[-1]), ((0, MAX_TOKENS - plan.shape.tokens), (0, 0)))

    def padded(a: jax.Array) -> jax.Array:
        """[..., dim] -> [..., columns], whole units of what a prologue reads."""
        return jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, columns - a.shape[-1])])

    def scales_in_lines(w: Any) -> Any:
        return QuantizedTensor(w.data, in_lines(w.scale)) if plan.shape.fmt.grouped else w

    products = {p.weight: scales_in_lines(getattr(weights, p.weight)) for p in plan.product_phases}
    if plan.interpret:
        products = {name: in_whole_steps(plan, w) for name, w in products.items()}
    gains = {p.gain: padded(getattr(weights, p.gain)) for p in plan.product_phases if p.gain}
    inputs = StepInputs(
        start=start.astype(jnp.int32),
        table=None if table is None else table.astype(jnp.int32),
        cos=tokens_first(cos),
        sin=tokens_first(sin),
        weights=replace(weights, **products, **gains),
    )
    return inputs, StepBuffers(**({"exchange": None} | empty | {"x": padded(tokens_first(x)), "k": k, "v": v}))


def in_lines(scales: jax.Array) -> jax.Array:
    """Scales [..., out, groups] as they lie in memory, in the form of `scales_shape`."""
    *lead, out, groups = scales.shape
    line = scales_in_line(groups)
    return scales.reshape(*lead, out // 8, 8 * groups // line, line)

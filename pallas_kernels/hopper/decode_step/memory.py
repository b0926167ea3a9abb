"""The memory of a decode step, typed: what comes in, what the phases leave for one another, what a block shares.

Each class is a pytree of which there are two versions: one of arrays or types, outside the kernel, and one of the
references to them, inside.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from ...step_weights import StepWeights
from ..common.tiles import WGMMA_ROWS, swizzled
from .phase import BufferName, ProductPhase
from .plan import MAX_TOKENS, StepPlan, limb_scales_shape, n_share, scales_shape, sums_shape

Ref = Any  # Pallas has no public type for it


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepInputs:
    """What no phase writes. The norms' gains are padded like `StepBuffers.x`; scales have the form of `scales_shape`
    where weights have groups."""

    start: Ref  # [batch] int32: the cache's lengths
    table: Ref  # [batch, P] int32: the pages of each row; None for a contiguous cache
    cos: Ref  # [8, head_dim / 2] float32, of every token
    sin: Ref  # [8, head_dim / 2]
    weights: StepWeights


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepBuffers:
    """What phases write, in global memory. x comes in, logits go out, keys and values are the cache. Columns that a
    product reads beyond those that a phase writes are zero."""

    x: Ref  # [8, dim, padded] bfloat16, the residual stream; takes turns with x_mid
    x_mid: Ref  # like x: between attention and the feed-forward
    qkv: Ref  # [8, qkv_width] bfloat16
    parts: Ref  # [key_splits, 8, q_width, padded] float32: attention over each split of the keys
    logs: Ref  # [key_splits, 8, q_width / 8, padded] float32: log2 of each part's softmax sum, once for 8 columns
    hidden: Ref  # [8, hidden, padded] bfloat16
    logits: Ref  # [8, vocab] float32
    exchange: Ref  # [2, devices, tokens, dim, 2] int32: see `exchange`; None where one device has the whole model
    k: Ref  # [L, batch, kv_heads, max_len, head_dim] bfloat16, or pages [L, pages, kv_heads, keys, head_dim]
    v: Ref

    def of(self, name: BufferName) -> Ref:
        """The buffer that a phase names."""
        return getattr(self, name)


def buffer_shapes(plan: StepPlan) -> dict[BufferName, jax.ShapeDtypeStruct]:
    """The buffers of `StepBuffers` but for the cache."""
    s = plan.shape

    def padded(*names: BufferName) -> int:
        """Columns that the phases read whose x is made of one of these buffers."""
        return max(plan.product(p).padded_inner for p in plan.product_phases if p.reads[0] in names)

    stream, parts = padded("x", "x_mid"), padded("parts")
    exchange: dict[BufferName, jax.ShapeDtypeStruct] = {}
    if s.devices > 1:
        exchange["exchange"] = jax.ShapeDtypeStruct((2, s.devices, s.tokens, s.dim, 2), jnp.int32)
    return exchange | {
        "x": jax.ShapeDtypeStruct((MAX_TOKENS, stream), jnp.bfloat16),
        "x_mid": jax.ShapeDtypeStruct((MAX_TOKENS, stream), jnp.bfloat16),
        "qkv": jax.ShapeDtypeStruct((MAX_TOKENS, s.qkv_width), jnp.bfloat16),
        "parts": jax.ShapeDtypeStruct((plan.key_splits, MAX_TOKENS, parts), jnp.float32),
        "logs": jax.ShapeDtypeStruct((plan.key_splits, MAX_TOKENS, parts // 8), jnp.float32),
        "hidden": jax.ShapeDtypeStruct((MAX_TOKENS, padded("hidden")), jnp.bfloat16),
        "logits": jax.ShapeDtypeStruct((MAX_TOKENS, s.vocab), jnp.float32),
    }


def written_columns(plan: StepPlan) -> dict[BufferName, int]:
    """Columns that the phases write of buffers that may be wider; the rest must be zero."""
    s = plan.shape
    return {"x_mid": s.dim, "parts": s.q_width, "logs": s.q_width // 8, "hidden": s.hidden}


def empty_buffers(plan: StepPlan) -> dict[BufferName, jax.Array]:
    """Buffers before a step, with anything in them, but for the exchange: there a number that is not 0 says that a part
    has arrived."""
    make: dict[BufferName, Callable[..., jax.Array]] = {"exchange": jnp.zeros}
    return {name: make.get(name, lax.empty)(b.shape, dtype=b.dtype) for name, b in buffer_shapes(plan).items()}


# Shared memory


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ProductScratch:
    """What one product phase keeps in shared memory."""

    x: Ref  # [steps, columns of all K splits, step], as wgmma's right operand
    limb_scales: Ref  # `limb_scales_shape`
    sums: Ref  # `sums_shape`


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionScratch:
    """What attention keeps in shared memory while it has keys to read."""

    k: Ref  # [stages, keys, head_dim]
    v: Ref
    q: Ref  # [64, head_dim]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scratch:
    """A block's barriers and shared memory.

    A `plgpu.RefUnion` is memory that several arrays use at different times. Fields that are None are not needed by the
    weights' format, or on a GPU."""

    ring_free: Ref  # a stage was multiplied
    ring_full: Ref  # a stage's copies have arrived
    keys_full: Ref  # a tile of keys and values has arrived
    scales_free: Ref  # a phase's scales were used; one barrier per slot
    scales_full: Ref  # a phase's scales have arrived
    consumers: Ref  # where the consumers wait for one another
    peers: Ref  # [devices + 1, 2] int32: addresses of the exchange buffers, and this device's number; see `exchange`
    gave_up: Ref  # [consumers] int32: the hang detector's, see `StepPlan.spin_limit`
    arrived: Ref  # [1] int32: likewise
    int8_weights: Ref  # [consumers, 64, step], for the interpreter only
    log_sums: Ref  # [64]: log2 of the softmax's sums
    new_k: Ref  # [8, head_dim]: to be written to the cache
    new_v: Ref
    residual: Ref  # [consumers, 8, outputs of a consumer]: prefetched
    ring: Ref  # [depth, 64, step]: stages of weights
    scales: tuple[Ref, ...]  # a union for each slot: `scales_shape` of the phases that share it
    overlay: (
        Ref  # a union: `ProductScratch` of each product phase, `AttentionScratch`, attention's output [64, head_dim]
    )
    squares: Ref  # [consumers, 4]: sums of squares, one per warp
    softmax_weights: Ref  # [64, keys], for the interpreter only


def scratch_types(plan: StepPlan) -> Scratch:
    """The `Scratch` that a block of this plan allocates."""
    s, t = plan.shape, plan.tiles
    bf16, int8 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.int8)
    grouped, slots = s.fmt.grouped, plan.scale_slots

    def product(phase: ProductPhase) -> ProductScratch:
        p = plan.product(phase)
        x = (t.chunk // t.step // p.k_splits, p.k_splits * s.columns, t.step)
        return ProductScratch(
            x=swizzled(x, int8 if s.fmt.quantized else bf16, x_slice(plan)),
            limb_scales=plgpu.SMEM(limb_scales_shape(p, plan), jnp.float32),
            sums=plgpu.SMEM(sums_shape(p, plan), jnp.float32),
        )

    def scales(phases: tuple[ProductPhase, ...]) -> Any:
        return plgpu.RefUnion(*(plgpu.SMEM(scales_shape(plan.product(p), plan), jnp.float16) for p in phases))

    # x and the sums are dead during attention, what attention holds during products, and keys once a part is done.
    keys = swizzled((t.stages, t.keys, s.head_dim), bf16)
    attention = AttentionScratch(k=keys, v=keys, q=swizzled((WGMMA_ROWS, s.head_dim), bf16))
    part = plgpu.SMEM((WGMMA_ROWS, s.head_dim), jnp.float32)
    new = plgpu.SMEM((MAX_TOKENS, s.head_dim), jnp.bfloat16)
    unpacked = plan.interpret and s.fmt.bits == 4
    return Scratch(
        ring_full=plgpu.Barrier(num_arrivals=plan.copies_per_stage, num_barriers=plan.depth),
        ring_free=plgpu.Barrier(num_arrivals=1, num_barriers=plan.depth),
        keys_full=plgpu.Barrier(num_arrivals=2, num_barriers=t.stages),
        scales_full=plgpu.Barrier(num_arrivals=2, num_barriers=len(slots)) if grouped else None,
        scales_free=plgpu.Barrier(num_arrivals=t.consumers, num_barriers=len(slots)) if grouped else None,
        consumers=plgpu.Barrier(num_arrivals=t.consumers),
        peers=plgpu.SMEM((s.devices + 1, 2), jnp.int32) if s.devices > 1 and not plan.interpret else None,
        gave_up=plgpu.SMEM((t.consumers,), jnp.int32) if plan.spin_limit else None,
        arrived=plgpu.SMEM((1,), jnp.int32) if plan.spin_limit else None,
        int8_weights=swizzled((t.consumers, WGMMA_ROWS, t.step), int8, s.fmt.group) if unpacked else None,
        log_sums=plgpu.SMEM((WGMMA_ROWS,), jnp.float32),
        new_k=new,
        new_v=new,
        residual=plgpu.SMEM((t.consumers, MAX_TOKENS, residual_columns(plan)), jnp.bfloat16),
        ring=swizzled(
            (plan.depth, WGMMA_ROWS, t.step), s.fmt.dtype, plan.weight_slice if s.fmt.bits == 4 else x_slice(plan)
        ),
        scales=tuple(map(scales, slots)) if grouped else (),
        overlay=plgpu.RefUnion(*map(product, plan.product_phases), attention, part),
        squares=plgpu.SMEM((t.consumers, 4), jnp.float32),
        softmax_weights=swizzled((WGMMA_ROWS, t.keys), bf16) if plan.interpret else None,
    )


def x_slice(plan: StepPlan) -> int:
    """Columns of x, and of weights that wgmma reads from shared memory, that are multiplied at a time."""
    return math.gcd(plan.weight_slice, plan.shape.fmt.group or plan.tiles.step)


def residual_columns(plan: StepPlan) -> int:
    """Outputs that a consumer finishes, at most, in a phase that adds a residual."""
    return max(n_share(plan.product(p), plan) for p in plan.product_phases if p.residual)

"""What the kernel of a decode step cannot do, refused before anything is launched."""

import os
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ...arch import planned
from ...dispatch import Unsupported
from ...quantized import QuantizedTensor
from ...step_weights import StepWeights
from ..common.tiles import WGMMA_ROWS, format_of
from .phase import ProductPhase
from .plan import MAX_TOKENS, StepShape, StepTiles
from .table import HEAD, LAYER_PHASES
from .tuned import plan_for_device, ring_fits, tiles_for

PRODUCTS = tuple(phase for phase in (*LAYER_PHASES, HEAD) if isinstance(phase, ProductPhase))
RAGGED = {16: 64, 8: 64, 4: 128}  # what inputs must be a multiple of, by the bits of weights: at least 64 bytes
SIZES = {"q_width": "heads * head_dim", "qkv_width": "(heads + 2 * kv_heads) * head_dim"}  # as errors name them


def shape_of(
    x: jax.Array,
    weights: StepWeights,
    k: jax.Array,
    eps: float,
    table: jax.Array | None = None,
    axis: str | None = None,
) -> StepShape:
    """The sizes that the arrays have; ``axis`` is a mesh axis along which other devices have the rest of the model."""
    L, _, kv_heads, S, D = k.shape
    return StepShape(
        batch=x.shape[0],
        queries=x.shape[1],
        dim=x.shape[2],
        hidden=weights.w_down.shape[-1],
        heads=weights.wo.shape[-1] // D,
        kv_heads=kv_heads,
        head_dim=D,
        vocab=weights.head.shape[0],
        layers=L,
        max_len=S if table is None else table.shape[1] * S,
        fmt=format_of(weights.wqkv),
        eps=eps,
        devices=1 if axis is None else lax.axis_size(axis),
        axis=axis,
    )


def check(
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
    **_: Any,
) -> None:
    """Raise `Unsupported` where the kernel cannot run these arguments."""
    _check_processes()
    shape = shape_of(x, weights, k, eps, table, axis)
    tiles_here = tiles or tiles_for(shape.fmt)
    _check_dtypes(x, weights, k, v)
    _check_cache(x, k, v, start, table, tiles_here.keys)
    if cos.shape != sin.shape or cos.shape != (*x.shape[:2], shape.head_dim // 2):
        raise Unsupported(f"cos {cos.shape} and sin {sin.shape} are not {(*x.shape[:2], shape.head_dim // 2)}")
    _check_sizes(shape, tiles_here)
    if blocks is not None and blocks > planned().sms:
        raise Unsupported(f"{blocks} blocks on {planned().sms} multiprocessors would wait for one another forever")
    if not ring_fits(plan_for_device(shape, tiles, blocks)):
        raise Unsupported("too little shared memory for the ring of weights")


def _check_processes() -> None:
    # Under MPS two processes' kernels share the multiprocessors: of two launches that wait for all their blocks, each
    # may get half of them, and then neither ends. Without MPS a process has the whole device while it runs.
    for name in os.environ:
        if name.startswith("CUDA_MPS_"):
            raise Unsupported(f"{name} is set: under MPS not all blocks may be on the device at once")


def _check_dtypes(x: jax.Array, weights: StepWeights, k: jax.Array, v: jax.Array) -> None:
    gains = {phase.gain: getattr(weights, phase.gain) for phase in PRODUCTS if phase.gain}
    for name, array in {"x": x, "k": k, "v": v, **gains}.items():
        if array.dtype != jnp.bfloat16:
            raise Unsupported(f"{name} must be bfloat16, found {array.dtype}")
    products = {phase.weight: getattr(weights, phase.weight) for phase in PRODUCTS}
    first, fmt = PRODUCTS[0].weight, format_of(products[PRODUCTS[0].weight])
    for name, weight in products.items():
        if format_of(weight) != fmt:
            raise Unsupported(f"all weights must have one format: {first} has {fmt}, {name} has {format_of(weight)}")
    if not fmt.quantized and fmt.dtype != jnp.bfloat16:
        raise Unsupported(f"weights must be bfloat16 or quantised, found {fmt.dtype}")
    for name, weight in products.items():
        if isinstance(weight, QuantizedTensor) and fmt.grouped and weight.scale.dtype != jnp.float16:
            raise Unsupported(f"{name}: scales of groups must be float16, found {weight.scale.dtype}")


def _check_cache(
    x: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array, table: jax.Array | None, keys: int
) -> None:
    if k.shape != v.shape or start.shape != x.shape[:1] or (table is None and k.shape[1] != x.shape[0]):
        found = f"found x {x.shape}, start {start.shape}, k {k.shape} and v {v.shape}"
        raise Unsupported(f"k and v must have one shape, and x, start and the cache one batch size: {found}")
    if table is None:
        return
    if k.shape[3] != keys:
        raise Unsupported(f"pages must hold {keys} positions, found {k.shape[3]}")
    integers = jnp.issubdtype(table.dtype, jnp.integer)
    if table.ndim != 2 or table.shape[0] != x.shape[0] or not integers or 0 in (*table.shape, k.shape[1]):
        found = f"{table.dtype} {table.shape} and {k.shape[1]} pages"
        raise Unsupported(f"the table must have integers for {x.shape[0]} rows, found {found}")


def _check_sizes(s: StepShape, tiles: StepTiles) -> None:
    if not 1 <= s.tokens <= MAX_TOKENS:
        raise Unsupported(f"1 to {MAX_TOKENS} tokens a step, found {s.batch} rows of {s.queries}")
    if s.head_dim not in (64, 128):
        raise Unsupported(f"head_dim must be 64 or 128, found {s.head_dim}")
    if s.heads % s.kv_heads or s.heads_per_key * MAX_TOKENS > WGMMA_ROWS:
        most = WGMMA_ROWS // MAX_TOKENS
        raise Unsupported(f"at most {most} query heads a key head, found {s.heads} and {s.kv_heads}")
    if s.max_len % 8:
        raise Unsupported(f"the cache's length must be a multiple of 8, found {s.max_len}")
    for phase in PRODUCTS:
        inner, name = getattr(s, phase.inner), SIZES.get(phase.inner, phase.inner)
        if inner % (multiple := min(tiles.step, RAGGED[s.fmt.bits])):
            raise Unsupported(f"{name} must be a multiple of {multiple}, found {inner}")
    for phase in PRODUCTS:
        outer, name = getattr(s, phase.outer), SIZES.get(phase.outer, phase.outer)
        if outer % 8:
            raise Unsupported(f"{name} must be a multiple of 8, found {outer}")
    if s.fmt.grouped and (s.fmt.bits, s.fmt.group) != (4, 128):
        found = f"int{s.fmt.bits} in groups of {s.fmt.group}"
        raise Unsupported(f"of weights in groups only int4 in groups of 128 has run on a GPU, found {found}")
    if s.fmt.grouped and tiles.step % s.fmt.group:
        raise Unsupported(f"groups of {s.fmt.group} inputs: must divide {tiles.step}")

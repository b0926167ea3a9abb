"""A whole decode step of a Llama: up to 8 new tokens through all layers, with the cache, to logits.

The reference is the composition of the other ops' references. The kernel is one persistent launch in which every
multiprocessor has a part of every phase (see `persistent_launch`), so that weights stream from the first byte to the
last: at a launch for every op the memory idles between them.
"""

import os
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from .arch import planned
from .attention import attention_reference
from .dispatch import Kernel, Op, Unsupported
from .ffn import ffn_reference
from .hopper.common.tiles import WGMMA_ROWS, Format, Weight, format_of
from .hopper.decode_step.launch import WEIGHTS, buffers, empty, launch_per_phase, one_launch
from .hopper.decode_step.plan import ROWS, Plan, Shape, Tiles, plan
from .matmul import matmul_reference
from .qkv import qkv_reference
from .quantized import QuantizedTensor
from .rms_norm import rms_norm_reference


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepWeights:
    """All that a step multiplies with; those of the layers are stacked on a leading axis L."""

    attn_norm: jax.Array  # [L, dim]
    wqkv: Weight  # [L, (heads + 2 * kv_heads) * head_dim, dim]
    wo: Weight  # [L, dim, heads * head_dim]
    ffn_norm: jax.Array  # [L, dim]
    w_gate_up: Weight  # [L, 2 * hidden, dim]
    w_down: Weight  # [L, dim, hidden]
    norm: jax.Array  # [dim]
    head: Weight  # [vocab, dim]


Result = tuple[jax.Array, jax.Array, jax.Array]


def decode_step_reference(
    x: jax.Array,
    weights: StepWeights,
    k: jax.Array,
    v: jax.Array,
    start: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    eps: float,
) -> Result:
    """x [B, T, dim], k and v [L, B, kv_heads, S, D], start [B], cos and sin [B, T, D / 2] of the tokens' positions ->
    float32 logits [B, T, vocab], and the cache with the new keys and values at ``start`` and behind."""
    w = weights
    for i in range(k.shape[0]):
        h = rms_norm_reference(x, w.attn_norm[i], eps=eps)
        q, k, v = qkv_reference(h, w.wqkv[i], k, v, start, cos, sin, layer=i)
        out = attention_reference(q, k[i], v[i], start)
        x = x + matmul_reference(out.reshape(*x.shape[:2], -1), w.wo[i])
        x = ffn_reference(x, w.ffn_norm[i], w.w_gate_up[i], w.w_down[i], eps=eps)
    x = rms_norm_reference(x, w.norm, eps=eps)
    return matmul_reference(x, w.head, out_dtype=jnp.float32), k, v


def shape_of(x: jax.Array, weights: StepWeights, k: jax.Array, eps: float) -> Shape:
    """The sizes that the arrays stand for."""
    L, B, kv_heads, S, D = k.shape
    return Shape(
        batch=B,
        queries=x.shape[1],
        dim=x.shape[2],
        hidden=weights.w_down.shape[-1],
        heads=weights.wo.shape[-1] // D,
        kv_heads=kv_heads,
        head_dim=D,
        vocab=weights.head.shape[0],
        layers=L,
        max_len=S,
        fmt=format_of(weights.wqkv),
        eps=eps,
    )


def tiles_for(fmt: Format) -> Tiles:
    """What was quickest on an H200. More stages of 4 bits on their way only delay what blocks tell one another."""
    if not fmt.quantized:
        return Tiles(step=128)
    return Tiles(step=256, depth=10) if fmt.bits == 4 else Tiles(step=256)


def fits(plan: Plan) -> bool:
    """Whether every consumer can be at work on one stage while another arrives."""
    return plan.depth >= 2 * plan.tiles.consumers


def plan_of(shape: Shape, tiles: Tiles | None = None, blocks: int | None = None) -> Plan:
    """How this device runs a step of these sizes: with less of x at a time where too little memory is left for
    weights."""
    blocks, wanted = blocks or planned().sms, tiles or tiles_for(shape.fmt)
    made = plan(shape, wanted, blocks)
    return made if tiles or fits(made) else plan(shape, replace(wanted, chunk=2048), blocks)


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
    tiles: Tiles | None = None,
    blocks: int | None = None,
    **_: Any,
) -> None:
    """Raise `Unsupported` where `decode_step_kernel` cannot run these arguments."""
    _check_alone()
    shape = shape_of(x, weights, k, eps)
    _check_dtypes(x, weights, k, v)
    if k.shape != v.shape or k.shape[1] != x.shape[0] or start.shape != x.shape[:1]:
        raise Unsupported(f"x {x.shape}, start {start.shape}, k {k.shape} and v {v.shape} do not belong together")
    if cos.shape != sin.shape or cos.shape != (*x.shape[:2], shape.head_dim // 2):
        raise Unsupported(f"cos {cos.shape} and sin {sin.shape} are not {(*x.shape[:2], shape.head_dim // 2)}")
    _check_sizes(shape, tiles or tiles_for(shape.fmt))
    if blocks is not None and blocks > planned().sms:
        raise Unsupported(f"{blocks} blocks on {planned().sms} multiprocessors would wait for one another forever")
    if not fits(plan_of(shape, tiles, blocks)):
        raise Unsupported("too little shared memory for the ring of weights")


def _check_alone() -> None:
    # Under MPS two processes' kernels share the multiprocessors: of two that wait for all of their blocks, each may get
    # half of them, and then neither ends. Without it the device gives each process all of them in turn.
    for name in os.environ:
        if name.startswith("CUDA_MPS_"):
            raise Unsupported(f"{name} is set: under MPS not all blocks may be on the device at once")


def _check_dtypes(x: jax.Array, weights: StepWeights, k: jax.Array, v: jax.Array) -> None:
    floats = {
        "x": x, "k": k, "v": v, "attn_norm": weights.attn_norm, "ffn_norm": weights.ffn_norm, "norm": weights.norm,
    }  # fmt: skip
    for name, array in floats.items():
        if array.dtype != jnp.bfloat16:
            raise Unsupported(f"{name} must be bfloat16, found {array.dtype}")
    formats = {name: format_of(getattr(weights, name)) for name in WEIGHTS.values()}
    fmt = formats["wqkv"]
    for name, other in formats.items():
        if other != fmt:
            raise Unsupported(f"all weights must have one format: wqkv has {fmt}, {name} has {other}")
    if not fmt.quantized and fmt.dtype != jnp.bfloat16:
        raise Unsupported(f"weights must be bfloat16 or quantised, found {fmt.dtype}")
    for name in WEIGHTS.values():
        w = getattr(weights, name)
        if isinstance(w, QuantizedTensor) and fmt.grouped and w.scale.dtype != jnp.float16:
            raise Unsupported(f"{name}: scales of groups must be float16, found {w.scale.dtype}")


def _check_sizes(s: Shape, tiles: Tiles) -> None:
    if not 1 <= s.rows <= ROWS:
        raise Unsupported(f"1 to {ROWS} tokens a step, found {s.batch} rows of {s.queries}")
    if s.head_dim not in (64, 128):
        raise Unsupported(f"head_dim must be 64 or 128, found {s.head_dim}")
    if s.heads % s.kv_heads or s.group * ROWS > WGMMA_ROWS:
        raise Unsupported(f"at most {WGMMA_ROWS // ROWS} query heads a key head, found {s.heads} and {s.kv_heads}")
    if s.max_len % 8:
        raise Unsupported(f"the cache's length must be a multiple of 8, found {s.max_len}")
    for name, inner in {"dim": s.dim, "heads * head_dim": s.heads * s.head_dim, "hidden": s.hidden}.items():
        if inner % tiles.step:
            raise Unsupported(f"{name} must be a multiple of {tiles.step}, found {inner}")
        if s.fmt.group is not None and inner // s.fmt.group % 2:
            raise Unsupported(f"{name} must be an even number of groups of {s.fmt.group}, found {inner}")
    for name, out in {"dim": s.dim, "hidden": s.hidden, "vocab": s.vocab}.items():
        if out % 8:
            raise Unsupported(f"{name} must be a multiple of 8, found {out}")
    if s.fmt.grouped and (s.fmt.bits, s.fmt.group) != (4, 128):
        found = f"int{s.fmt.bits} in groups of {s.fmt.group}"
        raise Unsupported(f"of weights in groups only int4 in groups of 128 has run on a GPU, found {found}")
    if s.fmt.grouped and tiles.step % s.fmt.group:
        raise Unsupported(f"groups of {s.fmt.group} inputs: must divide {tiles.step}")


def decode_step_kernel(
    x: jax.Array,
    weights: StepWeights,
    k: jax.Array,
    v: jax.Array,
    start: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    eps: float,
    **options: Any,
) -> Result:
    """`decode_step_reference` in one launch; with ``interpret`` and several blocks, in one for each phase. Inside a jit
    that owns the cache, it is changed in place. ``options`` are those of `phases`."""
    done = phases(x, weights, k, v, start, cos, sin, eps=eps, **options)
    B, T = x.shape[:2]
    return done["logits"][: B * T].reshape(B, T, -1), done["k"], done["v"]


def phases(
    x: jax.Array,
    weights: StepWeights,
    k: jax.Array,
    v: jax.Array,
    start: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    eps: float,
    tiles: Tiles | None = None,
    blocks: int | None = None,
    patience: int = 0,
    interpret: Any = None,
) -> dict[str, jax.Array]:
    """The step, and what its phases left behind: the arrays of `buffers`, those of the last layer, and the cache.

    With ``patience``, to find out why a step hangs, no block waits for the others longer than so many looks at their
    count: it prints which phase it waited for, and goes on to wrong results."""
    shape = shape_of(x, weights, k, eps)
    how = replace(plan_of(shape, tiles, blocks), interpret=bool(interpret), patience=patience)
    state = {name: empty(how, name) for name in buffers(how)}
    width = state["x"].shape[1]

    def tokens_first(a: jax.Array) -> jax.Array:
        return jnp.pad(a.reshape(shape.rows, a.shape[-1]), ((0, ROWS - shape.rows), (0, 0)))

    def whole_units(a: jax.Array) -> jax.Array:
        return jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, width - a.shape[-1])])

    inputs = {"start": start.astype(jnp.int32), "cos": tokens_first(cos), "sin": tokens_first(sin)}
    inputs |= {name: whole_units(getattr(weights, name)) for name in ("attn_norm", "ffn_norm", "norm")}
    for name in WEIGHTS.values():
        w = getattr(weights, name)
        if isinstance(w, QuantizedTensor):
            inputs |= {name: w.data, f"{name}_scale": lines_of_16(w.scale) if shape.fmt.grouped else w.scale}
        else:
            inputs[name] = w
    state |= {"x": whole_units(tokens_first(x)), "k": k, "v": v}
    launch = launch_per_phase if interpret and how.blocks > 1 else one_launch
    return launch(how, inputs, state, interpret)


def lines_of_16(scales: jax.Array) -> jax.Array:
    """Scales [..., out, groups] as they lie in memory, in the form of `scales_shape`."""
    *lead, out, groups = scales.shape
    return scales.reshape(*lead, out // 8, groups // 2, 16)


decode_step = Op("decode_step", decode_step_reference, {"hopper": Kernel(decode_step_kernel, check)})

CASES = {
    "7b": dict(dim=4096, hidden=11008, heads=32, kv_heads=32, head_dim=128, vocab=32000, layers=32),
    "13b": dict(dim=5120, hidden=13824, heads=40, kv_heads=40, head_dim=128, vocab=32000, layers=40),
    "70b": dict(dim=8192, hidden=28672, heads=64, kv_heads=8, head_dim=128, vocab=32000, layers=80),
    "tinyllama": dict(dim=2048, hidden=5632, heads=32, kv_heads=4, head_dim=64, vocab=32000, layers=22),
}

"""The decode step of the whole model in one launch a device: `pallas_kernels.decode_step` applied to `Params` and a
cache."""

import functools
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jllama.cache import KVCache, init_cache
from jllama.config import LlamaConfig, Quant
from jllama.errors import InputError
from jllama.kernels import NO_BIAS, Choice, Kernel, Op, StepWeights, Unsupported, decode_step, require_kernels
from jllama.mesh.layout import DATA, spec
from jllama.mesh.run import on_shards
from jllama.paged import PagedCache
from jllama.params import Params, init, stack
from jllama.ways import way_of

Cache = KVCache | PagedCache


def step_weights(params: Params) -> StepWeights:
    """Stacked weights as the kernel takes them. Nothing is copied."""
    names = [field.name for field in fields(StepWeights) if hasattr(params.layers, field.name)]
    layers = {name: getattr(params.layers, name) for name in names}
    return StepWeights(**layers, norm=params.norm, head=params.head)


def _over_params(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``function``, which takes the arrays of a step, so that it takes params and cache."""

    @functools.wraps(function)
    def call(
        x: jax.Array,
        params: Params,
        cache: Cache,
        cos: jax.Array,
        sin: jax.Array,
        lengths: jax.Array,
        *,
        last_only: bool,
        **options: Any,
    ) -> tuple[jax.Array, Cache]:
        weights = step_weights(params)
        how = dict(eps=params.config.norm_eps, table=cache.table, axis=params.axis, **options)
        logits, k, v = function(x, weights, cache.k, cache.v, cache.lengths, cos, sin, **how)
        return last_token(logits, lengths) if last_only else logits, replace(cache, k=k, v=v)

    return call


def last_token(x: jax.Array, lengths: jax.Array) -> jax.Array:
    """The last real token of each row, [B, n], of ``x`` [B, T, n]. ``lengths`` [B] counts the real tokens."""
    return jnp.take_along_axis(x, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]


def _other_way(x: jax.Array, *_: Any, **__: Any) -> str | None:
    """Why a step of so many rows goes op by op, although a kernel might run it."""
    rows = x.shape[0] * x.shape[1]
    return None if (way := way_of(rows)).name == "launch" else f"{rows} rows: {way.why}"


def _check(
    kernel: Kernel, x: jax.Array, params: Params, cache: Cache, cos: jax.Array, sin: jax.Array, *_: Any, **__: Any
) -> None:
    """Raise `Unsupported` if the step cannot run. Reasons that stacking would not remove are checked first: a user who
    is told to stack must not be refused again afterwards."""

    def stacked(params: Params, cache: Cache) -> tuple[StepWeights, jax.Array, jax.Array]:
        return step_weights(stack(params)), jnp.stack(cache.k), jnp.stack(cache.v)

    assert kernel.check is not None
    if params.axis is not None and params.apart is not None:
        raise Unsupported(f"the model is divided over a mesh: {params.apart}")
    if params.config.attention_bias or params.config.mlp_bias:
        raise Unsupported(NO_BIAS)
    try:
        weights, k, v = jax.eval_shape(stacked, params, cache)
        how = dict(eps=params.config.norm_eps, table=cache.table, axis=params.axis)
        kernel.check(x, weights, k, v, cache.lengths, cos, sin, **how)
    except InputError as reason:
        raise Unsupported(str(reason)) from None
    if not params.stacked:
        raise Unsupported("weights are held layer by layer: jllama.stack joins them")
    if not cache.stacked:
        raise Unsupported("the cache is held layer by layer: init_cache(..., stacked=True) joins it")


# Arguments: x [B, T, dim], params, cache, cos and sin [B, T, head_dim / 2], lengths [B] (real tokens in each row of x).
# Results: float32 logits [B, T, vocab_size], or [B, vocab_size] with ``last_only``; and the cache with the new keys and
# values, its lengths not advanced.
whole_step = Op(
    decode_step.name,
    _over_params(decode_step.reference),
    {name: Kernel(_over_params(k.run), functools.partial(_check, k)) for name, k in decode_step.kernels.items()},
    skip_reason=_other_way,
)


def runs_whole(config: LlamaConfig, dtype: str, quant: Quant = "none", group: int | None = None, **sizes: Any) -> bool:
    """Whether a decode step of such a model, if stacked, would run as one launch: see `step_choice`."""
    return step_choice(config, dtype, quant, group, **sizes).impl == "pallas"


def step_choice(
    config: LlamaConfig,
    dtype: str,
    quant: Quant = "none",
    group: int | None = None,
    *,
    batch: int = 1,
    max_len: int = 1024,
    mesh: Mesh | None = None,
) -> Choice:
    """How a decode step of a model of this shape would run here, with stacked layers, and why: "pallas" is one kernel
    for the whole step, "ops" is a launch for each operation. With a mesh, it is how the step runs on each of its
    devices, and ``batch`` counts the rows of all of them. Only shapes are traced: no array is allocated."""
    try:
        require_kernels()
    except Unsupported as reason:
        return Choice("ops", str(reason))
    found: list[Choice] = []

    def step(params: Params, x: jax.Array, cache: KVCache) -> jax.Array:
        if params.mesh is not None:
            return on_shards(step, params, x, cache, out=spec(params.mesh, DATA))
        rotation = jnp.zeros((*x.shape[:2], config.head_dim // 2))
        found.append(whole_step.choose("auto", x, params, cache, rotation, rotation))
        return x

    def whole() -> jax.Array:
        form = dict(dtype=jnp.dtype(dtype), quant=quant, group=group, stacked=True, mesh=mesh)
        params = init(config, jax.random.key(0), **form)  # type: ignore[arg-type]
        cache = init_cache(config, batch, max_len, params.dtype, stacked=True, mesh=mesh)
        return step(params, jnp.zeros((batch, 1, config.dim), params.dtype), cache)

    jax.eval_shape(whole)
    ops = (Choice("ops", choice.why) for choice in found if choice.impl != "pallas")
    return next(ops, found[0])

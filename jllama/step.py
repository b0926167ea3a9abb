"""A few new tokens through the whole model in one launch: `pallas_kernels.decode_step` over `Params` and `KVCache`."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax

from jllama.cache import KVCache
from jllama.params import Params
from pallas_kernels import Op, StepWeights, Unsupported, decode_step


def step_weights(params: Params) -> StepWeights:
    """The weights as the kernel takes them. Nothing is copied."""
    if not params.stacked:
        raise Unsupported("weights are held layer by layer: jllama.stack joins them")
    return StepWeights(**vars(params.layers), norm=params.norm, head=params.head)


def _over_params(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(
        x: jax.Array, params: Params, cache: KVCache, cos: jax.Array, sin: jax.Array, **options: Any
    ) -> tuple[jax.Array, KVCache] | None:
        weights = step_weights(params)
        if not cache.stacked:
            raise Unsupported("the cache is held layer by layer: init_cache(..., stacked=True) joins it")
        out = function(x, weights, cache.k, cache.v, cache.lengths, cos, sin, eps=params.config.norm_eps, **options)
        return None if out is None else (out[0], replace(cache, k=out[1], v=out[2]))

    return call


# x [B, T, dim], params, cache, cos and sin [B, T, head_dim / 2] -> float32 logits [B, T, vocab_size], and the cache
# with the new keys and values, its lengths as they were.
whole_step = Op(
    decode_step.name,
    *(
        _over_params(function)
        for function in (decode_step.reference, decode_step.kernel, decode_step.check)
        if function
    ),
)

"""The forward pass, in one sitting. Pure: the same arguments give the same logits, and nothing else happens."""

import functools
from dataclasses import replace
from typing import overload

import jax
import jax.numpy as jnp

from jllama.cache import KVCache
from jllama.config import Backend, LlamaConfig
from jllama.kernels import (
    DECODE_QUERIES,
    affine,
    attention,
    ffn,
    ffn_reference,
    matmul,
    qkv,
    qkv_reference,
    rms_norm,
    rotate,
    split_heads,
)
from jllama.paged import PagedCache
from jllama.params import Layer, Params
from jllama.rope import rotations
from jllama.step import last_token, whole_step

Cache = KVCache | PagedCache


@overload
def forward(
    params: Params,
    tokens: jax.Array,
    cache: None = None,
    *,
    lengths: jax.Array | None = None,
    last_only: bool = False,
    backend: Backend = "auto",
) -> tuple[jax.Array, None]: ...
@overload
def forward[C: (KVCache, PagedCache)](
    params: Params,
    tokens: jax.Array,
    cache: C,
    *,
    lengths: jax.Array | None = None,
    last_only: bool = False,
    backend: Backend = "auto",
) -> tuple[jax.Array, C]: ...
def forward(
    params: Params,
    tokens: jax.Array,
    cache: Cache | None = None,
    *,
    lengths: jax.Array | None = None,
    last_only: bool = False,
    backend: Backend = "auto",
) -> tuple[jax.Array, Cache | None]:
    """Logits of ``tokens`` [B, T], which continue whatever each row of ``cache`` holds.

    ``lengths`` [B] says how many of a row's tokens are real (default: all; the rest is padding on the right).
    Returns float32 logits, [B, T, vocab_size], or [B, vocab_size] of each row's last real token with ``last_only``,
    and the cache with the new keys and values (None where none was given).
    """
    B, T = tokens.shape
    start = jnp.zeros(B, jnp.int32) if cache is None else cache.lengths
    lengths = jnp.full(B, T, jnp.int32) if lengths is None else lengths
    positions = start[:, None] + jnp.arange(T)[None]  # [B, T]
    by_ops = functools.partial(blocks, backend=backend)
    arguments = params.embed[tokens], params, cache, *rotations(positions, params.config), lengths
    if isinstance(cache, KVCache) and T <= DECODE_QUERIES:  # in one launch, where it can be
        logits, cache = whole_step.try_kernel(by_ops, *arguments, last_only=last_only, backend=backend)
    else:
        logits, cache = by_ops(*arguments, last_only=last_only)
    return logits, None if cache is None else replace(cache, lengths=start + lengths)


def blocks(
    x: jax.Array,  # [B, T, dim]
    params: Params,
    cache: Cache | None,
    cos: jax.Array,  # [B, T, head_dim / 2]
    sin: jax.Array,  # [B, T, head_dim / 2]
    lengths: jax.Array,  # [B]
    *,
    last_only: bool,
    backend: str,
) -> tuple[jax.Array, Cache | None]:
    """All layers and the head, op by op: logits, and the cache with the new keys and values, its lengths as they
    were."""
    start = jnp.zeros(x.shape[0], jnp.int32) if cache is None else cache.lengths
    for i in range(params.config.n_layers):
        layer = params.layer(i)
        x, cache = attend(x, layer, i, cache, start, (cos, sin), params.config, backend)
        x = feed_forward(x, layer, params.config.norm_eps, backend)

    if last_only:  # before the head: its product is the widest of all
        x = last_token(x, lengths)
    x = rms_norm(x, params.norm, eps=params.config.norm_eps, backend=backend)
    return matmul(x, params.head, out_dtype=jnp.float32, backend=backend), cache


def attend(
    x: jax.Array,  # [B, T, dim]
    layer: Layer,
    index: int,
    cache: Cache | None,
    start: jax.Array,  # [B]: the position of each row's first token
    rotation: tuple[jax.Array, jax.Array],
    config: LlamaConfig,
    backend: str,
) -> tuple[jax.Array, Cache | None]:
    """The attention half of a block, with its norm and residual."""
    B, T, _ = x.shape
    h = rms_norm(x, layer.attn_norm, eps=config.norm_eps, backend=backend)
    q, new, cache = project(h, layer, index, cache, start, rotation, config, backend)
    out = attention(q, *new, start, backend=backend) if cache is None else cache.attend(index, q, backend=backend)
    product = functools.partial(matmul, backend=backend)
    return affine(product, out.reshape(B, T, -1), layer.wo, layer.bo, residual=x), cache


def project(
    h: jax.Array,  # [B, T, dim]
    layer: Layer,
    index: int,
    cache: Cache | None,
    start: jax.Array,
    rotation: tuple[jax.Array, jax.Array],
    config: LlamaConfig,
    backend: str,
) -> tuple[jax.Array, tuple[jax.Array, ...], Cache | None]:
    """Queries, and the new tokens' keys and values [B, kv_heads, T, head_dim]: in the cache, where there is one."""
    product = functools.partial(matmul, backend=backend)
    if isinstance(cache, KVCache):
        *arrays, place = cache.arrays(index)
        by_ops = functools.partial(qkv_reference, product=product)
        arguments = h, layer.wqkv, *arrays, start, *rotation
        q, k, v = qkv.try_kernel(by_ops, *arguments, bias=layer.bqkv, layer=place, backend=backend)
        return q, (), cache.with_arrays(index, k, v)

    y = affine(product, h, layer.wqkv, layer.bqkv)
    q, k, v = split_heads(y, config.n_heads // config.n_kv_heads, config.head_dim)
    q, k = rotate(q, *rotation), rotate(k, *rotation)
    if cache is None:
        return q, (k.swapaxes(1, 2), v.swapaxes(1, 2)), None
    return q, (), cache.write(index, k, v)


def feed_forward(x: jax.Array, layer: Layer, eps: float, backend: str) -> jax.Array:
    """The other half of a block: x [B, T, dim] -> the same. With biases, which no kernel of it adds, op by op."""
    arguments = x, layer.ffn_norm, layer.w_gate_up, layer.w_down
    if layer.b_gate_up is None:
        return ffn(*arguments, eps=eps, backend=backend)
    by_ops = functools.partial(ffn_reference, product=functools.partial(matmul, backend=backend))
    return ffn.try_kernel(by_ops, *arguments, biases=(layer.b_gate_up, layer.b_down), eps=eps, backend=backend)

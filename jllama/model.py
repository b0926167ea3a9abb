"""The forward pass, in one sitting. Pure: the same arguments give the same logits, and nothing else happens."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from jllama.cache import KVCache
from jllama.config import LlamaConfig
from jllama.params import Layer, Params
from jllama.rope import rotate, rotations
from jllama.step import whole_step
from pallas_kernels import (
    DECODE_QUERIES,
    attention,
    decode_attention,
    ffn,
    matmul,
    rms_norm,
)


def forward(
    params: Params,
    tokens: jax.Array,
    cache: KVCache | None = None,
    *,
    lengths: jax.Array | None = None,
    last_only: bool = False,
    backend: str = "auto",
) -> tuple[jax.Array, KVCache | None]:
    """Logits of ``tokens`` [B, T], which continue whatever each row of ``cache`` holds.

    ``lengths`` [B] says how many of a row's tokens are real (default: all; the rest is padding on the right).
    Returns float32 logits, [B, T, vocab_size], or [B, vocab_size] of each row's last real token with ``last_only``,
    and the cache with the new keys and values (None where none was given).
    """
    B, T = tokens.shape
    start = jnp.zeros(B, jnp.int32) if cache is None else cache.lengths
    lengths = jnp.full(B, T, jnp.int32) if lengths is None else lengths
    rotation = rotations(start[:, None] + jnp.arange(T), params.config)

    def last(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]

    x = params.embed[tokens]
    if cache is not None and T <= DECODE_QUERIES:
        done = whole_step.attempt(x, params, cache, *rotation, backend=backend)
        if done is not None:  # in one launch
            logits, stepped = done
            return last(logits) if last_only else logits, replace(stepped, lengths=start + lengths)

    for i in range(params.config.n_layers):
        layer = params.layer(i)
        x, cache = attend(x, layer, i, cache, start, rotation, params.config, backend)
        x = ffn(
            x,
            layer.ffn_norm,
            layer.w_gate_up,
            layer.w_down,
            eps=params.config.norm_eps,
            backend=backend,
        )

    if last_only:  # before the head: its product is the widest of all
        x = last(x)
    x = rms_norm(x, params.norm, eps=params.config.norm_eps, backend=backend)
    logits = matmul(x, params.head, out_dtype=jnp.float32, backend=backend)
    return logits, None if cache is None else replace(cache, lengths=start + lengths)


def attend(
    x: jax.Array,  # [B, T, dim]
    layer: Layer,
    index: int,
    cache: KVCache | None,
    start: jax.Array,  # [B]: the position of each row's first token
    rotation: tuple[jax.Array, jax.Array],
    config: LlamaConfig,
    backend: str,
) -> tuple[jax.Array, KVCache | None]:
    """The attention half of a block, with its norm and residual."""
    B, T, _ = x.shape
    h = rms_norm(x, layer.attn_norm, eps=config.norm_eps, backend=backend)
    qkv = matmul(h, layer.wqkv, backend=backend).reshape(B, T, -1, config.head_dim)
    q, k, v = split_heads(qkv, config)
    q, k = rotate(q, *rotation), rotate(k, *rotation)

    if cache is None:
        keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)
    else:
        cache = cache.write(index, k, v)
        keys, values = cache.layer(index)
    op = decode_attention if cache is not None and T <= DECODE_QUERIES else attention
    out = op(q, keys, values, start, backend=backend)
    return matmul(out.reshape(B, T, -1), layer.wo, residual=x, backend=backend), cache


def split_heads(qkv: jax.Array, config: LlamaConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The heads of q, k and v from ``wqkv``'s output [B, T, heads, head_dim]. Counts come from the array, not from the
    config, so that the same code runs on a shard that holds a part of the heads."""
    per_kv_head = config.n_heads // config.n_kv_heads + 2
    kv_heads = qkv.shape[2] // per_kv_head
    q_heads = qkv.shape[2] - 2 * kv_heads
    return (
        qkv[:, :, :q_heads],
        qkv[:, :, q_heads : q_heads + kv_heads],
        qkv[:, :, q_heads + kv_heads :],
    )

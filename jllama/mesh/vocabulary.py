"""What needs the whole vocabulary, where every shard along a mesh axis has a part of it. All of these run inside
`jax.shard_map`; ``axis`` is the axis's name."""

import jax
import jax.numpy as jnp
from jax import lax

from jllama.kernels import QuantizedTensor, Weight, dequantize


def lookup(embed: Weight, tokens: jax.Array, axis: str | None, dtype: jnp.dtype) -> jax.Array:
    """The rows of ``tokens`` [...] in an embedding [V, dim], of which this shard has ``embed`` [V / shards, dim], as
    activations."""
    if axis is None:
        return _rows(embed, tokens, dtype)
    size = embed.shape[0]
    local = tokens - lax.axis_index(axis) * size
    own = (local >= 0) & (local < size)
    rows = _rows(embed, jnp.where(own, local, 0), dtype)
    return lax.psum(jnp.where(own[..., None], rows, 0), axis)  # one shard has the row, the others add zeros


def _rows(embed: Weight, places: jax.Array, dtype: jnp.dtype) -> jax.Array:
    if isinstance(embed, QuantizedTensor):
        return dequantize(QuantizedTensor(embed.data[places], embed.scale[places]), dtype)
    return embed[places]


def gather(logits: jax.Array, axis: str) -> jax.Array:
    """Logits [..., V] of the whole vocabulary, on every shard."""
    return lax.all_gather(logits, axis, axis=logits.ndim - 1, tiled=True, to="invarying")


def greedy(logits: jax.Array, axis: str) -> tuple[jax.Array, jax.Array]:
    """The largest logit's token [B], the first of several, and its log-probability [B]; of this shard's logits
    [B, V / shards]. Three numbers a row cross devices."""
    best = jnp.argmax(logits, axis=-1)
    top = jnp.max(logits, axis=-1)
    total = jnp.sum(jnp.exp(logits - top[:, None]), axis=-1)
    token = best + lax.axis_index(axis) * logits.shape[-1]
    # float32 holds every token id up to 2 ** 24 exactly.
    tops, totals, tokens = lax.all_gather(
        jnp.stack([top, total, token.astype(jnp.float32)]), axis, axis=1, to="invarying"
    )  # each [shards, B]
    winner = jnp.argmax(tops, axis=0)  # the first of equals: shards are in the order of the ids
    highest = jnp.max(tops, axis=0)
    logprob = -jnp.log(jnp.sum(totals * jnp.exp(tops - highest), axis=0))
    return jnp.take_along_axis(tokens, winner[None], axis=0)[0].astype(jnp.int32), logprob


def log_probability(logits: jax.Array, token: jax.Array, axis: str) -> jax.Array:
    """[...]: the log-probability of ``token`` [...] under the logits of all shards, of which this one has ``logits``
    [..., V / shards]."""
    size = logits.shape[-1]
    local = token - lax.axis_index(axis) * size
    own = (local >= 0) & (local < size)
    chosen = jnp.take_along_axis(logits, jnp.where(own, local, 0)[..., None], axis=-1)[..., 0]
    highest = lax.pmax(lax.stop_gradient(jnp.max(logits, axis=-1)), axis)
    total = jnp.sum(jnp.exp(logits - highest[..., None]), axis=-1)
    chosen, total = lax.psum((jnp.where(own, chosen - highest, 0), total), axis)
    return chosen - jnp.log(total)

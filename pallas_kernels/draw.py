"""Draws one token per row from its logits: temperature, top-k, top-p and min-p, in the order of Hugging Face.

Nothing is sorted. A search over the bits of floats finds the smallest logit that stays (`_largest_threshold`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .dispatch import Kernel, Op
from .hopper.sampling.draw import check_draw, draw_rows, skip_reason
from .transforms import vary_with


def draw_reference(
    logits: jax.Array,  # [B, V] float32
    u: jax.Array | None,  # [B], from 0 to below 1: a random number a row; None: the largest logit
    *,
    temperature: jax.Array | None,  # [B]; a row of 0 takes its largest logit; None where u is
    **cuts: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """One token per row [B], and its log-probability [B] under the unmodified logits. ``cuts``: see `truncate`."""
    token = jnp.argmax(logits, axis=-1)
    if u is not None:
        assert temperature is not None
        warm = truncate(logits / jnp.maximum(temperature, 1e-6)[:, None], **cuts)
        mass = jnp.exp(warm - jnp.max(warm, axis=-1, keepdims=True))
        token = jnp.where(temperature > 0, pick(mass, u), token)
    token = token.astype(jnp.int32)
    return token, log_probability(logits, token)


def log_probability(logits: jax.Array, token: jax.Array) -> jax.Array:
    """[B]: the log-probability of ``token`` [B] under the softmax of ``logits`` [B, V]."""
    below = logits - jnp.max(logits, axis=-1, keepdims=True)
    return jnp.take_along_axis(below, token[:, None], axis=-1)[:, 0] - jnp.log(jnp.sum(jnp.exp(below), axis=-1))


def truncate(
    logits: jax.Array,
    *,
    top_k: jax.Array | None = None,  # [B] int32; 0: off
    top_p: jax.Array | None = None,  # [B]; 1: off
    min_p: jax.Array | None = None,  # [B]; 0: off
) -> jax.Array:
    """[B, V] logits after temperature, with those that the cuts exclude at -inf. A cut that is None costs nothing."""
    top = jnp.max(logits, axis=-1, keepdims=True)
    if top_k is not None:
        wanted = jnp.where(top_k > 0, top_k, logits.shape[-1])
        logits = _keep(logits, jnp.ones_like(logits), wanted.astype(jnp.float32))
    if top_p is not None:
        mass = jnp.exp(logits - top)
        # At 1 no threshold meets the target: nothing is cut, whatever the sum's rounding.
        wanted = jnp.where(top_p < 1, top_p * jnp.sum(mass, axis=-1), jnp.inf)
        logits = _keep(logits, mass, wanted)
    if min_p is not None:
        logits = jnp.where(logits - top >= jnp.log(min_p)[:, None], logits, -jnp.inf)
    return logits


_BLOCK = 128  # tokens of a block; `pick` first sums the masses of each block


def pick(mass: jax.Array, u: jax.Array) -> jax.Array:
    """[B]: the first token at which the running sum of the masses [B, V] passes ``u`` [B] times their total.
    It needs one random number per row: to draw one per token would take longer than the rest of sampling."""
    blocks = jnp.pad(mass, ((0, 0), (0, -mass.shape[1] % _BLOCK))).reshape(mass.shape[0], -1, _BLOCK)
    sums = blocks.sum(axis=2)
    wanted = u * sums.sum(axis=1)
    block, before = _passing(sums, wanted)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * _BLOCK + _passing(inside, jnp.maximum(wanted - before, 0))[0]


def _passing(mass: jax.Array, wanted: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first index of [B, n] at which the running sum passes ``wanted`` [B], and the sum before it. Where rounding
    leaves the total too small, the last index with any mass."""
    total = jnp.cumsum(mass, axis=1)
    place = jnp.sum((total <= wanted[:, None]) & (total < total[:, -1:]), axis=1)
    return place, jnp.take_along_axis(total - mass, place[:, None], axis=1)[:, 0]


def _keep(logits: jax.Array, weight: jax.Array, wanted: jax.Array) -> jax.Array:
    """Keep the largest logits, as many as it takes for their weights to sum to ``wanted`` [B]. Equal logits are kept or
    dropped together."""
    bits = _ordered_bits(logits)
    return jnp.where(bits >= _largest_threshold(bits, weight, wanted)[:, None], logits, -jnp.inf)


def _ordered_bits(x: jax.Array) -> jax.Array:
    """Unsigned integers in the order of the floats: a larger float gives a larger integer."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 0, bits | jnp.uint32(1 << 31), ~bits)


_DIGIT = 4  # bits settled by one pass over the vocabulary, which tries 2**4 - 1 thresholds at once


def _largest_threshold(bits: jax.Array, weight: jax.Array, wanted: jax.Array) -> jax.Array:
    """[B]: the largest t with ``sum(weight where bits >= t) >= wanted``, found `_DIGIT` bits at a time from the top;
    0 where the total does not reach ``wanted``."""
    digits = jnp.arange(1, 2**_DIGIT, dtype=jnp.uint32)

    def settle(i: jax.Array, low: jax.Array) -> jax.Array:
        shift = jnp.uint32(32 - _DIGIT) - jnp.uint32(_DIGIT) * jnp.asarray(i, jnp.uint32)
        tried = low[:, None] + (digits << shift)[None]  # [B, 15]
        reached = jnp.sum(jnp.where(bits[:, None] >= tried[:, :, None], weight[:, None], 0), axis=-1)  # [B, 15]
        # The sums fall as the threshold rises, so the digit is the number of thresholds that still reach it.
        digit = jnp.sum(reached >= wanted[:, None], axis=-1, dtype=jnp.uint32)
        return low + (digit << shift)

    zeros = vary_with(jnp.zeros(bits.shape[0], jnp.uint32), bits, weight, wanted)
    return lax.fori_loop(0, 32 // _DIGIT, settle, zeros)


draw = Op("draw", draw_reference, {"hopper": Kernel(draw_rows, check_draw)}, skip_reason=skip_reason)

CASES: dict[str, dict[str, Any]] = {
    "7b": dict(rows=1, vocab=32000),
    "7b-batch": dict(rows=8, vocab=32000),
    "small": dict(rows=3, vocab=512),
    "smollm2": dict(rows=1, vocab=49_152),
    "8b": dict(rows=1, vocab=128_256),
    "8b-batch": dict(rows=64, vocab=128_256),
    "largest": dict(rows=8, vocab=262_144),
}

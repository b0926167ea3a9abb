"""Choosing the next token, on the device, with settings of its own for every row.

The order is that of Hugging Face: repetition penalty, temperature, top-k, top-p, min-p. Nothing is sorted: the
smallest logit that stays is found by a search over the bits of floats (`_largest_threshold`).
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from jllama.errors import InputError


@struct.dataclass
class Sampling:
    """Settings, an array [B] each. A setting that no row uses is None: it costs nothing and is not compiled in."""

    key: jax.Array  # [B] random keys, one a row: a row's text does not depend on its neighbours
    temperature: jax.Array | None = None  # None: all rows greedy; a row of 0 is greedy
    top_k: jax.Array | None = None  # int32; 0: off
    top_p: jax.Array | None = None  # 1: off
    min_p: jax.Array | None = None  # 0: off
    repetition_penalty: jax.Array | None = None  # 1: off


# What each setting may be, and the value that turns it off.
_RULES: dict[str, tuple[str, Callable[[float], bool], float]] = {
    "temperature": ("a number of at least 0", lambda v: 0 <= v < float("inf"), 0.0),
    "top_k": ("a whole number of at least 0 (0: off)", lambda v: 0 <= v < 2**31 and v == int(v), 0),
    "top_p": ("a number above 0 and at most 1 (1: off)", lambda v: 0 < v <= 1, 1.0),
    "min_p": ("a number from 0 to below 1 (0: off)", lambda v: 0 <= v < 1, 0.0),
    "repetition_penalty": (
        "a number above 0 (1: off)",
        lambda v: 0 < v < float("inf"),
        1.0,
    ),
}

Setting = float | Sequence[float]


def make_sampling(
    batch: int,
    *,
    seed: int | Sequence[int] = 0,
    temperature: Setting = 0.0,
    top_k: Setting = 0,
    top_p: Setting = 1.0,
    min_p: Setting = 0.0,
    repetition_penalty: Setting = 1.0,
) -> Sampling:
    """Settings for ``batch`` rows; every one may be a single value or one a row. Temperature 0 is greedy.

    A single ``seed`` gives row ``i`` the seed ``seed + i``.
    """
    given = dict(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    rows = {name: _per_row(name, value, batch) for name, value in given.items()}
    if not rows["temperature"].any():  # truncation changes nothing about the largest logit
        rows = {"repetition_penalty": rows["repetition_penalty"]}
    arrays = {
        name: jnp.asarray(row, jnp.int32 if name == "top_k" else jnp.float32)
        for name, row in rows.items()
        if (row != _RULES[name][2]).any()
    }
    seeds = list(range(seed, seed + batch)) if isinstance(seed, int) else list(seed)
    if len(seeds) != batch:
        raise InputError(f"seed: expected one value or {batch} (one a row), found {len(seeds)}")
    return Sampling(key=_keys(np.asarray([s % 2**32 for s in seeds], np.uint32)), **arrays)


_keys = jax.jit(jax.vmap(jax.random.key))


def check_setting(name: str, value: float) -> float:
    """The value itself, or an `InputError` that says what was expected."""
    expected, valid, _ = _RULES[name]
    if not valid(value):
        raise InputError(f"{name}: expected {expected}, found {value:g}")
    return value


def _per_row(name: str, value: Setting, batch: int) -> np.ndarray:
    values = [value] * batch if isinstance(value, int | float) else list(value)
    if len(values) != batch:
        raise InputError(f"{name}: expected one value or {batch} (one a row), found {len(values)}")
    return np.asarray([check_setting(name, v) for v in values], np.float64)


def sample(
    logits: jax.Array,  # [B, V] float32
    sampling: Sampling,
    step: jax.Array,  # [B]: how many tokens the row has drawn before; makes each draw's key
    seen: jax.Array | None = None,  # [B, V] bool: tokens so far, for the repetition penalty
) -> tuple[jax.Array, jax.Array]:
    """A token for every row [B], and its log-probability [B] under the model's own, unchanged distribution."""
    adjusted = logits
    if sampling.repetition_penalty is not None and seen is not None:
        penalty = sampling.repetition_penalty[:, None]
        adjusted = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    token = jnp.argmax(adjusted, axis=-1)
    if sampling.temperature is not None:
        token = jnp.where(sampling.temperature > 0, _draw(adjusted, sampling, step), token)
    logprob = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)
    return token.astype(jnp.int32), logprob


def _draw(logits: jax.Array, sampling: Sampling, step: jax.Array) -> jax.Array:
    assert sampling.temperature is not None
    logits = truncate(logits / jnp.maximum(sampling.temperature, 1e-6)[:, None], sampling)
    keys = jax.vmap(jax.random.fold_in)(sampling.key, step)
    mass = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    return pick(mass, jax.vmap(jax.random.uniform)(keys))


_BLOCK = 128  # of a vocabulary, whose masses are added up first


def pick(mass: jax.Array, share: jax.Array) -> jax.Array:
    """[B]: where the masses [B, V], added up from the first, pass ``share`` [B] of their sum. One random number a row:
    to draw one for every token takes longer than all else that sampling does."""
    blocks = jnp.pad(mass, ((0, 0), (0, -mass.shape[1] % _BLOCK))).reshape(mass.shape[0], -1, _BLOCK)
    sums = blocks.sum(axis=2)
    wanted = share * sums.sum(axis=1)
    block, before = _passing(sums, wanted)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * _BLOCK + _passing(inside, jnp.maximum(wanted - before, 0))[0]


def _passing(mass: jax.Array, wanted: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first place of [B, n] whose running sum passes ``wanted`` [B], and the sum before it. Where rounding has left
    too little, the last with any mass."""
    total = jnp.cumsum(mass, axis=1)
    place = jnp.sum((total <= wanted[:, None]) & (total < total[:, -1:]), axis=1)
    return place, jnp.take_along_axis(total - mass, place[:, None], axis=1)[:, 0]


def truncate(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """[B, V] logits after temperature, with those that top-k, top-p and min-p exclude at -inf."""
    top = jnp.max(logits, axis=-1, keepdims=True)
    if sampling.top_k is not None:
        wanted = jnp.where(sampling.top_k > 0, sampling.top_k, logits.shape[-1])
        logits = _keep(logits, jnp.ones_like(logits), wanted.astype(jnp.float32))
    if sampling.top_p is not None:
        mass = jnp.exp(logits - top)
        # At 1 no threshold meets the target: nothing is cut, whatever the sum's rounding.
        wanted = jnp.where(sampling.top_p < 1, sampling.top_p * jnp.sum(mass, axis=-1), jnp.inf)
        logits = _keep(logits, mass, wanted)
    if sampling.min_p is not None:
        logits = jnp.where(logits - top >= jnp.log(sampling.min_p)[:, None], logits, -jnp.inf)
    return logits


def _keep(logits: jax.Array, weight: jax.Array, wanted: jax.Array) -> jax.Array:
    """The largest logits whose weights together reach ``wanted`` [B]; equal logits stay or go together."""
    bits = _ordered_bits(logits)
    return jnp.where(bits >= _largest_threshold(bits, weight, wanted)[:, None], logits, -jnp.inf)


def _ordered_bits(x: jax.Array) -> jax.Array:
    """Unsigned integers in the order of the floats: larger float, larger integer."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 0, bits | jnp.uint32(1 << 31), ~bits)


_DIGIT = 4  # bits settled by one pass over the vocabulary, which tries 2**4 - 1 thresholds at once


def _largest_threshold(bits: jax.Array, weight: jax.Array, wanted: jax.Array) -> jax.Array:
    """[B]: the largest t with ``sum(weight where bits >= t) >= wanted``, found digit by digit from the top; 0 where
    even the sum of all does not reach that."""
    digits = jnp.arange(1, 2**_DIGIT, dtype=jnp.uint32)

    def settle(i: jax.Array, low: jax.Array) -> jax.Array:
        shift = jnp.uint32(32 - _DIGIT) - jnp.uint32(_DIGIT) * i.astype(jnp.uint32)
        tried = low[:, None] + (digits << shift)  # [B, 15]
        reached = jnp.sum(jnp.where(bits[:, None] >= tried[:, :, None], weight[:, None], 0), axis=-1)  # [B, 15]
        # The sums fall as the threshold rises, so the number that suffice is the digit.
        digit = jnp.sum(reached >= wanted[:, None], axis=-1, dtype=jnp.uint32)
        return low + (digit << shift)

    return lax.fori_loop(0, 32 // _DIGIT, settle, jnp.zeros(bits.shape[0], jnp.uint32))

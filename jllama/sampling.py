"""Choosing the next token, on the device, with settings of its own for every row.

The order is that of Hugging Face: logit bias, repetition penalty, presence and frequency penalty, tokens that may not
come, temperature, top-k, top-p, min-p; the last four are `pallas_kernels.draw`'s.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jllama.errors import InputError
from jllama.kernels import draw, log_probability


@struct.dataclass
class Sampling:
    """Settings, an array [B] each. A setting that no row uses is None: it costs nothing and is not compiled in."""

    key: jax.Array  # [B] random keys, one a row: a row's text does not depend on its neighbours
    temperature: jax.Array | None = None  # None: all rows greedy; a row of 0 is greedy
    top_k: jax.Array | None = None  # int32; 0: off
    top_p: jax.Array | None = None  # 1: off
    min_p: jax.Array | None = None  # 0: off
    repetition_penalty: jax.Array | None = None  # 1: off
    presence_penalty: jax.Array | None = None  # 0: off; taken from the logits of what the row has drawn
    frequency_penalty: jax.Array | None = None  # 0: off; the same, times how often it was drawn
    logit_bias: jax.Array | None = None  # [B, n], added to the logits of
    bias_ids: jax.Array | None = None  # [B, n] int32; an id past the last is none
    min_tokens: jax.Array | None = None  # int32: how many are drawn before a stop token may come
    bad_words: jax.Array | None = None  # [B, n, m] int32: sequences that may not come; NOTHING fills up on the left


NOTHING = -1  # where a sequence of `Sampling.bad_words`, or a row's recent tokens, have none


@struct.dataclass
class History:
    """What the texts hold so far, as far as the settings ask for it."""

    seen: jax.Array | None = None  # [B, V] bool: tokens of prompt and text, for the repetition penalty
    counts: jax.Array | None = None  # [B, V] int32: how often the row drew a token, for presence and frequency
    recent: jax.Array | None = None  # [B, m - 1] int32: the last tokens of prompt and text, for bad words

    def add(self, token: jax.Array, alive: jax.Array) -> "History":
        """With a token [B] more in the rows that are ``alive`` [B]."""
        rows = jnp.arange(token.shape[0])
        return History(
            seen=None if self.seen is None else self.seen.at[rows, token].max(alive),
            counts=None if self.counts is None else self.counts.at[rows, token].add(alive.astype(jnp.int32)),
            recent=None
            if self.recent is None
            else jnp.where(alive[:, None], jnp.concatenate([self.recent[:, 1:], token[:, None]], axis=1), self.recent),
        )


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
    *,
    history: History | None = None,  # all that the settings ask for, ``seen`` among it
    stop_ids: jax.Array | None = None,  # [B, n]: what ends a row, for `Sampling.min_tokens`
    backend: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """A token for every row [B], and its log-probability [B] under the model's own, unchanged distribution."""
    history = History(seen=seen) if history is None else history
    share = None
    if sampling.temperature is not None:
        share = jax.vmap(jax.random.uniform)(jax.vmap(jax.random.fold_in)(sampling.key, step))
    how = dict(temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p)
    adjusted = adjust(logits, sampling, step, history, stop_ids)
    token, logprob = draw(adjusted, share, backend=backend, **how)
    return token, logprob if adjusted is logits else log_probability(logits, token)


def adjust(
    logits: jax.Array,  # [B, V] float32
    sampling: Sampling,
    step: jax.Array,  # [B]
    history: History,
    stop_ids: jax.Array | None,  # [B, n]
) -> jax.Array:
    """The logits that the row draws from; the same array where no setting changes them."""
    rows = jnp.arange(logits.shape[0])[:, None]
    if sampling.logit_bias is not None and sampling.bias_ids is not None:
        logits = logits.at[rows, sampling.bias_ids].add(sampling.logit_bias, mode="drop")
    if sampling.repetition_penalty is not None and history.seen is not None:
        penalty = sampling.repetition_penalty[:, None]
        penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
        logits = jnp.where(history.seen, penalised, logits)
    if sampling.presence_penalty is not None and history.counts is not None:
        logits -= sampling.presence_penalty[:, None] * (history.counts > 0)
    if sampling.frequency_penalty is not None and history.counts is not None:
        logits -= sampling.frequency_penalty[:, None] * history.counts
    if sampling.min_tokens is not None and stop_ids is not None:
        early = (step < sampling.min_tokens)[:, None]
        logits = _ban(logits, jnp.where(early, stop_ids, NOTHING))
    if sampling.bad_words is not None and history.recent is not None:
        begun, last = sampling.bad_words[:, :, :-1], sampling.bad_words[:, :, -1]
        matches = (begun == NOTHING) | (begun == history.recent[:, None])
        logits = _ban(logits, jnp.where(matches.all(axis=-1), last, NOTHING))
    return logits


def _ban(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """``logits`` [B, V] with those of ``ids`` [B, n] at -inf."""
    outside = jnp.where(ids == NOTHING, logits.shape[1], ids)  # a negative index would count from the end
    return logits.at[jnp.arange(logits.shape[0])[:, None], outside].set(-jnp.inf, mode="drop")

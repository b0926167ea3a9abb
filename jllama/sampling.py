"""Sampling of the next token on the device. Every row has its own settings.

The order is that of Hugging Face: logit bias, repetition penalty, presence and frequency penalties, banned tokens,
temperature, top-k, top-p, min-p. `pallas_kernels.draw` does the last four.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.core import Tracer

from jllama.config import Backend
from jllama.errors import InputError
from jllama.kernels import draw, log_probability
from jllama.mesh.vocabulary import gather, greedy


@struct.dataclass
class Sampling:
    """Sampling settings: one array [B] for each. A setting that no row uses is None; it is then not compiled in."""

    key: jax.Array  # [B] random keys, one per row: the text of a row does not depend on the other rows
    temperature: jax.Array | None = None  # None: all rows are greedy; 0: this row is greedy
    top_k: jax.Array | None = None  # int32; 0: off
    top_p: jax.Array | None = None  # 1: off
    min_p: jax.Array | None = None  # 0: off
    repetition_penalty: jax.Array | None = None  # 1: off
    presence_penalty: jax.Array | None = None  # 0: off; subtracted once from the logit of every drawn token
    frequency_penalty: jax.Array | None = None  # 0: off; subtracted once for each time the token was drawn
    logit_bias: jax.Array | None = None  # [B, n]: added to the logits of ``bias_ids``
    bias_ids: jax.Array | None = None  # [B, n] int32; ids outside the vocabulary are ignored
    min_tokens: jax.Array | None = None  # int32: stop tokens are banned until this many tokens are drawn
    bad_words: jax.Array | None = None  # [B, n, m] int32: banned sequences, left-padded with NOTHING


NOTHING = -1  # padding of `Sampling.bad_words` and of `History.recent`


@struct.dataclass
class History:
    """What the settings need to know about the tokens of each row. A field that no setting needs is None."""

    seen: jax.Array | None = None  # [B, V] bool: tokens of the prompt and the text, for the repetition penalty
    counts: jax.Array | None = None  # [B, V] int32: how often each token was drawn, for presence and frequency
    recent: jax.Array | None = None  # [B, m - 1] int32: the last tokens of the prompt and the text, for bad words

    def add(self, token: jax.Array, alive: jax.Array) -> "History":
        """The history after one more token [B] in the rows that are ``alive`` [B]."""
        rows = jnp.arange(token.shape[0])
        return History(
            seen=None if self.seen is None else self.seen.at[rows, token].max(alive),
            counts=None if self.counts is None else self.counts.at[rows, token].add(alive.astype(jnp.int32)),
            recent=None
            if self.recent is None
            else jnp.where(alive[:, None], jnp.concatenate([self.recent[:, 1:], token[:, None]], axis=1), self.recent),
        )


# For each setting: the range in words, the check, and the value that turns it off.
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

Setting = float | Sequence[float] | jax.Array | np.ndarray


def make_sampling(
    batch: int,
    *,
    seed: int | Sequence[int] | jax.Array | np.ndarray | None = None,
    key: jax.Array | None = None,
    temperature: Setting = 0.0,
    top_k: Setting = 0,
    top_p: Setting = 1.0,
    min_p: Setting = 0.0,
    repetition_penalty: Setting = 1.0,
) -> Sampling:
    """Settings for ``batch`` rows. Each setting is one value for all rows or one value per row. Temperature 0 is
    greedy.

    A single ``seed`` (default: 0) gives row ``i`` the seed ``seed + i``. Instead of ``seed``, ``key`` takes a key of
    `jax.random`: one key, into which the row number is folded, or one key per row. Under jit, values may be traced.
    Traced values are not checked, and their settings are always compiled in.
    """
    given = dict(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    rows = {name: _per_row(name, value, batch) for name, value in given.items()}
    if _off("temperature", rows["temperature"]):  # greedy: truncation never removes the largest logit
        rows = {"repetition_penalty": rows["repetition_penalty"]}
    arrays = {
        name: jnp.asarray(row, jnp.int32 if name == "top_k" else jnp.float32)
        for name, row in rows.items()
        if not _off(name, row)
    }
    if key is None:
        return Sampling(key=_keys(_seeds(0 if seed is None else seed, batch)), **arrays)
    if seed is not None:
        raise InputError("seed: expected either seed or key, found both")
    return Sampling(key=_row_keys(key, batch), **arrays)


def _seeds(seed: int | Sequence[int] | jax.Array | np.ndarray, batch: int) -> jax.Array | np.ndarray:
    """[B] uint32: the seed of every row."""
    if _traced(seed):
        seeds = jnp.asarray(seed).astype(jnp.uint32)
        return seeds + jnp.arange(batch, dtype=jnp.uint32) if seeds.ndim == 0 else _check_per_row("seed", seeds, batch)
    numbers = np.asarray(seed, object)  # Python integers, which may be of any size
    numbers = numbers + np.arange(batch) if numbers.ndim == 0 else _check_per_row("seed", numbers, batch)
    return (numbers % 2**32).astype(np.uint32)


def _row_keys(key: jax.Array, batch: int) -> jax.Array:
    """[B] keys. If one key is given, the key of row i does not depend on the batch size."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):  # a raw key of `jax.random.PRNGKey`
        key = jax.random.wrap_key_data(key)
    return _fold(key, jnp.arange(batch)) if key.ndim == 0 else _check_per_row("key", key, batch)


_keys = jax.jit(jax.vmap(jax.random.key))
_fold = jax.jit(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))


def check_setting(name: str, value: float) -> float:
    """Return the value, or raise an `InputError` that says which values are valid."""
    expected, valid, _ = _RULES[name]
    if not valid(value):
        raise InputError(f"{name}: expected {expected}, found {value:g}")
    return value


def _per_row(name: str, value: Setting, batch: int) -> np.ndarray | jax.Array:
    """[B]: the values of a setting. Values that are not traced are checked."""
    if _traced(value):
        row = jnp.asarray(value)
        return jnp.broadcast_to(row, batch) if row.ndim == 0 else _check_per_row(name, row, batch)
    row = np.asarray(value, np.float64)
    row = np.broadcast_to(row, batch) if row.ndim == 0 else _check_per_row(name, row, batch)
    for v in row.tolist():
        check_setting(name, v)
    return row


def _check_per_row[A: (jax.Array, np.ndarray)](name: str, row: A, batch: int) -> A:
    if row.shape != (batch,):
        found = len(row) if row.ndim == 1 else f"an array {list(row.shape)}"
        raise InputError(f"{name}: expected one value or {batch} (one a row), found {found}")
    return row


def _off(name: str, row: np.ndarray | jax.Array) -> bool:
    """Whether a setting is known to be off in every row."""
    return not _traced(row) and bool((row == _RULES[name][2]).all())


def _traced(value: Any) -> bool:
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(value))


def sample(
    logits: jax.Array,  # [B, V] float32
    sampling: Sampling,
    step: jax.Array,  # [B]: how many tokens the row has drawn so far; folded into the row's key
    seen: jax.Array | None = None,  # [B, V] bool: tokens so far, for the repetition penalty
    *,
    history: History | None = None,  # everything that the settings need; replaces ``seen``
    stop_ids: jax.Array | None = None,  # [B, n]: the stop tokens of each row, for `Sampling.min_tokens`
    axis: str | None = None,
    backend: Backend = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Draw one token per row. Returns the tokens [B] and their log-probabilities [B] under the unmodified logits.

    With ``axis``, inside `jax.shard_map`, ``logits`` [B, V / shards] are this shard's part of the vocabulary. They are
    gathered only if a setting needs them, so that the draw is the same as on one device."""
    if axis is not None:
        if not jax.tree.leaves(replace(sampling, key=None)):
            return greedy(logits, axis)
        logits = gather(logits, axis)
    history = History(seen=seen) if history is None else history
    u = None
    if sampling.temperature is not None:
        u = jax.vmap(jax.random.uniform)(jax.vmap(jax.random.fold_in)(sampling.key, step))
    settings = dict(temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p)
    adjusted = adjust(logits, sampling, step, history, stop_ids)
    token, logprob = draw(adjusted, u, backend=backend, **settings)
    return token, logprob if adjusted is logits else log_probability(logits, token)


def adjust(
    logits: jax.Array,  # [B, V] float32
    sampling: Sampling,
    step: jax.Array,  # [B]
    history: History,
    stop_ids: jax.Array | None,  # [B, n]
) -> jax.Array:
    """The logits after biases, penalties and bans. If no setting changes them, it is the same array object."""
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
        prefix, last = sampling.bad_words[:, :, :-1], sampling.bad_words[:, :, -1]
        matches = (prefix == NOTHING) | (prefix == history.recent[:, None])
        logits = _ban(logits, jnp.where(matches.all(axis=-1), last, NOTHING))
    return logits


def _ban(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """``logits`` [B, V] with the entries of ``ids`` [B, n] set to -inf."""
    columns = jnp.where(ids == NOTHING, logits.shape[1], ids)  # out of bounds, hence dropped; -1 would wrap around
    return logits.at[jnp.arange(logits.shape[0])[:, None], columns].set(-jnp.inf, mode="drop")

"""Sampling of the next token on the device. Every row has its own settings.

The order is that of Hugging Face: logit bias, repetition penalty, presence and frequency penalties, banned tokens,
temperature, top-k, top-p, min-p. `pallas_kernels.draw` does the last four.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.core import Tracer
from jax.experimental.layout import Layout, with_layout_constraint

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
NO_ID = 2**31 - 1  # padding of `Sampling.bias_ids`: out of every vocabulary


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


def begin_history(
    sampling: Sampling, tokens: jax.Array | np.ndarray, lengths: jax.Array | np.ndarray, vocab_size: int
) -> History:
    """What the settings need to know of prompts ``tokens`` [B, T], of which the first ``lengths`` [B] tokens are real.
    Where no setting needs anything, nothing is computed."""
    counted = sampling.presence_penalty is not None or sampling.frequency_penalty is not None
    recent = None
    if sampling.bad_words is not None:
        back = lengths[:, None] - jnp.arange(sampling.bad_words.shape[-1] - 1, 0, -1)  # [B, m - 1]
        recent = jnp.where(back >= 0, jnp.take_along_axis(jnp.asarray(tokens), jnp.maximum(back, 0), axis=1), NOTHING)
    return History(
        seen=None if sampling.repetition_penalty is None else tokens_seen(tokens, lengths, vocab_size),
        counts=jnp.zeros((tokens.shape[0], vocab_size), jnp.int32) if counted else None,
        recent=recent,
    )


def tokens_seen(tokens: jax.Array | np.ndarray, lengths: jax.Array | np.ndarray, vocab_size: int) -> jax.Array:
    """[B, V] bool: which ids occur in each row of ``tokens`` [B, T]. Only the first ``lengths`` [B] tokens count."""
    B, T = tokens.shape
    real = jnp.arange(T)[None] < lengths[:, None]
    columns = jnp.where(real, tokens, vocab_size)  # padding goes out of bounds and is dropped
    return jnp.zeros((B, vocab_size), bool).at[jnp.arange(B)[:, None], columns].set(True, mode="drop")


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
    "presence_penalty": ("a number (0: off)", math.isfinite, 0.0),
    "frequency_penalty": ("a number (0: off)", math.isfinite, 0.0),
    "min_tokens": ("a whole number of at least 0 (0: off)", lambda v: 0 <= v < 2**31 and v == int(v), 0),
}
CHECKED = tuple(_RULES)
_CUTS = ("temperature", "top_k", "top_p", "min_p")  # without effect on greedy rows

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
    presence_penalty: Setting = 0.0,
    frequency_penalty: Setting = 0.0,
    min_tokens: Setting = 0,
    logit_bias: Mapping[int, float] | Sequence[Mapping[int, float]] = MappingProxyType({}),
    bad_words: Sequence[Sequence[int]] = (),
) -> Sampling:
    """Settings for ``batch`` rows. Each setting is one value for all rows or one value per row. Temperature 0 is
    greedy. ``logit_bias`` is ``{token: number}``, for all rows or one per row; ``bad_words`` are sequences of tokens
    that must not be drawn, in any row.

    A single ``seed`` (default: 0) gives row ``i`` the seed ``seed + i``; seeds have 64 bits. Instead of ``seed``,
    ``key`` takes a key of `jax.random`: one key, into which the row number is folded, or one key per row. Under jit,
    values may be traced. Traced values are not checked, and their settings are always compiled in.
    """
    given = dict(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        min_tokens=min_tokens,
    )
    rows = {name: _per_row(name, value, batch) for name, value in given.items()}
    if _off("temperature", rows["temperature"]):  # greedy: truncation never removes the largest logit
        rows = {name: row for name, row in rows.items() if name not in _CUTS}
    arrays = {
        name: jnp.asarray(row, jnp.int32 if name in ("top_k", "min_tokens") else jnp.float32)
        for name, row in rows.items()
        if not _off(name, row)
    }
    biases = [logit_bias] * batch if isinstance(logit_bias, Mapping) else list(logit_bias)
    if len(biases) != batch:
        raise InputError(f"logit_bias: expected one for all or {batch} (one a row), found {len(biases)}")
    if any(biases):
        arrays |= dict(zip(("bias_ids", "logit_bias"), map(jnp.asarray, bias_table(biases)), strict=True))
    if bad_words:
        arrays["bad_words"] = jnp.tile(word_table(bad_words), (batch, 1, 1))
    if key is None:
        return Sampling(key=_keys(_words(0 if seed is None else seed, batch)), **arrays)
    if seed is not None:
        raise InputError("seed: expected either seed or key, found both")
    return Sampling(key=_row_keys(key, batch), **arrays)


def bias_table(biases: Sequence[Mapping[int, float]], width: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """`Sampling.bias_ids` and `Sampling.logit_bias` [B, width]. The default width is a multiple of 16, so that few
    shapes are compiled."""
    for bias in biases:
        check_bias(bias)
    width = _multiple(max(map(len, biases)), 16) if width is None else width
    ids, values = np.full((len(biases), width), NO_ID, np.int32), np.zeros((len(biases), width), np.float32)
    for row, bias in enumerate(biases):
        ids[row, : len(bias)], values[row, : len(bias)] = list(bias), list(bias.values())
    return ids, values


def check_bias(bias: Mapping[int, float]) -> None:
    """Raise `InputError` unless every entry is a token and a number that can be added; -inf bans the token."""
    for token, value in bias.items():
        if token != int(token) or not 0 <= token < NO_ID:
            raise InputError(f"logit_bias: expected token ids of at least 0, found {token}")
        if math.isnan(value) or value == math.inf:
            raise InputError(f"logit_bias: token {token}: expected a number, found {value}")


def word_table(words: Sequence[Sequence[int]], count: int | None = None, length: int | None = None) -> np.ndarray:
    """`Sampling.bad_words` of one row, [count, length]. The defaults are multiples of 4."""
    if not all(len(word) for word in words):
        raise InputError("bad_words: expected sequences of at least 1 token, found an empty one")
    count = _multiple(len(words), 4) if count is None else count
    length = _multiple(max(map(len, words)), 4) if length is None else length
    table = np.full((count, length), NOTHING, np.int32)
    for row, word in zip(table, words, strict=False):
        row[-len(word) :] = word
    return table


def _multiple(n: int, of: int) -> int:
    return -(-n // of) * of


def seed_words(seeds: Sequence[int] | np.ndarray) -> np.ndarray:
    """[B, 2] uint32: the high and the low word of every seed, of which the last 64 bits count."""
    numbers = np.asarray(seeds, object) % 2**64  # Python integers, which may be of any size
    return np.stack([numbers >> 32, numbers % 2**32], axis=-1).astype(np.uint32)


def keys_of(words: jax.Array | np.ndarray) -> jax.Array:
    """[B] keys from `seed_words` [B, 2]: for a seed below 2**32, that of `jax.random.key`."""
    return jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32")


def _words(seed: int | Sequence[int] | jax.Array | np.ndarray, batch: int) -> jax.Array | np.ndarray:
    """[B, 2] uint32: the words of every row's seed."""
    if not _traced(seed):
        numbers = np.asarray(seed, object)
        return seed_words(numbers + np.arange(batch) if numbers.ndim == 0 else _check_per_row("seed", numbers, batch))
    seeds = jnp.asarray(seed)
    high, low = (seeds >> 16 >> 16).astype(jnp.uint32), seeds.astype(jnp.uint32)  # in two steps: they may have 32 bits
    if seeds.ndim == 0:
        rows = low + jnp.arange(batch, dtype=jnp.uint32)
        high, low = high + (rows < low), rows  # with the carry
    return jnp.stack([_check_per_row("seed", word, batch) for word in (high, low)], axis=-1)


def _row_keys(key: jax.Array, batch: int) -> jax.Array:
    """[B] keys. If one key is given, the key of row i does not depend on the batch size."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):  # a raw key of `jax.random.PRNGKey`
        key = jax.random.wrap_key_data(key)
    return _fold(key, jnp.arange(batch)) if key.ndim == 0 else _check_per_row("key", key, batch)


_keys = jax.jit(keys_of)
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
    history: History | None = None,  # the tokens so far, as far as the settings need them
    *,
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
    history = History() if history is None else history
    adjusted = adjust(logits, sampling, step, history, stop_ids)
    token, logprob = draw_adjusted(adjusted, sampling, step, backend=backend)
    return token, logprob if adjusted is logits else log_probability(logits, token)


def draw_adjusted(
    logits: jax.Array,  # [B, V] float32: after `adjust`
    sampling: Sampling,
    step: jax.Array,  # [B]
    *,
    backend: Backend = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Draw one token per row by temperature and cuts. Returns the tokens [B] and their log-probabilities [B] under
    these logits. A logit of -inf is never drawn unless all are."""
    u = None
    if sampling.temperature is not None:
        u = jax.vmap(jax.random.uniform)(jax.vmap(jax.random.fold_in)(sampling.key, step))
    settings = dict(temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p)
    return draw(logits, u, backend=backend, **settings)


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


def top_logprobs(logits: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The ids [B, count] and log-probabilities [B, count] of the likeliest tokens, the likeliest first. If the
    vocabulary has fewer than ``count`` tokens, the rest has the id NOTHING."""
    # XLA's top_k on a GPU reads its input as if rows were contiguous. A product may leave columns contiguous instead.
    rows = with_layout_constraint(jax.nn.log_softmax(logits, axis=-1), Layout(major_to_minor=(0, 1)))
    values, ids = lax.top_k(rows, min(count, logits.shape[-1]))
    pad = ((0, 0), (0, count - values.shape[-1]))
    return jnp.pad(ids, pad, constant_values=NOTHING).astype(jnp.int32), jnp.pad(values, pad)


def _ban(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """``logits`` [B, V] with the entries of ``ids`` [B, n] set to -inf."""
    columns = jnp.where(ids == NOTHING, logits.shape[1], ids)  # out of bounds, hence dropped; -1 would wrap around
    return logits.at[jnp.arange(logits.shape[0])[:, None], columns].set(-jnp.inf, mode="drop")

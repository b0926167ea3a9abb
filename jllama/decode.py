"""Decoding as pure functions: `prefill`, then `decode_step` again and again over one donated `DecodeState`.

`generate` composes them for use inside other programs (jit, vmap, grad of what surrounds it); `jllama.stream` calls
the compiled pieces chunk by chunk for whoever wants text as it comes.
"""

import functools
from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from jllama.cache import KVCache, init_cache
from jllama.errors import InputError
from jllama.model import forward
from jllama.params import Params
from jllama.sampling import Sampling, make_sampling, sample

NO_TOKEN = -1  # what a finished row emits


@struct.dataclass
class DecodeState:
    """Everything that one step needs and changes. Donated, so that the cache is updated in place."""

    cache: KVCache
    token: jax.Array  # [B] int32: drawn, not in the cache yet
    done: jax.Array  # [B] bool
    drawn: jax.Array  # [B] int32: how many tokens the row has drawn
    limit: jax.Array  # [B] int32: how many it may draw
    stop_ids: jax.Array  # [B, n] int32: tokens that end the row; unused places hold NO_TOKEN
    seen: jax.Array | None  # [B, V] bool, only where a repetition penalty needs it
    sampling: Sampling


@struct.dataclass
class Drawn:
    """What a step gives out: tokens (NO_TOKEN from finished rows) and their log-probabilities."""

    tokens: jax.Array  # [..., B] int32
    logprobs: jax.Array  # [..., B] float32; NaN says that the model's logits were


def prefill(
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    logits: jax.Array,
    cache: KVCache,
    *,
    backend: str = "auto",
) -> tuple[jax.Array, KVCache]:
    """Feed one piece [B, T] of every row's prompt; ``lengths`` [B] says how much of it is real, 0 for a row that has
    none left. Returns the logits [B, V] of each row's last token so far (``logits`` is carried from piece to piece)."""
    new, grown = forward(params, tokens, cache, lengths=lengths, last_only=True, backend=backend)
    return jnp.where(lengths[:, None] > 0, new, logits), grown


def begin(
    logits: jax.Array,
    cache: KVCache,
    sampling: Sampling,
    limit: jax.Array,
    stop_ids: jax.Array,
    seen: jax.Array | None,
    *,
    backend: str = "auto",
) -> tuple[DecodeState, Drawn]:
    """Draw the first token of every row from the prompt's logits."""
    B = logits.shape[0]
    state = DecodeState(
        cache=cache,
        token=jnp.zeros(B, jnp.int32),
        done=limit <= 0,
        drawn=jnp.zeros(B, jnp.int32),
        limit=limit,
        stop_ids=stop_ids,
        seen=seen,
        sampling=sampling,
    )
    return _draw(state, logits, backend)


def decode_step(params: Params, state: DecodeState, *, backend: str = "auto") -> tuple[DecodeState, Drawn]:
    """One token for every row that is not done. One that is gets its key and value behind its length, too, where they
    are never seen."""
    alive = (~state.done).astype(jnp.int32)
    logits, cache = forward(
        params,
        state.token[:, None],
        state.cache,
        lengths=alive,
        last_only=True,
        backend=backend,
    )
    return _draw(replace(state, cache=cache), logits, backend)


def _draw(state: DecodeState, logits: jax.Array, backend: str) -> tuple[DecodeState, Drawn]:
    token, logprob = sample(logits, state.sampling, state.drawn, state.seen, backend=backend)
    emitted = Drawn(jnp.where(state.done, NO_TOKEN, token), jnp.where(state.done, 0.0, logprob))
    drawn = state.drawn + ~state.done
    stopped = jnp.any(token[:, None] == state.stop_ids, axis=-1) | (drawn >= state.limit)
    seen = state.seen
    if seen is not None:
        seen = seen.at[jnp.arange(token.shape[0]), token].set(True)
    return replace(state, token=token, done=state.done | stopped, drawn=drawn, seen=seen), emitted


def decode_chunk(params: Params, state: DecodeState, *, steps: int, backend: str = "auto") -> tuple[DecodeState, Drawn]:
    """``steps`` tokens for every row, as one `lax.scan`; the arrays of `Drawn` are [steps, B]."""
    return lax.scan(lambda s, _: decode_step(params, s, backend=backend), state, length=steps)


def tokens_seen(tokens: jax.Array, lengths: jax.Array, vocab_size: int) -> jax.Array:
    """[B, V] bool: which tokens occur among the real ones of ``tokens`` [B, T]."""
    B, T = tokens.shape
    places = jnp.where(jnp.arange(T) < lengths[:, None], tokens, vocab_size)  # padding falls outside, and is dropped
    return jnp.zeros((B, vocab_size), bool).at[jnp.arange(B)[:, None], places].set(True, mode="drop")


def stop_table(batch: int, stop_ids: Sequence[int]) -> np.ndarray:
    """[B, n] int32, the same for all rows, with n rounded up so that the number of stops does not change the shape."""
    places = max(4, -(-len(stop_ids) // 4) * 4)
    row = list(stop_ids) + [NO_TOKEN] * (places - len(stop_ids))
    return np.tile(np.asarray(row, np.int32), (batch, 1))


@struct.dataclass
class Generated:
    """Completions: ``tokens[b, : lengths[b]]`` are row b's, a stop token included; NO_TOKEN fills the rest."""

    tokens: jax.Array  # [B, N] int32
    logprobs: jax.Array  # [B, N] float32
    lengths: jax.Array  # [B] int32


def generate(
    params: Params,
    tokens: jax.Array,
    *,
    max_new_tokens: int,
    lengths: jax.Array | None = None,
    sampling: Sampling | None = None,
    stop_ids: Sequence[int] | None = None,
    backend: str = "auto",
) -> Generated:
    """Continue every row of ``tokens`` [B, T] by up to ``max_new_tokens``. Pure: call it under jit, vmap or scan.

    ``lengths`` [B] says how many tokens of a row are real; ``sampling`` (see `make_sampling`) defaults to greedy and
    ``stop_ids`` to the config's end-of-sequence tokens (``()`` ignores them).
    """
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens: expected at least 1, found {max_new_tokens}")
    B, T = tokens.shape
    config = params.config
    lengths = jnp.full(B, T, jnp.int32) if lengths is None else lengths
    sampling = make_sampling(B) if sampling is None else sampling
    stops = jnp.asarray(stop_table(B, config.eos_ids if stop_ids is None else stop_ids))
    seen = tokens_seen(tokens, lengths, config.vocab_size) if sampling.repetition_penalty is not None else None

    cache = init_cache(config, B, T + max_new_tokens, params.dtype, stacked=params.stacked)
    logits = jnp.zeros((B, config.vocab_size), jnp.float32)
    logits, cache = prefill(params, tokens, lengths, logits, cache, backend=backend)
    limit = jnp.full(B, max_new_tokens, jnp.int32)
    state, first = begin(logits, cache, sampling, limit, stops, seen, backend=backend)
    state, rest = decode_chunk(params, state, steps=max_new_tokens - 1, backend=backend)
    drawn = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]).T, first, rest)
    return Generated(drawn.tokens, drawn.logprobs, state.drawn)


# The compiled pieces. What a caller hands over as cache, state or tokens seen is donated: it is gone after the call.
jit_prefill = functools.partial(jax.jit, static_argnames="backend", donate_argnames="cache")(prefill)
jit_begin = functools.partial(jax.jit, static_argnames="backend", donate_argnames=("cache", "seen"))(begin)
jit_decode_chunk = functools.partial(jax.jit, static_argnames=("steps", "backend"), donate_argnames="state")(
    decode_chunk
)

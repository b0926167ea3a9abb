"""Decoding as pure functions: `prefill`, then `decode_step` again and again over one donated `DecodeState`.

`generate` composes them for use inside other programs (jit, vmap, grad of what surrounds it); `jllama.stream` calls
the compiled pieces chunk by chunk for whoever wants text as it comes.
"""

from collections.abc import Sequence
from dataclasses import replace
from numbers import Integral

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.core import Tracer

from jllama.cache import KVCache, init_cache
from jllama.config import Backend, LlamaConfig
from jllama.errors import InputError
from jllama.kernels import known, recorded, vary_with
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
    backend: Backend = "auto",
) -> tuple[jax.Array, KVCache]:
    """Feed one piece [B, T] of every row's prompt; ``lengths`` [B] says how much of it is real, 0 for a row that has
    none left. Returns the logits [B, V] of each row's last token so far (``logits`` is carried from piece to piece)."""
    new, grown = forward(params, tokens, cache, lengths=lengths, last_only=True, backend=backend)
    return jnp.where(lengths[:, None] > 0, new, logits), grown


def sample_first(
    logits: jax.Array,
    cache: KVCache,
    sampling: Sampling,
    limit: jax.Array,
    stop_ids: jax.Array,
    seen: jax.Array | None,
    *,
    backend: Backend = "auto",
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


def decode_step(params: Params, state: DecodeState, *, backend: Backend = "auto") -> tuple[DecodeState, Drawn]:
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


def _draw(state: DecodeState, logits: jax.Array, backend: Backend) -> tuple[DecodeState, Drawn]:
    token, logprob = sample(logits, state.sampling, state.drawn, state.seen, backend=backend)
    emitted = Drawn(jnp.where(state.done, NO_TOKEN, token), jnp.where(state.done, 0.0, logprob))
    drawn = state.drawn + ~state.done
    stopped = jnp.any(token[:, None] == state.stop_ids, axis=-1) | (drawn >= state.limit)
    seen = state.seen
    if seen is not None:
        seen = seen.at[jnp.arange(token.shape[0]), token].set(True)
    return replace(state, token=token, done=state.done | stopped, drawn=drawn, seen=seen), emitted


def decode_chunk(
    params: Params, state: DecodeState, *, steps: int, backend: Backend = "auto"
) -> tuple[DecodeState, Drawn]:
    """``steps`` tokens for every row, as one `lax.scan`; the arrays of `Drawn` are [steps, B]."""

    def step(state: DecodeState, _: None) -> tuple[DecodeState, Drawn]:
        return decode_step(params, state, backend=backend)

    if jax.sharding.get_abstract_mesh().manual_axes:  # under shard_map a carry has the type that comes back
        state = jax.tree.map(vary_with, state, jax.eval_shape(step, state, None)[0])
    return lax.scan(step, state, length=steps)


def tokens_seen(tokens: jax.Array, lengths: jax.Array, vocab_size: int) -> jax.Array:
    """[B, V] bool: which tokens occur among the real ones of ``tokens`` [B, T]."""
    B, T = tokens.shape
    real = jnp.arange(T)[None] < lengths[:, None]
    places = jnp.where(real, tokens, vocab_size)  # padding falls outside, and is dropped
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
    tokens: jax.Array | np.ndarray,
    *,
    max_new_tokens: int,
    lengths: jax.Array | np.ndarray | None = None,
    sampling: Sampling | None = None,
    stop_ids: Sequence[int] | jax.Array | np.ndarray | None = None,
    backend: Backend = "auto",
) -> Generated:
    """Continue every row of ``tokens`` [B, T] by up to ``max_new_tokens``. Pure: call it under jit, vmap or scan.

    ``lengths`` [B] says how many tokens of a row are real, the rest being padding on the right; ``sampling`` (see
    `make_sampling`) defaults to greedy. ``stop_ids`` are the tokens that end a row: a sequence or an array [n] for all
    rows, or [B, n] for each; by default the config's end-of-sequence tokens (``()`` ignores them).

    It is compiled once for each shape of ``tokens``, ``max_new_tokens`` and ``backend``, also where the caller uses no
    jit. ``jax.jit(jllama.generate, static_argnames=("max_new_tokens", "backend"))`` takes ``stop_ids`` as an array;
    with ``"stop_ids"`` among the static names, as a tuple. Prompts are checked where their values are known, that is
    outside jit: each needs 1 to ``max_seq_len - max_new_tokens`` tokens of the vocabulary.
    """
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens: expected at least 1, found {max_new_tokens}")
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise InputError(f"tokens: expected integers [batch, length], found {tokens.dtype}{list(tokens.shape)}")
    B, T = tokens.shape
    lengths = np.full(B, T, np.int32) if lengths is None else lengths
    if lengths.shape != (B,):
        raise InputError(f"lengths: expected {B} (one a row), found an array {list(lengths.shape)}")
    _check_rows(tokens, lengths, max_new_tokens, params.config)
    sampling = make_sampling(B) if sampling is None else sampling
    stops = _stops(B, params.config.eos_ids if stop_ids is None else stop_ids)
    static = {"max_new_tokens": max_new_tokens, "backend": backend, "arch": known(params)}
    return _jit_generate(params, tokens, lengths, sampling, stops, **static)[0]


def _generate(
    params: Params,
    tokens: jax.Array,  # [B, T]
    lengths: jax.Array,  # [B]
    sampling: Sampling,
    stops: jax.Array,  # [B, n]
    *,
    max_new_tokens: int,
    backend: Backend,
) -> Generated:
    B, T = tokens.shape
    config = params.config
    seen = tokens_seen(tokens, lengths, config.vocab_size) if sampling.repetition_penalty is not None else None
    cache = init_cache(config, B, T + max_new_tokens, params.dtype, stacked=params.stacked)
    logits = jnp.zeros((B, config.vocab_size), jnp.float32)
    logits, cache = prefill(params, tokens, lengths, logits, cache, backend=backend)
    limit = jnp.full(B, max_new_tokens, jnp.int32)
    state, first = sample_first(logits, cache, sampling, limit, stops, seen, backend=backend)
    state, rest = decode_chunk(params, state, steps=max_new_tokens - 1, backend=backend)
    drawn = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]).T, first, rest)
    return Generated(drawn.tokens, drawn.logprobs, state.drawn)


def _stops(batch: int, stop_ids: Sequence[int] | jax.Array | np.ndarray) -> jax.Array:
    """[B, n] int32: the stop tokens of every row."""
    if isinstance(stop_ids, Sequence) and all(isinstance(i, Integral) for i in stop_ids):
        return jnp.asarray(stop_table(batch, stop_ids))
    ids = jnp.asarray(stop_ids, jnp.int32)  # jit makes traced integers of a tuple that is not static
    if ids.shape[:-1] not in ((), (batch,)) or ids.ndim == 0:
        raise InputError(f"stop_ids: expected [n] or [{batch}, n] (a row's own), found an array {list(ids.shape)}")
    return jnp.broadcast_to(ids, (batch, ids.shape[-1]))


def check_prompts(prompts: Sequence[Sequence[int] | np.ndarray], longest: int, why: str, config: LlamaConfig) -> None:
    """Raise `InputError` unless every prompt has 1 to ``longest`` tokens, all of the vocabulary. ``why`` says in the
    message where the number comes from."""
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= longest:
            raise InputError(f"prompt {i}: expected 1 to {longest} tokens ({why}), found {len(prompt)}")
        ids = np.asarray(prompt)
        strange = ids[(ids < 0) | (ids >= config.vocab_size)]
        if strange.size:
            expected = f"token ids from 0 to {config.vocab_size - 1}"
            raise InputError(f"prompt {i}: expected {expected}, found {strange[0]}")


def _check_rows(
    tokens: jax.Array | np.ndarray, lengths: jax.Array | np.ndarray, max_new_tokens: int, config: LlamaConfig
) -> None:
    """`check_prompts` on the rows of `generate`, as far as their values are known."""
    (B, T), longest = tokens.shape, config.max_seq_len - max_new_tokens
    if longest < 1:
        expected = f"1 to {config.max_seq_len - 1} (one less than the context)"
        raise InputError(f"max_new_tokens: expected {expected}, found {max_new_tokens}")
    if not _known(lengths):
        return
    counts = np.asarray(lengths)
    if (wrong := np.flatnonzero((counts < 0) | (counts > T))).size:
        raise InputError(f"lengths: row {wrong[0]}: expected 1 to {T}, found {counts[wrong[0]]}")
    rows = np.asarray(tokens) if _known(tokens) else np.zeros((B, T), np.int32)  # ids that pass
    why = f"the context of {config.max_seq_len} less max_new_tokens"
    check_prompts([row[:n] for row, n in zip(rows, counts, strict=True)], longest, why, config)


def _known(x: jax.Array | np.ndarray) -> bool:
    """Whether this process can look at the values: they are not traced, nor on another process's devices."""
    return not isinstance(x, Tracer) and getattr(x, "is_fully_addressable", True)


# The compiled pieces. What a caller hands over as cache, state or tokens seen is donated: it is gone after the call.
# Each takes ``arch``, the device to compile for, and also returns what its trace chose for every op: see `recorded`.
jit_prefill = jax.jit(recorded(prefill), static_argnames=("backend", "arch"), donate_argnames="cache")
jit_sample_first = jax.jit(
    recorded(sample_first), static_argnames=("backend", "arch"), donate_argnames=("cache", "seen")
)
_jit_generate = jax.jit(recorded(_generate), static_argnames=("max_new_tokens", "backend", "arch"))
jit_decode_chunk = jax.jit(
    recorded(decode_chunk), static_argnames=("steps", "backend", "arch"), donate_argnames="state"
)

"""Decoding as pure functions: one `prefill`, then repeated `decode_step` on one donated `DecodeState`.

`generate` composes them for use inside other programs (under jit or vmap, or with grad around it). `jllama.stream`
calls the compiled pieces chunk by chunk, for callers that want text while it is generated.
"""

import functools
from collections.abc import Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.core import Tracer
from jax.sharding import Mesh

from jllama.cache import KVCache, init_cache
from jllama.config import Backend, LlamaConfig
from jllama.errors import InputError
from jllama.kernels import known, recorded, vary_with
from jllama.mesh.layout import DATA, MODEL, AnyMesh, model_axis, spec
from jllama.mesh.run import meshed, on_shards, over, specs
from jllama.mesh.vocabulary import gather
from jllama.model import forward
from jllama.params import Params
from jllama.sampling import History, Sampling, begin_history, make_sampling, sample, top_logprobs

NO_TOKEN = -1  # the output of a finished row


@struct.dataclass
class DecodeState:
    """The state that a decode step reads and updates. It is donated, so that the cache is updated in place."""

    cache: KVCache
    token: jax.Array  # [B] int32: the last token of the row, which is not in the cache yet
    done: jax.Array  # [B] bool: whether the row is finished
    drawn: jax.Array  # [B] int32: number of tokens that the row has drawn
    limit: jax.Array  # [B] int32: number of tokens that the row may draw
    stop_ids: jax.Array  # [B, n] int32: tokens that end the row; unused entries are NO_TOKEN
    history: History  # the tokens so far; its fields are None where no setting needs them
    sampling: Sampling
    top: int = struct.field(pytree_node=False, default=0)  # report so many of the likeliest tokens at every step

    def specs(self, mesh: AnyMesh) -> "DecodeState":
        """The `PartitionSpec` of every array on a mesh."""
        fields = {name: specs(value, mesh) for name, value in vars(self).items() if name != "top"}
        return DecodeState(**fields, top=self.top)


@struct.dataclass
class StepOutput:
    """The output of one or several steps: tokens and their log-probabilities."""

    tokens: jax.Array  # [..., B] int32; NO_TOKEN for finished rows
    logprobs: jax.Array  # [..., B] float32; NaN if the logits of the model were NaN
    top: tuple[jax.Array, jax.Array] | None = None  # ids and log-probabilities of the likeliest, [..., B, top] each


def prefill(
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    logits: jax.Array,
    cache: KVCache,
    *,
    backend: Backend = "auto",
) -> tuple[jax.Array, KVCache]:
    """Run the model on one piece [B, T] of every row's prompt. ``lengths`` [B] is the number of real tokens in each
    row; it is 0 for a row whose prompt is already finished.

    Returns the cache and the logits [B, V] of each row's last token so far. ``logits`` are those of the piece before,
    which finished rows keep.
    """
    if params.mesh is not None:
        of_shard = functools.partial(prefill, backend=backend)
        vocabulary = spec(params.mesh, DATA, MODEL)
        out = vocabulary, specs(cache, params.mesh)
        return on_shards(of_shard, params, tokens, lengths, logits, cache, out=out, layout={2: vocabulary})
    new, cache = forward(params, tokens, cache, lengths=lengths, last_only=True, backend=backend)
    return jnp.where(lengths[:, None] > 0, new, logits), cache


def sample_first(
    logits: jax.Array,
    cache: KVCache,
    sampling: Sampling,
    limit: jax.Array,
    stop_ids: jax.Array,
    history: History,
    *,
    top: int = 0,
    mesh: Mesh | None = None,
    axis: str | None = None,
    backend: Backend = "auto",
) -> tuple[DecodeState, StepOutput]:
    """Draw the first token of every row from the logits of the prompt. ``top``: also report so many of the likeliest
    tokens, at this step and at those that follow. ``mesh`` and ``axis`` are those of the params (see `Params`)."""
    if mesh is not None:
        of_shard = functools.partial(sample_first, top=top, axis=model_axis(mesh), backend=backend)
        arguments = logits, cache, sampling, limit, stop_ids, history
        out = _state_specs(cache, top, mesh), spec(mesh, DATA)
        return over(mesh, of_shard, *arguments, out=out, layout={0: spec(mesh, DATA, MODEL)})
    B = logits.shape[0]
    state = DecodeState(
        cache=cache,
        token=jnp.zeros(B, jnp.int32),
        done=limit <= 0,
        drawn=jnp.zeros(B, jnp.int32),
        limit=limit,
        stop_ids=stop_ids,
        history=history,
        sampling=sampling,
        top=top,
    )
    return _draw(state, logits, axis, backend)


def decode_step(params: Params, state: DecodeState, *, backend: Backend = "auto") -> tuple[DecodeState, StepOutput]:
    """Draw one token for every row that is not done. Rows that are done also compute a key and a value, but these are
    written past the length of the row, where attention ignores them."""
    alive = (~state.done).astype(jnp.int32)
    logits, cache = forward(
        params,
        state.token[:, None],
        state.cache,
        lengths=alive,
        last_only=True,
        backend=backend,
    )
    return _draw(replace(state, cache=cache), logits, params.axis, backend)


def _draw(state: DecodeState, logits: jax.Array, axis: str | None, backend: Backend) -> tuple[DecodeState, StepOutput]:
    if axis is not None and state.top:
        logits, axis = gather(logits, axis), None
    token, logprob = sample(
        logits, state.sampling, state.drawn, state.history, stop_ids=state.stop_ids, axis=axis, backend=backend
    )
    likeliest = top_logprobs(logits, state.top) if state.top else None
    output = StepOutput(jnp.where(state.done, NO_TOKEN, token), jnp.where(state.done, 0.0, logprob), likeliest)
    drawn = state.drawn + ~state.done
    stopped = jnp.any(token[:, None] == state.stop_ids, axis=-1) | (drawn >= state.limit)
    history = state.history.add(token, ~state.done)
    return replace(state, token=token, done=state.done | stopped, drawn=drawn, history=history), output


def decode_chunk(
    params: Params, state: DecodeState, *, steps: int, backend: Backend = "auto"
) -> tuple[DecodeState, StepOutput]:
    """Run ``steps`` decode steps as one `lax.scan`. The arrays of the `StepOutput` are [steps, B]."""
    if params.mesh is not None:
        of_shard = functools.partial(decode_chunk, steps=steps, backend=backend)
        out = state.specs(params.mesh), spec(params.mesh, None, DATA)
        return on_shards(of_shard, params, state, out=out)

    def step(state: DecodeState, _: None) -> tuple[DecodeState, StepOutput]:
        return decode_step(params, state, backend=backend)

    if jax.sharding.get_abstract_mesh().manual_axes:  # under shard_map, a carry must have the type of the result
        state = jax.tree.map(vary_with, state, jax.eval_shape(step, state, None)[0])
    return lax.scan(step, state, length=steps)


def _state_specs(cache: KVCache, top: int, mesh: AnyMesh) -> Any:
    """The `PartitionSpec` of every array of a `DecodeState` with such a cache, as a prefix of the state."""
    rows: Any = spec(mesh, DATA)
    token = done = drawn = limit = stop_ids = history = sampling = rows
    return DecodeState(cache.specs(mesh), token, done, drawn, limit, stop_ids, history, sampling, top)


def stop_table(batch: int, stop_ids: Sequence[int]) -> np.ndarray:
    """[B, n] int32: the same stop tokens for every row. n is rounded up to a multiple of 4, so that few shapes are
    compiled."""
    width = max(4, -(-len(stop_ids) // 4) * 4)
    row = list(stop_ids) + [NO_TOKEN] * (width - len(stop_ids))
    return np.tile(np.asarray(row, np.int32), (batch, 1))


@struct.dataclass
class Generated:
    """Completions. ``tokens[b, : lengths[b]]`` are those of row b, including a stop token. The rest is NO_TOKEN."""

    tokens: jax.Array  # [B, N] int32
    logprobs: jax.Array  # [B, N] float32
    lengths: jax.Array  # [B] int32
    top: tuple[jax.Array, jax.Array] | None = None  # ids and log-probabilities of the likeliest tokens, [B, N, top]


def generate(
    params: Params,
    tokens: jax.Array | np.ndarray,
    *,
    max_new_tokens: int,
    lengths: jax.Array | np.ndarray | None = None,
    sampling: Sampling | None = None,
    stop_ids: Sequence[int] | jax.Array | np.ndarray | None = None,
    top_logprobs: int = 0,
    backend: Backend = "auto",
) -> Generated:
    """Continue every row of ``tokens`` [B, T] by up to ``max_new_tokens`` tokens. The function is pure: it can be
    called under jit, vmap or scan.

    ``lengths`` [B] is the number of real tokens in each row (default: T); the rest is right padding. ``sampling`` (see
    `make_sampling`) defaults to greedy. ``stop_ids`` are the tokens that end a row: a sequence or an array [n] for all
    rows, or an array [B, n] with a set for each row. The default is the config's end-of-sequence tokens. ``()`` means
    that nothing ends a row. ``top_logprobs``: how many of the likeliest tokens of every step to report in
    `Generated.top`.

    The function is compiled once for each shape of ``tokens``, ``max_new_tokens`` and ``backend``, even if the caller
    uses no jit. ``jax.jit(jllama.generate, static_argnames=("max_new_tokens", "backend"))`` takes ``stop_ids`` as an
    array. With ``"stop_ids"`` in ``static_argnames`` it takes them as a tuple.

    Outside jit the prompts are checked: each must have 1 to ``max_seq_len - max_new_tokens`` tokens, all of them in the
    vocabulary.
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
    if not 0 <= top_logprobs <= params.config.vocab_size:
        raise InputError(f"top_logprobs: expected 0 to {params.config.vocab_size}, found {top_logprobs}")
    static = {"max_new_tokens": max_new_tokens, "top": top_logprobs, "backend": backend, "arch": known(params)}
    return _jit_generate(params, tokens, lengths, sampling, stops, **static)[0]


def _generate(
    params: Params,
    tokens: jax.Array,  # [B, T]
    lengths: jax.Array,  # [B]
    sampling: Sampling,
    stops: jax.Array,  # [B, n]
    *,
    max_new_tokens: int,
    top: int,
    backend: Backend,
) -> Generated:
    params = meshed(params, tokens)
    if params.mesh is not None:
        of_shard = functools.partial(_generate, max_new_tokens=max_new_tokens, top=top, backend=backend)
        return on_shards(of_shard, params, tokens, lengths, sampling, stops, out=spec(params.mesh, DATA))
    B, T = tokens.shape
    config = params.config
    history = begin_history(sampling, tokens, lengths, config.vocab_size)
    cache = init_cache(config, B, T + max_new_tokens, params.dtype, stacked=params.stacked)
    logits = jnp.zeros((B, params.embed.shape[0]), jnp.float32)
    logits, cache = prefill(params, tokens, lengths, logits, cache, backend=backend)
    limit = jnp.full(B, max_new_tokens, jnp.int32)
    state, first = sample_first(
        logits, cache, sampling, limit, stops, history, top=top, axis=params.axis, backend=backend
    )
    outputs = jax.tree.map(lambda a: a[None], first)  # [1, B]
    if max_new_tokens > 1:  # a scan of no steps would be compiled, too
        state, rest = decode_chunk(params, state, steps=max_new_tokens - 1, backend=backend)
        outputs = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), outputs, rest)
    outputs = jax.tree.map(lambda a: a.swapaxes(0, 1), outputs)  # [B, N]
    return Generated(outputs.tokens, outputs.logprobs, state.drawn, outputs.top)


def _stops(batch: int, stop_ids: Sequence[int] | jax.Array | np.ndarray) -> jax.Array:
    """[B, n] int32: the stop tokens of every row."""
    if isinstance(stop_ids, Sequence) and all(isinstance(i, Integral) for i in stop_ids):
        return jnp.asarray(stop_table(batch, stop_ids))
    ids = jnp.asarray(stop_ids, jnp.int32)  # jit makes traced integers of a tuple that is not static
    if ids.shape[:-1] not in ((), (batch,)) or ids.ndim == 0:
        raise InputError(f"stop_ids: expected [n] or [{batch}, n] (a row's own), found an array {list(ids.shape)}")
    return jnp.broadcast_to(ids, (batch, ids.shape[-1]))


def check_prompts(prompts: Sequence[Sequence[int] | np.ndarray], longest: int, why: str, config: LlamaConfig) -> None:
    """Raise `InputError` unless every prompt has 1 to ``longest`` tokens, all of them in the vocabulary. ``why`` is the
    reason for ``longest`` in the message."""
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= longest:
            raise InputError(f"prompt {i}: expected 1 to {longest} tokens ({why}), found {len(prompt)}")
        ids = np.asarray(prompt)
        invalid = ids[(ids < 0) | (ids >= config.vocab_size)]
        if invalid.size:
            expected = f"token ids from 0 to {config.vocab_size - 1}"
            raise InputError(f"prompt {i}: expected {expected}, found {invalid[0]}")


def _check_rows(
    tokens: jax.Array | np.ndarray, lengths: jax.Array | np.ndarray, max_new_tokens: int, config: LlamaConfig
) -> None:
    """Run `check_prompts` on the rows of `generate`. Values that are traced are not checked."""
    (B, T), longest = tokens.shape, config.max_seq_len - max_new_tokens
    if longest < 1:
        expected = f"1 to {config.max_seq_len - 1} (one less than the context)"
        raise InputError(f"max_new_tokens: expected {expected}, found {max_new_tokens}")
    if not _known(lengths):
        return
    counts = np.asarray(lengths)
    if (wrong := np.flatnonzero((counts < 0) | (counts > T))).size:
        raise InputError(f"lengths: row {wrong[0]}: expected 1 to {T}, found {counts[wrong[0]]}")
    rows = np.asarray(tokens) if _known(tokens) else np.zeros((B, T), np.int32)  # valid ids
    why = f"the context of {config.max_seq_len} less max_new_tokens"
    check_prompts([row[:n] for row, n in zip(rows, counts, strict=True)], longest, why, config)


def _known(x: jax.Array | np.ndarray) -> bool:
    """Whether this process can read the values: they are not traced, and not on devices of another process."""
    return not isinstance(x, Tracer) and getattr(x, "is_fully_addressable", True)


# The compiled functions. The arguments cache, state and history are donated: the caller cannot use them afterwards.
# Each function also takes ``arch``, the device to compile for, and also returns the choices of its trace for every op
# (see `recorded`).
jit_prefill = jax.jit(recorded(prefill), static_argnames=("backend", "arch"), donate_argnames="cache")
jit_sample_first = jax.jit(
    recorded(sample_first),
    static_argnames=("top", "mesh", "axis", "backend", "arch"),
    donate_argnames=("cache", "history"),
)
_jit_generate = jax.jit(recorded(_generate), static_argnames=("max_new_tokens", "top", "backend", "arch"))
jit_decode_chunk = jax.jit(
    recorded(decode_chunk), static_argnames=("steps", "backend", "arch"), donate_argnames="state"
)

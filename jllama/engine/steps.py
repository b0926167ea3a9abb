"""The compiled steps of an engine: pure functions of params and state. A step is compiled once for each of a few
numbers of rows or pieces, `decode` and `first` for each kind of drawing.

The table of pages is an argument of every call, because the scheduler on the host decides it. It has some kilobytes.
"""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jllama.config import Backend
from jllama.decode import NO_TOKEN, StepOutput
from jllama.engine.request import MAX_TOP_LOGPROBS, Request
from jllama.engine.state import EngineState, Extras, Rows, extra_settings
from jllama.kernels import log_probability, recorded, vary_with
from jllama.mesh import vocabulary
from jllama.mesh.layout import DATA, MODEL, AnyMesh, model_axis, spec
from jllama.mesh.run import on_shards, over
from jllama.model import forward
from jllama.paged import PagedCache
from jllama.params import Params
from jllama.sampling import History, Sampling, keys_of, sample, top_logprobs
from jllama.step import last_token

# How tokens are drawn, each with more than the one before: the largest logit; temperature; top-k, top-p and min-p;
# all settings.
KINDS = ("greedy", "plain", "cut", "full")


Scores = tuple[jax.Array, jax.Array, jax.Array]


def feed(
    params: Params,
    state: EngineState,
    tokens: jax.Array,  # [B, T]: pieces of prompts; several may be of the same prompt
    start: jax.Array,  # [B]: the position of each piece's first token
    table: jax.Array,  # [B, P]: the pages of each piece's sequence
    count: jax.Array,  # [B]: how many of its tokens are real
    *,
    backend: Backend = "auto",
) -> tuple[EngineState, jax.Array]:
    """Write the keys and values of prompts to the cache. The padding of a piece is written past its sequence's end,
    where it is overwritten before it is read. Also returns the logits [B, V] of the token after each piece."""
    if params.mesh is not None:
        of_shard, arguments = functools.partial(feed, backend=backend), (state, tokens, start, table, count)
        return on_shards(of_shard, params, *arguments, out=(state.specs(params.mesh), logits_spec(params.mesh)))
    cache = PagedCache(state.k, state.v, table, start, aligned=True)
    with jax.named_scope("jllama.feed"):
        logits, cache = forward(params, tokens, cache, lengths=count, last_only=True, backend=backend)
    return replace(state, k=cache.k, v=cache.v), logits


def score(
    params: Params,
    state: EngineState,
    tokens: jax.Array,  # [B, T]
    start: jax.Array,  # [B]
    table: jax.Array,  # [B, P]
    count: jax.Array,  # [B]
    targets: jax.Array,  # [B, T]: the token that follows each
    *,
    backend: Backend = "auto",
) -> tuple[EngineState, jax.Array, Scores]:
    """`feed`. Also returns, each as [B, T], the log-probability of every target, the likeliest token, and its
    log-probability."""
    if params.mesh is not None:
        of_shard, arguments = functools.partial(score, backend=backend), (state, tokens, start, table, count, targets)
        out = state.specs(params.mesh), logits_spec(params.mesh), spec(params.mesh, DATA)
        return on_shards(of_shard, params, *arguments, out=out)
    logits, cache = forward(params, tokens, PagedCache(state.k, state.v, table, start, aligned=True), backend=backend)
    flat, wanted = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    if params.axis is None:
        best = jnp.argmax(flat, axis=-1).astype(jnp.int32)
        found = log_probability(flat, wanted), best, log_probability(flat, best)
    else:
        found = vocabulary.log_probability(flat, wanted, params.axis), *vocabulary.greedy(flat, params.axis)
    found = jax.tree.map(lambda a: a.reshape(targets.shape), found)
    return replace(state, k=cache.k, v=cache.v), last_token(logits, count), found


def first(
    state: EngineState,
    logits: jax.Array,  # [B, V] float32: what `feed` gives
    slots: jax.Array,  # [B]: the slot of the prompt that ends with each piece; past the last slot, it does not end
    *,
    kind: str,  # one of KINDS
    mesh: Mesh | None = None,  # that of the params
    axis: str | None = None,
    backend: Backend = "auto",
) -> tuple[EngineState, StepOutput]:
    """Draw the first token of every row whose prompt has been fed whole. The rows have joined. The arrays of the
    `StepOutput` are [1, B]."""
    if mesh is not None:
        of_shard = functools.partial(first, kind=kind, axis=model_axis(mesh), backend=backend)
        out, layout = (state.specs(mesh), spec(mesh, None, DATA)), {1: logits_spec(mesh)}
        return over(mesh, of_shard, state, logits, slots, out=out, layout=layout)
    rows = state.rows.take(slots)
    sampling, history = drawing(state, slots, rows, kind)
    rows = replace(rows, length=rows.length + ~rows.done)  # a row joins as if its last token were not fed yet
    rows, history, output = drawn(logits, rows, sampling, history, kind=kind, axis=axis, backend=backend)
    if kind == "full":
        state = put_history(state, slots, history)
    return replace(state, rows=state.rows.put(slots, rows)), jax.tree.map(lambda a: a[None], output)


def join(state: EngineState, slots: jax.Array, rows: Rows, *, mesh: Mesh | None = None) -> EngineState:
    """Put rows that begin to draw into their slots. Slots past the last are dropped.

    The rows' settings in `Extras` are turned off until `join_extras`. Otherwise a step of the kind "full", which a
    neighbour may need, would read those of the slot's last row."""
    if mesh is not None:
        return over(mesh, join, state, slots, rows, out=state.specs(mesh))
    extras = state.extras
    if extras is not None:
        off = extra_settings(Request(()))
        settings = jax.tree.map(lambda a, b: a.at[slots].set(b, mode="drop"), extras.settings, off)
        extras = replace(extras, settings=settings)
    return replace(state, rows=state.rows.put(slots, rows), extras=extras)


def join_extras(
    state: EngineState,
    slot: jax.Array,  # [parts]: the row's slot in its part; one past the last slot in the others
    settings: Sampling,
    tokens: jax.Array,  # [max_len] int32: prompt and text, with any padding
    prompt: jax.Array,  # how many are of the prompt
    length: jax.Array,  # how many are real
    *,
    mesh: Mesh | None = None,
) -> EngineState:
    """Put the `Extras` of one row into the state."""
    if mesh is not None:
        whole = jax.tree.map(lambda _: PartitionSpec(), (settings, tokens))
        arguments, layout = (state, slot, settings, tokens, prompt, length), {2: whole[0], 3: whole[1]}
        return over(mesh, join_extras, *arguments, out=state.specs(mesh), layout=layout)
    assert state.extras is not None
    old = state.extras
    assert old.history.counts is not None
    assert old.history.recent is not None
    vocab = old.history.counts.shape[1]
    place = jnp.arange(tokens.shape[0])
    seen = jnp.zeros(vocab, bool).at[jnp.where(place < length, tokens, vocab)].set(True, mode="drop")
    drawn = (place >= prompt) & (place < length)
    counts = jnp.zeros(vocab, jnp.int32).at[jnp.where(drawn, tokens, vocab)].add(1, mode="drop")
    back = length - jnp.arange(old.history.recent.shape[1], 0, -1)
    recent = jnp.where(back >= 0, tokens[jnp.maximum(back, 0)], NO_TOKEN)
    new = Extras(settings, History(seen, counts, recent))
    return replace(state, extras=jax.tree.map(lambda a, b: a.at[slot[0]].set(b, mode="drop"), old, new))


def copy(state: EngineState, source: jax.Array, target: jax.Array, *, mesh: Mesh | None = None) -> EngineState:
    """Copy pages ``source`` [n] to pages ``target`` [n]. Targets past the last are dropped."""
    if mesh is not None:
        return over(mesh, copy, state, source, target, out=state.specs(mesh))

    def copied(pages: jax.Array) -> jax.Array:
        return pages.at[:, target].set(pages.at[:, source].get(mode="clip"), mode="drop")

    return replace(state, k=copied(state.k), v=copied(state.v))


def decode(
    params: Params,
    state: EngineState,
    slots: jax.Array,  # [R]: the slots to run; an index past the last is padding
    table: jax.Array,  # [R, P]: the pages of each row
    *,
    steps: int,
    kind: str,  # one of KINDS
    backend: Backend = "auto",
) -> tuple[EngineState, StepOutput]:
    """Draw ``steps`` tokens for every row that is not done. The arrays of the `StepOutput` are [steps, R]. The number
    of steps is fixed: a GPU would wait for the host at every turn of a loop that ends on a condition."""
    if params.mesh is not None:
        of_shard = functools.partial(decode, steps=steps, kind=kind, backend=backend)
        out = state.specs(params.mesh), spec(params.mesh, None, DATA)
        return on_shards(of_shard, params, state, slots, table, out=out)
    rows = state.rows.take(slots)
    sampling, history = drawing(state, slots, rows, kind)

    def step(carry: tuple, _: None) -> tuple[tuple, StepOutput]:
        (k, v), rows, history = carry
        cache = PagedCache(k, v, table, rows.length)
        alive = ~rows.done
        with jax.named_scope("jllama.decode"):
            logits, cache = forward(
                params, rows.token[:, None], cache, lengths=alive.astype(jnp.int32), last_only=True, backend=backend
            )
        rows, how = replace(rows, length=cache.lengths), functools.partial(drawn, kind=kind, backend=backend)
        rows, history, output = how(logits, rows, sampling, history, axis=params.axis)
        return ((cache.k, cache.v), rows, history), output

    begin = (state.k, state.v), rows, history
    begin = vary_with(begin, rows.token)  # under shard_map, a carry must have the type of the result
    ((k, v), rows, history), outputs = lax.scan(step, begin, length=steps)
    if kind == "full":
        state = put_history(state, slots, history)
    return replace(state, k=k, v=v, rows=state.rows.put(slots, rows)), outputs


def drawn(
    logits: jax.Array,  # [R, V] float32, of this shard's part of the vocabulary
    rows: Rows,
    sampling: Sampling,
    history: History,
    *,
    kind: str,
    axis: str | None,
    backend: Backend,
) -> tuple[Rows, History, StepOutput]:
    """Draw a token for every row that is not done. The arrays of the `StepOutput` are [R]."""
    alive = ~rows.done
    with jax.named_scope("jllama.draw"):
        if axis is not None and kind == "full":
            logits, axis = vocabulary.gather(logits, axis), None
        how: dict[str, Any] = dict(stop_ids=rows.stop_ids, axis=axis, backend=backend)
        token, logprob = sample(logits, sampling, rows.drawn, history, **how)
    likeliest = top_logprobs(logits, MAX_TOP_LOGPROBS) if kind == "full" else None
    output = StepOutput(jnp.where(alive, token, NO_TOKEN), jnp.where(alive, logprob, 0.0), likeliest)
    return advance(rows, token), history.add(token, alive), output


def logits_spec(mesh: AnyMesh) -> PartitionSpec:
    """How the logits of rows or pieces are divided."""
    return spec(mesh, DATA, MODEL)


def put_history(state: EngineState, slots: jax.Array, history: History) -> EngineState:
    """The state with ``history`` at the indices ``slots``. Slots past the last are dropped."""
    assert state.extras is not None
    merged = jax.tree.map(lambda a, b: a.at[slots].set(b, mode="drop"), state.extras.history, history)
    return replace(state, extras=replace(state.extras, history=merged))


def advance(rows: Rows, token: jax.Array) -> Rows:
    """The rows after a draw: each row that is not done gets its ``token`` [R]."""
    drawn = rows.drawn + ~rows.done
    ended = jnp.any(token[:, None] == rows.stop_ids, axis=-1) | (drawn >= rows.limit)
    return replace(rows, token=jnp.where(rows.done, rows.token, token), drawn=drawn, done=rows.done | ended)


def drawing(state: EngineState, slots: jax.Array, rows: Rows, kind: str) -> tuple[Sampling, History]:
    """The sampling settings and the history of the rows at the indices ``slots``, as far as the kind needs them."""
    keys = keys_of(rows.seed)
    if kind != "full":
        return sampling_of(rows, keys, None, kind), History()
    assert state.extras is not None
    extras: Extras = jax.tree.map(lambda a: a.at[slots].get(mode="clip"), state.extras)
    return sampling_of(rows, keys, extras, kind), extras.history


def sampling_of(rows: Rows, keys: jax.Array, extras: Extras | None, kind: str) -> Sampling:
    """What `sample` takes for rows of a kind."""
    if kind == "greedy":
        return Sampling(keys)
    if kind == "plain":
        return Sampling(keys, rows.temperature)
    if extras is None:
        return Sampling(keys, rows.temperature, rows.top_k, rows.top_p, rows.min_p)
    cuts = dict(temperature=rows.temperature, top_k=rows.top_k, top_p=rows.top_p, min_p=rows.min_p)
    return replace(extras.settings, key=keys, **cuts)


def _jit(function, *static: str, **how: Any):
    return jax.jit(function, static_argnames=static, donate_argnames="state", **how)


# XLA makes one graph of a program's kernels, and updates it before a launch where an array has moved. An idle device
# waits for that: the second prompt of a length took 5 to 12 ms more. A prompt's kernels are long enough to be launched
# one by one while others run, and their median is the same.
_ONE_BY_ONE = {"xla_gpu_graph_min_graph_size": 1 << 20}


# Those that run the model also take ``arch``, the device to compile for, and return the choices of their trace for
# every op (see `recorded`). A profile shows them under their names: ``jit_feed``, ``jit_decode`` and so on.
jit_feed, jit_score = (
    _jit(recorded(function), "backend", "arch", compiler_options=_ONE_BY_ONE) for function in (feed, score)
)
jit_first = _jit(recorded(first), "kind", "mesh", "axis", "backend", "arch")
jit_decode = _jit(recorded(decode), "steps", "kind", "backend", "arch")
jit_join, jit_join_extras, jit_copy = (_jit(function, "mesh") for function in (join, join_extras, copy))

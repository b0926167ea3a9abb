"""Many completions as one pure function: more prompts than rows, and rows are refilled inside the loop.

All prompts are fed first, each once; the samples of a prompt share its full pages and copy the last one. Then one
`lax.while_loop` draws: a row whose text has ended takes the next request at the next step.
"""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jllama.config import Backend
from jllama.decode import NO_TOKEN, Generated, stop_table
from jllama.errors import InputError
from jllama.kernels import PAGE, vary_with
from jllama.mesh.layout import DATA, axis_size, spec
from jllama.mesh.run import in_any_group, meshed, on_shards
from jllama.model import forward
from jllama.paged import PagedCache, init_pages, pages_for
from jllama.params import Params
from jllama.sampling import History, Sampling, begin_history, make_sampling, sample

FED_AT_ONCE = 2048  # tokens of prompts, so that activations stay bounded


@struct.dataclass
class _State:
    """The carry of the loop: one row for each slot, and the results of all requests."""

    k: jax.Array  # [layers, pages, kv_heads, PAGE, head_dim]
    v: jax.Array
    next: jax.Array  # the first request that has not started
    request: jax.Array  # [slots]: which request a row runs; an index past the last: none
    token: jax.Array  # [slots]: the last one, not in the cache yet
    length: jax.Array  # [slots]
    drawn: jax.Array  # [slots] int32: number of tokens that the row has drawn
    done: jax.Array  # [slots]
    history: History  # of the rows
    tokens: jax.Array  # [requests, N]
    logprobs: jax.Array  # [requests, N]
    lengths: jax.Array  # [requests]


def rollout(
    params: Params,
    prompts: jax.Array,  # [B, T]
    lengths: jax.Array | None = None,  # [B]: how many tokens of a prompt are real; default: all
    sampling: Sampling | None = None,
    *,
    slots: int,
    max_new_tokens: int,
    n: int = 1,
    stop_ids: Sequence[int] | None = None,
    backend: Backend = "auto",
) -> Generated:
    """``n`` completions of every prompt, drawn by ``slots`` rows at a time (default sampling: greedy).

    Every row is what `jllama.generate` gives. The rows of the result, and of ``sampling``, are [B * n], prompt by
    prompt. The function is pure: use it under jit, in a training step. It compiles one loop, whatever the number of
    prompts.

    Memory: keys and values of all B prompts, and of ``slots`` texts. A row whose text ends early takes the next
    request, so ``max_new_tokens`` may be generous."""
    if max_new_tokens < 1 or slots < 1 or n < 1:
        raise InputError(f"rollout: expected max_new_tokens, slots and n of 1 at least: {max_new_tokens}, {slots}, {n}")
    B, requests = prompts.shape[0], prompts.shape[0] * n
    slots, config = min(slots, requests), params.config
    lengths = jnp.full(B, prompts.shape[1]) if lengths is None else lengths
    sampling = make_sampling(requests) if sampling is None else sampling
    if sampling.key.shape != (requests,):
        raise InputError(
            f"sampling: expected {requests} rows ({B} prompts, {n} of each), found {sampling.key.shape[0]}"
        )
    params = meshed(params, prompts)
    if params.mesh is not None:
        parts = axis_size(params.mesh, DATA)
        how = dict(slots=-(-slots // parts), max_new_tokens=max_new_tokens, n=n, stop_ids=stop_ids, backend=backend)
        of_shard = functools.partial(rollout, **how)
        return on_shards(of_shard, params, prompts, lengths, sampling, out=spec(params.mesh, DATA))
    stops = jnp.asarray(stop_table(1, config.eos_ids if stop_ids is None else stop_ids)[0])
    layout = _Layout(prompts, lengths, n, slots, max_new_tokens)

    def more(state: _State) -> jax.Array:
        return in_any_group((state.next < requests) | ~state.done.all(), params.axis)

    def step(carry: tuple[_State, jax.Array]) -> tuple[_State, jax.Array]:
        state, _ = carry
        state = _refill(state, layout, requests, sampling, config.vocab_size)
        alive = ~state.done
        cache = PagedCache(state.k, state.v, layout.table(state.request), state.length)
        logits, cache = forward(
            params, state.token[:, None], cache, lengths=alive.astype(jnp.int32), last_only=True, backend=backend
        )
        own = jax.tree.map(lambda a: a.at[state.request].get(mode="clip"), sampling)
        stop_rows = jnp.broadcast_to(stops, (slots, stops.shape[0]))
        how: dict[str, Any] = dict(stop_ids=stop_rows, axis=params.axis, backend=backend)
        token, logprob = sample(logits, own, state.drawn, state.history, **how)
        where = jnp.where(alive, state.request, requests), state.drawn
        drawn = state.drawn + alive
        state = replace(
            state,
            k=cache.k,
            v=cache.v,
            length=cache.lengths,
            token=token,
            drawn=drawn,
            done=state.done | jnp.any(token[:, None] == stops, axis=-1) | (drawn >= max_new_tokens),
            history=state.history.add(token, alive),
            tokens=state.tokens.at[where].set(token, mode="drop"),
            logprobs=state.logprobs.at[where].set(logprob, mode="drop"),
            lengths=state.lengths.at[where[0]].set(drawn, mode="drop"),
        )
        return state, more(state)

    k, v = _feed(params, layout, backend)
    shape = (requests, max_new_tokens)
    zeros = jnp.zeros(slots, jnp.int32)
    state = _State(
        k=k,
        v=v,
        next=jnp.int32(0),
        request=jnp.full(slots, requests, jnp.int32),
        token=zeros,
        length=zeros,
        drawn=zeros,
        done=jnp.ones(slots, bool),
        history=begin_history(sampling, jnp.zeros((slots, 1), jnp.int32), zeros, config.vocab_size),
        tokens=jnp.full(shape, NO_TOKEN, jnp.int32),
        logprobs=jnp.zeros(shape, jnp.float32),
        lengths=jnp.zeros(requests, jnp.int32),
    )
    state = vary_with(state, lengths)  # under shard_map: the type of the result
    state, _ = lax.while_loop(lambda carry: carry[1], step, (state, more(state)))
    return Generated(state.tokens, state.logprobs, state.lengths)


class _Layout:
    """Which pages belong to which prompt and slot: first those of all prompts, then those of all slots."""

    def __init__(self, prompts: jax.Array, lengths: jax.Array, n: int, slots: int, max_new_tokens: int) -> None:
        self.prompts, self.lengths = jnp.asarray(prompts), jnp.asarray(lengths, jnp.int32)
        self.n, self.slots = n, slots
        self.of_prompt = pages_for(prompts.shape[1])
        self.of_slot = pages_for(PAGE - 1 + max_new_tokens)  # drawn tokens, and the prompt's tokens in its last page
        self.pages = prompts.shape[0] * self.of_prompt + slots * self.of_slot

    def full(self, prompt: jax.Array) -> jax.Array:
        """How many pages of a prompt are shared: a step feeds its last token, and writes into what follows them."""
        return (self.lengths[prompt] - 1) // PAGE

    def own(self, slot: jax.Array) -> jax.Array:
        """A slot's first page."""
        return self.prompts.shape[0] * self.of_prompt + slot * self.of_slot

    def table(self, request: jax.Array) -> jax.Array:
        """[slots, P]: the shared pages of each row's prompt, then the row's own pages. A row that runs no request has
        no pages, and so writes nothing."""
        place = jnp.arange(self.of_prompt + self.of_slot)
        prompt = jnp.minimum(request // self.n, self.prompts.shape[0] - 1)[:, None]
        full = self.full(prompt)
        own = self.own(jnp.arange(self.slots))[:, None] + place - full
        table = jnp.where(place < full, prompt * self.of_prompt + place, own)
        running = (request < self.prompts.shape[0] * self.n)[:, None]
        return jnp.where(running & (place < full + self.of_slot), table, self.pages)


def _feed(params: Params, layout: _Layout, backend: Backend) -> tuple[jax.Array, jax.Array]:
    """The pool with every prompt in its pages."""
    B, T = layout.prompts.shape
    at_once = max(1, min(B, FED_AT_ONCE // T))
    groups = -(-B // at_once)
    fill = groups * at_once - B
    tokens = jnp.pad(layout.prompts, ((0, fill), (0, 0))).reshape(groups, at_once, T)
    pages = jnp.arange(B * layout.of_prompt, dtype=jnp.int32).reshape(B, layout.of_prompt)
    table = jnp.pad(pages, ((0, fill), (0, 0)), constant_values=layout.pages).reshape(groups, at_once, -1)

    def feed(pool: tuple[jax.Array, jax.Array], group: tuple[jax.Array, jax.Array]) -> tuple:
        cache = PagedCache(*pool, group[1], jnp.zeros(at_once, jnp.int32), aligned=True)
        _, cache = forward(params, group[0], cache, last_only=True, backend=backend)
        return (cache.k, cache.v), None

    pool = init_pages(params.config, layout.pages, params.dtype)
    pool = vary_with(pool, *jax.tree.leaves(params.layers), tokens)  # under shard_map: the type of the result
    pool, _ = lax.scan(feed, pool, (tokens, table))
    return pool


def _refill(state: _State, layout: _Layout, requests: int, sampling: Sampling, vocab_size: int) -> _State:
    """The next requests in the rows that are done."""
    candidate = state.next + jnp.cumsum(state.done) - 1
    taken = state.done & (candidate < requests)
    request = jnp.where(taken, candidate, jnp.where(state.done, requests, state.request))
    prompt = jnp.minimum(request // layout.n, layout.prompts.shape[0] - 1)
    last = layout.lengths[prompt] - 1
    slots = jnp.argsort(~taken)  # stable: slots that take a request come first

    # A loop over the new rows, of which there are mostly none: `lax.cond` would copy the pool.
    def begin(i: jax.Array, carry: tuple) -> tuple:
        k, v, history = carry
        slot = slots[i]
        source = prompt[slot] * layout.of_prompt + jnp.minimum(layout.full(prompt[slot]), layout.of_prompt - 1)
        own = layout.own(slot)
        k, v = (a.at[:, own].set(a[:, source]) for a in (k, v))
        of_prompt = layout.prompts[prompt[slot]][None], layout.lengths[prompt[slot]][None]
        new = begin_history(sampling, *of_prompt, vocab_size)
        return k, v, jax.tree.map(lambda a, b: a.at[slot].set(b[0]), history, new)

    count = taken.sum()
    k, v, history = lax.fori_loop(0, count, begin, (state.k, state.v, state.history))
    return replace(
        state,
        k=k,
        v=v,
        history=history,
        next=state.next + count,
        request=request,
        token=jnp.where(taken, layout.prompts[prompt, last], state.token),
        length=jnp.where(taken, last, state.length),
        drawn=jnp.where(taken, 0, state.drawn),
        done=state.done & ~taken,
    )

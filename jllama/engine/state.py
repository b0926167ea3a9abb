"""The state of all requests on the device: one pytree of few leaves, donated to every step."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh

from jllama.config import LlamaConfig
from jllama.engine.request import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_BIAS, MAX_STOP_IDS, Request
from jllama.mesh.layout import DATA, AnyMesh, named, spec
from jllama.paged import init_pages, pages_spec
from jllama.sampling import NO_ID, NOTHING, History, Sampling, bias_table, seed_words, word_table


@struct.dataclass
class Rows:
    """The text of each slot and its settings. Every field's first axis is the slots."""

    token: jax.Array  # [S] int32: the last one, not in the cache yet
    length: jax.Array  # [S] int32: positions in the cache
    drawn: jax.Array  # [S] int32: number of tokens that the row has drawn
    limit: jax.Array  # [S] int32: how many it may draw
    done: jax.Array  # [S] bool
    stop_ids: jax.Array  # [S, MAX_STOP_IDS] int32; NO_ID is none
    seed: jax.Array  # [S, 2] uint32: the words of the row's seed: see `jllama.sampling.seed_words`
    temperature: jax.Array  # [S] float32
    top_k: jax.Array  # [S] int32
    top_p: jax.Array  # [S] float32
    min_p: jax.Array  # [S] float32

    def take(self, slots: jax.Array) -> "Rows":
        """The rows at the indices ``slots``. An index past the last gives a row that is done, and reads no keys."""
        rows = jax.tree.map(lambda a: a.at[slots].get(mode="clip"), self)
        none = slots >= self.done.shape[0]
        return replace(rows, done=rows.done | none, length=jnp.where(none, 0, rows.length))

    def put(self, slots: jax.Array, rows: "Rows") -> "Rows":
        """A copy with ``rows`` at the indices ``slots``. Indices past the last are dropped."""
        return jax.tree.map(lambda a, new: a.at[slots].set(new, mode="drop"), self, rows)


@struct.dataclass
class Extras:
    """Settings that few requests use. They are allocated at the first of these."""

    settings: Sampling  # without key, temperature, top-k, top-p and min-p, which are in `Rows`
    history: History


@struct.dataclass
class EngineState:
    """Everything that steps change."""

    k: jax.Array  # [layers, pages, kv_heads, PAGE, head_dim]
    v: jax.Array
    rows: Rows
    extras: Extras | None

    def specs(self, mesh: AnyMesh) -> "EngineState":
        """The `PartitionSpec` of every array on a mesh."""
        rows, pages = spec(mesh, DATA), pages_spec(mesh)
        of_rows = jax.tree.map(lambda _: rows, (self.rows, self.extras))
        return EngineState(pages, pages, *of_rows)  # pyright: ignore[reportArgumentType]


def init_state(
    config: LlamaConfig, slots: int, pages: int, dtype: jnp.dtype | type, *, mesh: Mesh | None = None
) -> EngineState:
    """An empty state: every row is done."""
    rows = jax.tree.map(lambda a: jnp.zeros((slots, *a.shape[1:]), a.dtype), rows_of([], [], 1))
    k, v = init_pages(config, pages, dtype, mesh=mesh)
    return on_devices(EngineState(k, v, replace(rows, done=jnp.ones(slots, bool)), None), mesh)


def on_devices(state: EngineState, mesh: Mesh | None) -> EngineState:
    """The state with every array where a mesh needs it."""
    return state if mesh is None else jax.device_put(state, named(mesh, state.specs(mesh)))


def init_extras(config: LlamaConfig, slots: int) -> Extras:
    """Settings that are all off."""
    settings = jax.tree.map(lambda a: jnp.tile(a[None], (slots, *(1 for _ in a.shape))), extra_settings(Request(())))
    history = History(
        seen=jnp.zeros((slots, config.vocab_size), bool),
        counts=jnp.zeros((slots, config.vocab_size), jnp.int32),
        recent=jnp.full((slots, MAX_BAD_WORD_TOKENS - 1), NOTHING, jnp.int32),
    )
    return Extras(settings, history)


def rows_of(requests: Sequence[tuple[Request, Sequence[int], int]], stops: Sequence[Sequence[int]], count: int) -> Rows:
    """Rows that begin to draw, as numpy arrays [count, ...]. Each of ``requests`` is a request, its tokens (the prompt
    and what was drawn before a preemption), and how many of these were drawn. The first step feeds the last token."""
    fields: dict[str, Any] = {
        **{name: np.zeros(count, np.int32) for name in ("token", "length", "drawn", "limit", "top_k")},
        **{name: np.zeros(count, np.float32) for name in ("temperature", "top_p", "min_p")},
        "done": np.ones(count, bool),
        "stop_ids": np.full((count, MAX_STOP_IDS), NO_ID, np.int32),
        "seed": np.zeros((count, 2), np.uint32),
    }
    for i, (request, tokens, drawn) in enumerate(requests):
        row = dict(token=tokens[-1], length=len(tokens) - 1, drawn=drawn, limit=request.max_new_tokens, done=False)
        row |= {name: getattr(request.sampling, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        row |= dict(seed=seed_words([request.sampling.seed])[0])
        for name, value in row.items():
            fields[name][i] = value
        fields["stop_ids"][i, : len(stops[i])] = stops[i]
    return Rows(**fields)


def extra_settings(request: Request) -> Sampling:
    """The settings of one request that `Rows` does not hold, as numpy arrays without the slots' axis."""
    settings = request.sampling
    ids, bias = (table[0] for table in bias_table([settings.logit_bias], MAX_BIAS))
    words = word_table(settings.bad_words, MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS)
    fields: dict[str, Any] = {
        name: np.float32(getattr(settings, name))
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty")
    }
    fields |= dict(key=None, logit_bias=bias, bias_ids=ids, min_tokens=np.int32(settings.min_tokens), bad_words=words)
    return Sampling(**fields)

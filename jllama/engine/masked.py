"""A decode step in two programs, for turns in which some row has a constraint.

The mask of a token depends on the token before it, so the host must see each one. `look_ahead` computes the logits of
the next token, which needs no mask; `draw_allowed` draws from them. While `look_ahead` runs, the host reads the token
before and makes the next mask. All rows take part, so that a step reads the weights once; those without a constraint
may draw any token.
"""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jllama.config import Backend
from jllama.decode import NO_TOKEN, StepOutput
from jllama.engine.request import MAX_TOP_LOGPROBS
from jllama.engine.state import EngineState
from jllama.engine.steps import advance, drawing, logits_spec, put_history
from jllama.kernels import log_probability, recorded
from jllama.mesh.layout import DATA, model_axis, spec
from jllama.mesh.run import on_shards, over
from jllama.mesh.vocabulary import gather
from jllama.model import forward
from jllama.paged import PagedCache
from jllama.params import Params
from jllama.sampling import adjust, draw_adjusted, top_logprobs


def look_ahead(
    params: Params,
    state: EngineState,
    logits: jax.Array,  # [S, V] float32: of the next token, where known
    slots: jax.Array,  # [R]: the slots to run; an index past the last is padding
    table: jax.Array,  # [R, P]: the pages of each row
    *,
    backend: Backend = "auto",
) -> tuple[EngineState, jax.Array]:
    """Feed the last token of every row, and write the logits of the next token to ``logits``."""
    if params.mesh is not None:
        of_shard, lies = functools.partial(look_ahead, backend=backend), logits_spec(params.mesh)
        out = state.specs(params.mesh), lies
        return on_shards(of_shard, params, state, logits, slots, table, out=out, layout={1: lies})
    rows = state.rows.take(slots)
    cache, alive = PagedCache(state.k, state.v, table, rows.length), (~rows.done).astype(jnp.int32)
    new, cache = forward(params, rows.token[:, None], cache, lengths=alive, last_only=True, backend=backend)
    rows = state.rows.put(slots, replace(rows, length=cache.lengths))
    return replace(state, k=cache.k, v=cache.v, rows=rows), logits.at[slots].set(new, mode="drop")


def draw_allowed(
    state: EngineState,
    logits: jax.Array,  # [S, V] float32
    slots: jax.Array,  # [R]
    mask: jax.Array,  # [R, ceil(V / 32)] uint32: the tokens that each row may draw
    *,
    kind: str,  # one of KINDS
    mesh: Mesh | None = None,
    axis: str | None = None,
    backend: Backend = "auto",
) -> tuple[EngineState, StepOutput]:
    """One token for every row, never one that its mask or a setting excludes. A row for which no token is left ends
    without one. ``mesh`` and ``axis`` are those of the params."""
    if mesh is not None:
        of_shard = functools.partial(draw_allowed, kind=kind, axis=model_axis(mesh), backend=backend)
        out, layout = (state.specs(mesh), spec(mesh, None, DATA)), {1: logits_spec(mesh)}
        return over(mesh, of_shard, state, logits, slots, mask, out=out, layout=layout)
    rows, own = state.rows.take(slots), logits.at[slots].get(mode="clip")
    own = own if axis is None else gather(own, axis)
    sampling, history = drawing(state, slots, rows, kind)
    allowed = adjust(own, sampling, rows.drawn, history, rows.stop_ids)
    allowed = jnp.where(unpack(mask, own.shape[1]), allowed, -jnp.inf)
    rows = replace(rows, done=rows.done | jnp.all(allowed == -jnp.inf, axis=-1))
    token, _ = draw_adjusted(allowed, sampling, rows.drawn, backend=backend)
    drawn_logit = jnp.take_along_axis(allowed, token[:, None], axis=-1)[:, 0]
    # If logits are huge, rounding may leave every allowed token a probability of 0.
    token = jnp.where(drawn_logit == -jnp.inf, jnp.argmax(allowed, axis=-1).astype(token.dtype), token)
    alive = ~rows.done
    logprob = jnp.where(alive, log_probability(own, token), 0.0)
    top = top_logprobs(own, MAX_TOP_LOGPROBS) if kind == "full" else None
    output = jax.tree.map(lambda a: a[None], StepOutput(jnp.where(alive, token, NO_TOKEN), logprob, top))
    if kind == "full":
        state = put_history(state, slots, history.add(token, alive))
    return replace(state, rows=state.rows.put(slots, advance(rows, token))), output


def unpack(mask: jax.Array, vocab: int) -> jax.Array:
    """[R, vocab] bool from packed bits [R, ceil(vocab / 32)] uint32."""
    bits = mask[:, :, None] >> jnp.arange(32, dtype=jnp.uint32) & 1
    return bits.reshape(mask.shape[0], -1)[:, :vocab] == 1


jit_look_ahead = jax.jit(recorded(look_ahead), static_argnames=("backend", "arch"), donate_argnames=("state", "logits"))
jit_draw_allowed = jax.jit(
    recorded(draw_allowed), static_argnames=("kind", "mesh", "axis", "backend", "arch"), donate_argnames="state"
)

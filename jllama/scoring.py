"""Log-probabilities of given tokens."""

import functools

import jax
import jax.numpy as jnp

from jllama.config import Backend
from jllama.mesh.layout import DATA, spec
from jllama.mesh.run import on_shards
from jllama.mesh.vocabulary import log_probability
from jllama.model import forward
from jllama.params import Params


@functools.partial(jax.jit, static_argnames="backend")
def token_logprobs(params: Params, tokens: jax.Array, *, backend: Backend = "auto") -> jax.Array:
    """[B, T - 1] float32: the log-probability of every token of ``tokens`` [B, T] except the first, given the tokens
    before it.

    The value of a token does not depend on later tokens, so rows of different lengths may be padded on the right.
    """
    if params.mesh is not None:
        of_shard = functools.partial(token_logprobs, backend=backend)
        return on_shards(of_shard, params, tokens, out=spec(params.mesh, DATA))
    logits, _ = forward(params, tokens[:, :-1], backend=backend)
    if params.axis is not None:
        return log_probability(logits, tokens[:, 1:], params.axis)
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)

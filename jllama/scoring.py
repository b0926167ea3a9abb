"""Log-probabilities of given tokens."""

import functools

import jax
import jax.numpy as jnp

from jllama.config import Backend
from jllama.model import forward
from jllama.params import Params


@functools.partial(jax.jit, static_argnames="backend")
def token_logprobs(params: Params, tokens: jax.Array, *, backend: Backend = "auto") -> jax.Array:
    """[B, T - 1] float32: the log-probability of every token of ``tokens`` [B, T] except the first, given the tokens
    before it.

    The value of a token does not depend on later tokens, so rows of different lengths may be padded on the right.
    """
    logits, _ = forward(params, tokens[:, :-1], backend=backend)
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)

"""What runs where: the implementation that every op gets, and why."""

import jax
import jax.numpy as jnp

from jllama.cache import KVCache, init_cache
from jllama.config import Backend
from jllama.kernels import Choice, known, pinned, record
from jllama.model import forward
from jllama.params import Params
from jllama.sampling import Sampling, make_sampling, sample


def backends(
    params: Params,
    *,
    batch: int = 1,
    prompt: int = 128,
    max_len: int = 1024,
    sampling: Sampling | None = None,
    backend: Backend = "auto",
) -> dict[str, dict[str, Choice]]:
    """The choice for every op of a prefill of ``prompt`` tokens and of a decode step, each with the draw of a token by
    ``sampling`` (default: greedy): traced for the device that holds the weights, not run. What a run has chosen is in
    `Session.backends`, at no cost.

    Raises `pallas_kernels.Unsupported` where ``backend="pallas"`` cannot be had.
    """
    sampling = make_sampling(batch) if sampling is None else sampling
    cache = jax.eval_shape(lambda: init_cache(params.config, batch, max_len, params.dtype, stacked=params.stacked))

    def token(params: Params, tokens: jax.Array, cache: KVCache) -> tuple[jax.Array, jax.Array]:
        logits, _ = forward(params, tokens, cache, last_only=True, backend=backend)
        return sample(logits, sampling, jnp.zeros(batch, jnp.int32), backend=backend)

    where = known(params)
    phases = {}
    for phase, length in (("prefill", prompt), ("decode", 1)):
        tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
        with record() as choices, pinned(where):
            jax.eval_shape(token, params, tokens, cache)
        phases[phase] = dict(choices)
    return phases

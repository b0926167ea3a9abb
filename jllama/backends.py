"""`backends`: which implementation every op gets, and why."""

import jax
import jax.numpy as jnp

from jllama.cache import KVCache, init_cache
from jllama.config import Backend
from jllama.kernels import Choice, known, pinned, record
from jllama.mesh.layout import DATA, axis_size, spec
from jllama.mesh.run import on_shards
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
    """The implementation of every op in a prefill of ``prompt`` tokens and in a decode step. Both include the draw of a
    token with ``sampling`` (default: greedy).

    The programs are traced for the device that holds the weights, but not run. The choices of a real run are in
    `Session.backends`, without a second trace.

    Raises `pallas_kernels.Unsupported` if ``backend="pallas"`` is given and an op has no kernel for it.
    """
    parts = axis_size(params.mesh, DATA)
    batch = -(-batch // parts) * parts
    sampling = make_sampling(batch) if sampling is None else sampling
    cache = jax.eval_shape(
        lambda: init_cache(params.config, batch, max_len, params.dtype, stacked=params.stacked, mesh=params.mesh)
    )

    def token(params: Params, tokens: jax.Array, cache: KVCache, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
        if params.mesh is not None:
            return on_shards(token, params, tokens, cache, sampling, out=spec(params.mesh, DATA))
        logits, _ = forward(params, tokens, cache, last_only=True, backend=backend)
        drawn = jnp.zeros(tokens.shape[0], jnp.int32)
        return sample(logits, sampling, drawn, axis=params.axis, backend=backend)

    where = known(params)
    phases = {}
    for phase, length in (("prefill", prompt), ("decode", 1)):
        tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
        with record() as choices, pinned(where):
            jax.eval_shape(token, params, tokens, cache, sampling)
        phases[phase] = dict(choices)
    return phases

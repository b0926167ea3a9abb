"""Random weights for speed, drawn where they lie: every device makes its part, with the hardware's generator.

`jllama.init` gives the same weights on any mesh. For that it draws whole weights in float32, which takes long where a
model has 70 G of them. These weights differ from mesh to mesh; their sizes, formats and scale are those of `init`.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jllama import LlamaConfig
from jllama.config import Quant
from jllama.mesh.layout import MODEL, axis_size
from jllama.mesh.place import abstract_params
from jllama.params import Params, param_specs

SPREAD = 0.02  # the standard deviation of a weight
SPREAD_OF_BITS = {"int8": 73.9, "int4": 4.61}  # of integers whose bits are random


def draw(config: LlamaConfig, mesh: Mesh, *, dtype: Any = jnp.bfloat16, quant: Quant = "none", stacked: bool) -> Params:
    """Params of these sizes on a mesh."""
    shards = axis_size(mesh, MODEL)
    shapes = replace(abstract_params(config, shards, dtype=jnp.dtype(dtype), quant=quant, stacked=stacked), mesh=mesh)
    specs = jax.tree.leaves(param_specs(shapes), is_leaf=lambda s: isinstance(s, P))
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    made = []
    for number, ((path, leaf), spec) in enumerate(zip(leaves, specs, strict=True)):
        names = (*spec, *(None,) * (leaf.ndim - len(spec)))
        part = tuple(n // (shards if name == MODEL else 1) for n, name in zip(leaf.shape, names, strict=True))
        lead = stacked and path[0].name == "layers"
        adds = any(getattr(step, "name", "") in ("wo", "w_down") for step in path)  # to the residual stream
        scales = getattr(path[-1], "name", "") == "scale"
        spread = SPREAD * (2 * config.n_layers) ** -0.5 if adds else SPREAD
        make = _maker(mesh, spec, part[lead:], part[0] if lead else 0, np.dtype(leaf.dtype), scales, spread)
        made.append(make(np.uint32(number)))
    return jax.block_until_ready(jax.tree.unflatten(tree, made))


@functools.cache
def _maker(
    mesh: Mesh, spec: P, shape: tuple[int, ...], layers: int, dtype: np.dtype, scales: bool, spread: float
) -> Callable[[Any], jax.Array]:
    """A compiled function from a seed to an array of the mesh, of which every device has ``shape``, with ``layers`` of
    them stacked if that is not 0."""

    def of_device(seed: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(0, impl="unsafe_rbg"), seed)
        if axis_size(mesh, MODEL) > 1:
            key = jax.random.fold_in(key, lax.axis_index(MODEL))
        one = functools.partial(_one, shape=shape, dtype=dtype, scales=scales, spread=spread)
        return lax.map(one, jax.random.split(key, layers)) if layers else one(key)  # one layer at a time: less memory

    # The devices along ``data`` draw the same, which the types cannot say.
    return jax.jit(jax.shard_map(of_device, mesh=mesh, in_specs=P(), out_specs=spec, check_vma=False))


def _one(key: jax.Array, *, shape: tuple[int, ...], dtype: np.dtype, scales: bool, spread: float) -> jax.Array:
    if len(shape) < 2:
        return jnp.ones(shape, dtype)
    if scales:
        return jnp.full(shape, spread / SPREAD_OF_BITS["int4" if dtype == jnp.float16 else "int8"], dtype)
    bits = lax.bitcast_convert_type(jax.random.bits(key, shape, jnp.uint8), jnp.int8)
    if jnp.issubdtype(dtype, jnp.integer):
        return (bits >> 4).astype(dtype) if dtype == jnp.int4 else bits
    return (bits.astype(jnp.float32) * (spread / SPREAD_OF_BITS["int8"])).astype(dtype)

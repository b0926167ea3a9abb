"""Calls a function on every shard of a mesh: `jax.shard_map`, with what each argument's type says about its layout."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jllama.errors import InputError
from jllama.kernels import why_apart
from jllama.mesh.layout import DATA, MODEL, AnyMesh, axis_size, model_axis, shard_config, spec
from jllama.params import Params, param_specs

_DEFAULT: Mapping[int, Any] = MappingProxyType({})


def specs(tree: Any, mesh: AnyMesh) -> Any:
    """The `PartitionSpec` of every array of a tree. Params, caches and states say how they are divided; the first axis
    of any other array is rows, over ``data``."""
    rows = spec(mesh, DATA)

    def one(a: Any) -> Any:
        if isinstance(a, Params):
            return param_specs(a)
        return a.specs(mesh) if hasattr(a, "specs") else rows if np.ndim(a) else PartitionSpec()

    return jax.tree.map(one, tree, is_leaf=lambda a: isinstance(a, Params) or hasattr(a, "specs"))


def on_shards(
    function: Callable[..., Any], params: Params, *arguments: Any, out: Any, layout: Mapping[int, Any] = _DEFAULT
) -> Any:
    """``function(shard, *arguments)`` on every shard of params that have a mesh. ``shard`` is `Params` without a mesh,
    whose ``axis`` names where the rest of the model is. ``out`` is the tree of `PartitionSpec` of the result, or a
    prefix of it; ``layout`` is that of some arguments, by their place, where `specs` does not know it."""
    mesh = params.mesh
    assert mesh is not None

    def of_shard(params: Params, *arguments: Any) -> Any:
        return function(one_shard(params), *arguments)

    return over(mesh, of_shard, params, *arguments, out=out, layout={i + 1: s for i, s in layout.items()})


def over(
    mesh: Mesh, function: Callable[..., Any], *arguments: Any, out: Any, layout: Mapping[int, Any] = _DEFAULT
) -> Any:
    """``function(*arguments)`` on every device of a mesh, each with its part of the arguments. ``out`` and ``layout``
    are as in `on_shards`."""
    given = tuple(layout.get(i, specs(a, mesh)) for i, a in enumerate(arguments))
    jax.tree.map(lambda a, s: _check_rows(a, s, mesh), arguments, given)
    current = _as_it_is_set(mesh)
    if any(kind is AxisType.Explicit for kind in current.axis_types):
        arguments = jax.tree.map(lambda a, s: jax.sharding.reshard(a, NamedSharding(current, s)), arguments, given)
    run = jax.shard_map(function, mesh=current, in_specs=given, out_specs=out)
    if not any(isinstance(a, Tracer) for a in jax.tree.leaves(arguments)):
        run = jax.jit(run)  # else every operation would be a program of all devices
    return run(*arguments)


def _as_it_is_set(mesh: Mesh) -> Mesh:
    """A mesh, with its axes in the order and of the types that they have in `jax.set_mesh`, if it is set. The set mesh
    itself may be abstract, and kernels that reach other devices must know which these are."""
    context: Any = jax.sharding.get_abstract_mesh()
    if context.empty or dict(context.shape) != dict(mesh.shape):
        return mesh
    order = [mesh.axis_names.index(name) for name in context.axis_names]
    return Mesh(mesh.devices.transpose(order), context.axis_names, axis_types=context.axis_types)


def meshed(params: Params, tokens: Any) -> Params:
    """Params as they are. If they know of no mesh, and the rows of ``tokens`` are divided over one with Explicit axes,
    the same params on that mesh, where every device has all of them."""
    lies = jax.typeof(tokens).sharding
    divided = len(lies.spec) > 0 and lies.spec[0] == DATA
    if params.mesh is not None or params.axis is not None or not divided:
        return params
    if axis_size(lies.mesh, MODEL) > 1:
        raise InputError(f"params: expected jllama.shard(params, mesh) for tokens on {lies.mesh.shape}, found no mesh")
    return replace(params, mesh=lies.mesh)


def one_shard(params: Params) -> Params:
    """Inside `jax.shard_map`: the params of this shard."""
    assert params.mesh is not None
    config = shard_config(params.config, axis_size(params.mesh, MODEL))
    axis = model_axis(params.mesh)
    apart = None if axis is None else why_apart(_as_it_is_set(params.mesh))
    return replace(params, config=config, mesh=None, axis=axis, apart=apart)


def in_any_group(flag: jax.Array, axis: str | None) -> jax.Array:
    """Inside `jax.shard_map`: whether a flag is set for the rows of any group along ``data``, if the model is divided
    along ``axis``. A loop over model steps must go on while this holds: the persistent step is a launch of all devices
    of the mesh, so all groups must run it the same number of times."""
    if axis is None or axis_size(jax.sharding.get_abstract_mesh(), DATA) == 1:
        return flag
    return lax.pmax(flag.astype(np.int32), DATA) > 0


def fetch(tree: Any, mesh: Mesh | None) -> Any:
    """The arrays of a tree as numpy arrays. Where other processes have parts of them, all processes get all of them:
    each must call this."""
    if mesh is not None and not all(a.is_fully_addressable for a in jax.tree.leaves(tree)):
        tree = _replicated(mesh)(tree)
    return jax.device_get(tree)


def least(count: int) -> int:
    """The least of what the processes found, so that all do the same."""
    if jax.process_count() == 1:
        return count
    from jax.experimental import multihost_utils

    return int(np.min(multihost_utils.process_allgather(np.int64(count))))


@functools.cache
def _replicated(mesh: Mesh) -> Callable[[Any], Any]:
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _check_rows(array: Any, layout: PartitionSpec, mesh: AnyMesh) -> None:
    rows = axis_size(mesh, DATA)
    if len(layout) == 1 and layout[0] == DATA and array.shape[0] % rows:
        raise InputError(
            f"mesh: {DATA!r} has {rows} devices: expected a multiple of {rows} rows, found {array.shape[0]}"
        )

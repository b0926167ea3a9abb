"""Calls a function on every shard of a mesh: `jax.shard_map`, with what each argument's type says about its layout."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jllama.cache import KVCache, cache_spec
from jllama.errors import InputError
from jllama.mesh.layout import DATA, MODEL, AnyMesh, axis_size, model_axis, shard_config, spec
from jllama.paged import PagedCache
from jllama.params import Params, param_specs


def specs(tree: Any, mesh: AnyMesh) -> Any:
    """The `PartitionSpec` of every array of a tree. Params and caches are divided as they are made; the first axis of
    any other array is rows, over ``data``."""
    rows: Any = spec(mesh, DATA)

    def one(a: Any) -> Any:
        if isinstance(a, Params):
            return param_specs(a)
        if isinstance(a, KVCache):
            layers: Any = cache_spec(mesh, stacked=a.stacked)
            k, v = jax.tree.map(lambda _: layers, (a.k, a.v))
            return KVCache(k, v, rows)
        if isinstance(a, PagedCache):  # pages, too, belong to the rows of some devices
            pages: Any = spec(mesh, None, DATA, MODEL)
            return PagedCache(pages, pages, rows, rows)
        return rows

    return jax.tree.map(one, tree, is_leaf=lambda a: isinstance(a, Params | KVCache | PagedCache))


def on_shards(function: Callable[..., Any], params: Params, *arguments: Any, out: Any) -> Any:
    """``function(shard, *arguments)`` on every shard of params that have a mesh. ``shard`` is `Params` without a mesh,
    whose ``axis`` names where the rest of the model is. ``out`` is the tree of `PartitionSpec` of the result, or a
    prefix of it."""
    mesh = params.mesh
    assert mesh is not None

    def of_shard(params: Params, *arguments: Any) -> Any:
        return function(one_shard(params), *arguments)

    return over(mesh, of_shard, params, *arguments, out=out)


def over(mesh: Mesh, function: Callable[..., Any], *arguments: Any, out: Any) -> Any:
    """``function(*arguments)`` on every device of a mesh, each with its part of the arguments."""
    layout = specs(arguments, mesh)
    jax.tree.map(lambda a, s: _check_rows(a, s, mesh), arguments, layout)
    # A mesh that is set has the last word on the type of its axes, where it is the same otherwise.
    context: Any = jax.sharding.get_abstract_mesh()
    current: Any = mesh if context.empty or dict(context.shape) != dict(mesh.shape) else context
    if any(kind is AxisType.Explicit for kind in current.axis_types):
        arguments = jax.tree.map(lambda a, s: jax.sharding.reshard(a, NamedSharding(current, s)), arguments, layout)
    return jax.shard_map(function, mesh=current, in_specs=layout, out_specs=out)(*arguments)


def one_shard(params: Params) -> Params:
    """Inside `jax.shard_map`: the params of this shard."""
    assert params.mesh is not None
    config = shard_config(params.config, axis_size(params.mesh, MODEL))
    return replace(params, config=config, mesh=None, axis=model_axis(params.mesh))


def _check_rows(array: Any, layout: PartitionSpec, mesh: AnyMesh) -> None:
    rows = axis_size(mesh, DATA)
    if len(layout) == 1 and layout[0] == DATA and array.shape[0] % rows:
        raise InputError(
            f"mesh: {DATA!r} has {rows} devices: expected a multiple of {rows} rows, found {array.shape[0]}"
        )

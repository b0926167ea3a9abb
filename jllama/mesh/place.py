"""Puts params on a mesh, and takes them off again."""

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from jllama.config import LlamaConfig, Quant
from jllama.kernels import QuantizedTensor, Weight, WeightFormat
from jllama.mesh.layout import (
    FUSED_PARTS,
    MODEL,
    AnyMesh,
    auto,
    axis_size,
    check_mesh,
    divisor,
    named,
    order,
    part_rows,
    shard_shapes,
    take_rows,
    widened,
    with_hidden_units,
)
from jllama.params import Layer, Params, each_field, laid_out, param_specs, quant_group


def shardings(
    config: LlamaConfig,
    mesh: AnyMesh,
    *,
    quant: Quant = "none",
    group: int | None = None,
    stacked: bool = False,
) -> Params:
    """The `NamedSharding` of every array of such a model on a mesh with the axes ``data`` and ``model``, either of
    which may be missing: a tree like the `Params` that `load`, `init` and `shard` give for this mesh. Raises
    `InputError` where a size does not divide; the message says what would.

    The rows of fused weights are in the order of the shards: see `jllama.mesh.layout`."""
    check_mesh(config, mesh)
    shapes = abstract_params(config, axis_size(mesh, MODEL), quant=quant, group=group, stacked=stacked)
    return named(mesh, param_specs(replace(shapes, mesh=mesh)))  # pyright: ignore[reportReturnType, reportArgumentType]


def abstract_params(
    config: LlamaConfig,
    shards: int = 1,
    *,
    dtype: Any = jnp.float32,
    quant: Quant = "none",
    group: int | None = None,
    stacked: bool = False,
) -> Params:
    """The shapes and dtypes of a model's arrays on a mesh with so many shards. Nothing is allocated."""
    config = widened(config, shards, quant_group(config.hidden_dim, quant, group))

    def weight(field: str, shape: tuple[int, ...], lead: tuple[int, ...] = ()) -> Any:
        whole = jax.ShapeDtypeStruct((*lead, *shape), dtype)
        if quant == "none" or len(shape) == 1 or field == "embed":
            return whole
        size = quant_group(shape[-1], quant, group, divisor(field, shards)) or shape[-1]
        scale_dtype = jnp.float32 if size == shape[-1] else jnp.float16
        scale = jax.ShapeDtypeStruct((*lead, shape[0], shape[-1] // size), scale_dtype)
        return QuantizedTensor(jax.ShapeDtypeStruct(whole.shape, WeightFormat(quant).dtype), scale)  # pyright: ignore

    lead = (config.n_layers,) if stacked else ()
    layer = Layer(**{name: weight(name, shape, lead) for name, shape in shard_shapes(config, shards).items()})
    vocabulary = (config.vocab_size, config.dim)
    return Params(
        embed=weight("embed", vocabulary),
        layers=layer if stacked else (layer,) * config.n_layers,
        norm=weight("norm", (config.dim,)),
        lm_head=None if config.tie_embeddings else weight("lm_head", vocabulary),
        config=config,
    )


def shard(params: Params, mesh: Mesh) -> Params:
    """The same model on a mesh. Arrays that lie there already, as `shardings` says, are not copied. Each device gets
    its part of every weight; the rows of fused weights are put in the order of the shards. A quantised model may get
    further hidden units, whose weights are zero: see `jllama.mesh.layout.widened`."""
    check_mesh(params.config, mesh)
    if params.mesh is not None and axis_size(params.mesh, MODEL) != axis_size(mesh, MODEL):
        params = unshard(params)
    if params.mesh is None:
        params = _wide(params, axis_size(mesh, MODEL))
        rows = {f: order(params.config, axis_size(mesh, MODEL), f) for f in FUSED_PARTS}
        params = _with_rows(params, rows)
    return laid_out(params, mesh)


def _wide(params: Params, shards: int) -> Params:
    """Params with the hidden units that `widened` adds."""
    layers = params.layers
    down = layers.w_down if isinstance(layers, Layer) else layers[0].w_down
    group = down.group if isinstance(down, QuantizedTensor) and down.scale.shape[-1] > 1 else None
    config = widened(params.config, shards, group)
    if config == params.config:
        return params
    wider = functools.partial(with_hidden_units, hidden=config.hidden_dim)
    return replace(_each_layer(params, wider), config=config)


def unshard(params: Params) -> Params:
    """The same model on the default device. Hidden units that `shard` has added stay: they change nothing."""
    if params.mesh is None:
        return params
    shards = axis_size(params.mesh, MODEL)
    rows = {f: np.concatenate([*part_rows(params.config, shards, f).values()]) for f in FUSED_PARTS}
    alone = replace(laid_out(params, auto(params.mesh)), mesh=None)
    alone = jax.device_put(alone, SingleDeviceSharding(jax.devices()[0]))
    return _with_rows(alone, rows) if shards > 1 else alone


def placed(params: Params) -> Params:
    """Params whose arrays lie as `shardings` says. Others are moved, with a warning that says so. Traced ones stay as
    they are, and so do params without a mesh."""
    leaves = jax.tree.leaves(params)
    if params.mesh is None or any(isinstance(a, Tracer) for a in leaves):
        return params
    wanted = named(params.mesh, param_specs(params))
    moved = sum(a.nbytes for a, s in zip(leaves, jax.tree.leaves(wanted), strict=True) if not _lies(a, s))
    if not moved:
        return params
    what = f"{moved / 1e9:.2f} GB of params were in another layout, and were moved"
    warnings.warn(f"{what}: jllama.shardings(config, mesh) is the layout that needs no copy", stacklevel=3)
    return jax.device_put(params, wanted)


def adopted(params: Params, mesh: Mesh | None) -> Params:
    """Params for a mesh, moved there where they are not, with a warning that says so."""
    if params.mesh == mesh:
        return placed(params)
    where = "one device" if mesh is None else f"the mesh {dict(mesh.shape)}"
    warnings.warn(f"params of another layout were moved to {where}: jllama.shard does it beforehand", stacklevel=3)
    return unshard(params) if mesh is None else shard(params, mesh)


def _lies(array: jax.Array, sharding: NamedSharding) -> bool:
    return array.sharding.is_equivalent_to(sharding, array.ndim)


def _with_rows(params: Params, rows: Mapping[str, np.ndarray | None]) -> Params:
    """Params with the rows of fused weights taken in another order."""

    def one(field: str, weight: Weight) -> Weight:
        index = rows.get(field)
        return weight if index is None else take_rows(field, weight, index)

    return _each_layer(params, one)


def _each_layer(params: Params, function: Callable[[str, Weight], Weight]) -> Params:
    if isinstance(params.layers, Layer):
        return replace(params, layers=each_field(params.layers, function))
    return replace(params, layers=tuple(each_field(layer, function) for layer in params.layers))

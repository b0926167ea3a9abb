"""The weights: frozen pytrees of arrays. Matrices are ``[out, in]``, as in checkpoints, so load transposes nothing.

Matrices that multiply the same input are fused: ``wqkv`` holds the rows of wq, wk and wv, and ``w_gate_up`` holds those
of w_gate and w_up. One long read gets closer to the memory bandwidth than three short ones.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jllama.config import LlamaConfig, Quant, layer_shapes
from jllama.errors import InputError
from jllama.kernels import (
    GROUPS,
    LayerView,
    QuantizedTensor,
    Weight,
    WeightFormat,
    group_size,
    materialize,
    quantize,
)
from jllama.mesh.layout import (
    MODEL,
    auto,
    axis_size,
    check_mesh,
    divisor,
    named,
    order,
    take_rows,
    weight_spec,
    widened,
    with_hidden_units,
)
from jllama.mesh.vocabulary import lookup


@struct.dataclass
class Layer:
    """The weights of one block. In the stacked form (see `Params`), every field has a leading layer axis."""

    attn_norm: jax.Array  # [dim]
    wqkv: Weight  # [(n_heads + 2 * n_kv_heads) * head_dim, dim]
    wo: Weight  # [dim, n_heads * head_dim]
    ffn_norm: jax.Array  # [dim]
    w_gate_up: Weight  # [2 * hidden_dim, dim]
    w_down: Weight  # [dim, hidden_dim]
    bqkv: jax.Array | None = None  # [(n_heads + 2 * n_kv_heads) * head_dim]; this and bo: with attention_bias
    bo: jax.Array | None = None  # [dim]
    b_gate_up: jax.Array | None = None  # [2 * hidden_dim]; this and b_down: with mlp_bias
    b_down: jax.Array | None = None  # [dim]


@struct.dataclass
class Params:
    """The weights of a whole model.

    ``layers`` has two forms. A tuple with one `Layer` each is for XLA, which would copy every slice of a stacked
    weight. One stacked `Layer` with a leading layer axis is for kernels that index the layer themselves. The kernel
    that runs a whole decode step in one launch needs the stacked form.

    ``config`` is static: it is part of the tree's structure. So are ``mesh``, over which the arrays are divided as
    `jllama.mesh.layout` says (None: one device), and ``axis``, which a shard inside `jax.shard_map` has: the mesh axis
    along which other devices hold the rest of the model. ``apart`` says why these devices cannot add up inside a
    kernel; None where they can.
    """

    embed: Weight  # [vocab_size, dim]; integers only where it is the head, too
    layers: tuple[Layer, ...] | Layer
    norm: jax.Array  # [dim]
    lm_head: Weight | None  # [vocab_size, dim]; None: tied to embed
    config: LlamaConfig = struct.field(pytree_node=False)
    mesh: Mesh | None = struct.field(pytree_node=False, default=None)
    axis: str | None = struct.field(pytree_node=False, default=None)
    apart: str | None = struct.field(pytree_node=False, default=None)

    @property
    def stacked(self) -> bool:
        """Whether the layers are stacked on a leading axis."""
        return isinstance(self.layers, Layer)

    def layer(self, index: int) -> Layer:
        """Layer ``index`` as the ops take it. Matrices of a stacked model become `LayerView`, which copies nothing."""
        if isinstance(self.layers, tuple):
            return self.layers[index]

        def one(a: Weight) -> Any:
            return LayerView(a, index) if a.ndim > 2 else a[index]

        return jax.tree.map(one, self.layers, is_leaf=_is_weight)

    @property
    def head(self) -> Weight:
        """The output projection: ``lm_head``, or ``embed`` if the two are tied."""
        return self.embed if self.lm_head is None else self.lm_head

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of activations, cache and unquantised weights."""
        return self.norm.dtype

    def embedded(self, tokens: jax.Array) -> jax.Array:
        """The rows of the embedding for ``tokens`` [...], as activations [..., dim]."""
        return lookup(self.embed, tokens, self.axis, self.dtype)


def _is_weight(x: Any) -> bool:
    return isinstance(x, QuantizedTensor)


def stack(params: Params) -> Params:
    """The same model with its layers stacked on a leading axis. Both forms are in memory until the caller drops the
    unstacked one. `init` and `load` with ``stacked=True`` never create the unstacked one."""
    if not isinstance(params.layers, tuple):
        return params
    formats = [jax.tree.map(lambda a: (a.shape, a.dtype), layer) for layer in params.layers]
    if any(form != formats[0] for form in formats):
        raise InputError("stack: expected every layer in the format of the first, found another")
    return replace(params, layers=jax.tree.map(lambda *a: jnp.stack(a), *params.layers))


def unstack(params: Params) -> Params:
    """The same model with its layers as a tuple."""
    return replace(params, layers=tuple(materialize(params.layer(i)) for i in range(params.config.n_layers)))


def put[T](stacked: T | None, entry: T, index: int, count: int) -> T:
    """Write ``entry`` to position ``index`` of the leading axis of ``stacked``, in place. If ``stacked`` is None, it is
    first allocated with ``count`` positions. Peak memory is the stacked arrays plus one entry."""
    if stacked is None:
        stacked = jax.tree.map(lambda a: jnp.zeros((count, *a.shape), a.dtype, device=_stacked_sharding(a)), entry)
    return _put(stacked, entry, index)


def _stacked_sharding(array: jax.Array) -> NamedSharding | None:
    """Where a stack of such arrays lies; None: on the default device."""
    lies = None if isinstance(array, Tracer) else array.sharding
    return NamedSharding(lies.mesh, PartitionSpec(None, *lies.spec)) if isinstance(lies, NamedSharding) else None


@functools.partial(jax.jit, donate_argnums=0)
def _put(stacked: Any, entry: Any, index: int) -> Any:
    return jax.tree.map(lambda s, a: lax.dynamic_update_index_in_dim(s, a, index, 0), stacked, entry)


def param_specs(params: Params) -> Params:
    """The `PartitionSpec` of every array of params that have a mesh; their arrays may be any shapes."""
    assert params.mesh is not None
    mesh, stacked = params.mesh, params.stacked

    def of_layer(layer: Layer) -> Layer:
        return each_field(layer, lambda field, weight: weight_spec(mesh, field, weight, stacked=stacked))

    layers = of_layer(params.layers) if isinstance(params.layers, Layer) else tuple(map(of_layer, params.layers))
    model = {field: getattr(params, field) for field in ("embed", "norm", "lm_head")}
    specs = {field: weight_spec(mesh, field, weight) for field, weight in model.items() if weight is not None}
    return replace(params, layers=layers, **specs)


def laid_out(params: Params, mesh: Mesh) -> Params:
    """Params whose arrays have the shapes that the mesh needs, with the arrays where it needs them. Arrays that are
    there already are not copied."""
    params = replace(params, mesh=mesh)
    return jax.device_put(params, named(mesh, param_specs(params)))


def each_field(layer: Layer, function: Callable[[str, Weight], Any]) -> Layer:
    """A layer with ``function(field, weight)`` in place of every weight that it has."""
    fields = {name: value for name, value in vars(layer).items() if value is not None}
    return Layer(**{name: function(name, value) for name, value in fields.items()})


def weight_bytes(params: Params, *, per_token: bool = False) -> int:
    """Bytes of all weights. With ``per_token``, bytes that one decode step reads: an untied embedding does not count,
    because a step reads only a few of its rows."""
    leaves = jax.tree.leaves(params, is_leaf=_is_weight)
    total = sum(leaf.nbytes for leaf in leaves)
    return total - params.embed.nbytes if per_token and params.lm_head is not None else total


def unpacked(params: Params) -> Params:
    """The same model with 4-bit integers as int8, which a CPU multiplies without unpacking them for every token."""

    def one(w: Any) -> Any:
        packed = isinstance(w, QuantizedTensor) and w.format is WeightFormat.INT4
        return replace(w, data=w.data.astype(jnp.int8)) if packed else w

    return jax.tree.map(one, params, is_leaf=_is_weight)


def quantizer(quant: Quant, group: int | None = None, shards: int = 1) -> Callable[[jax.Array], Weight]:
    """A function that converts a float weight to the given format: ``none``, ``int8`` (by default one scale per output
    channel) or ``int4`` (by default one scale per 128 inputs). No group is in two of ``shards`` parts of a row."""
    if quant == "none":
        return lambda w: w
    fmt = WeightFormat(quant)
    return lambda w: _quantize(w, fmt, quant_group(w.shape[-1], quant, group, shards))


def quant_group(width: int, quant: Quant, group: int | None, shards: int = 1) -> int | None:
    """How many of a row's ``width`` inputs share a scale; None: all, or there are no scales. Where each of several
    shards has a part of every row, no group is in two of them."""
    if quant == "none":
        return None
    requested = {"int8": None, "int4": 128}[quant] if group is None else group
    return None if requested is None else group_size(width // shards, requested)


def check_group(config: LlamaConfig, quant: Quant, group: int | None) -> None:
    """Raise `InputError` if ``group`` does not divide every row. (The default group is reduced where it does not.)"""
    if group is None:
        return
    if quant == "none":
        raise InputError(f"group: expected quant='int8' or 'int4' with it, found quant='none' and group={group}")
    widths = sorted({shape[1] for shape in layer_shapes(config).values() if len(shape) == 2})
    fits = [str(size) for size in GROUPS if all(width % size == 0 for width in widths)]
    if str(group) not in fits:
        rows = f"rows of {' and '.join(map(str, widths))} inputs"
        expected = f"one of {', '.join(fits)}" if fits else "none"
        raise InputError(f"group: expected {expected} ({rows}), found {group}")


def field_format(field: str, config: LlamaConfig, quant: Quant, group: int | None) -> tuple[Quant, int | None]:
    """The format and group of a matrix in a model that is quantised. A lookup table stays floats. One that is the head,
    too, is read whole at every step. It is int8, one scale a row, because 4 bits would lose too much in the logits."""
    if field != "embed" or quant == "none":
        return quant, group
    return ("int8" if config.tie_embeddings else "none"), None


@functools.partial(jax.jit, static_argnums=(1, 2))
def _quantize(w: jax.Array, fmt: WeightFormat, group: int | None) -> QuantizedTensor:
    return quantize(w, fmt, group=group)


def init(
    config: LlamaConfig,
    key: jax.Array,
    *,
    dtype: DTypeLike = jnp.float32,
    quant: Quant = "none",
    group: int | None = None,
    stacked: bool = False,
    mesh: Mesh | None = None,
) -> Params:
    """Random weights for training, tests and benchmarks, scaled so that a deep model is stable at the start. With
    ``stacked``, they are created in the stacked form (see `Params`). On a ``mesh``, every device gets its part of the
    weights that one device would get."""
    fields = _Fields(config, jnp.dtype(dtype), quant, group, None if mesh is None else auto(mesh))
    shapes = layer_shapes(config)

    def one_layer(key: jax.Array) -> Layer:
        keys = {name: jax.random.fold_in(key, i) for i, name in enumerate(shapes)}
        return Layer(**{name: fields.make(name, shape, keys[name]) for name, shape in shapes.items()})

    embed_key, head_key, layers_key = jax.random.split(key, 3)
    vocabulary = (config.vocab_size, config.dim)
    layers = (one_layer(jax.random.fold_in(layers_key, i)) for i in range(config.n_layers))
    params = Params(
        embed=fields.make("embed", vocabulary, embed_key),
        layers=_stack_one_by_one(layers, config.n_layers) if stacked else tuple(layers),
        norm=fields.make("norm", (config.dim,), key),
        lm_head=None if config.tie_embeddings else fields.make("lm_head", vocabulary, head_key),
        config=fields.wide,
    )
    return params if mesh is None else laid_out(params, mesh)


class _Fields:
    """Makes random weights, one compiled function a field."""

    def __init__(self, config: LlamaConfig, dtype: jnp.dtype, quant: Quant, group: int | None, mesh: Mesh | None):
        self._config, self._dtype, self._mesh = config, dtype, mesh
        self._quant: Quant = quant
        self._group = group
        self._shards = axis_size(mesh, MODEL)
        self.wide = widened(config, self._shards, quant_group(config.hidden_dim, quant, group))
        self._compiled: dict[str, Callable[[jax.Array], Weight]] = {}
        if mesh is not None:
            check_mesh(config, mesh)

    def make(self, field: str, shape: tuple[int, ...], key: jax.Array) -> Any:
        """A weight of this field."""
        whole = functools.partial(self._whole, field, shape)
        if self._mesh is None:
            return whole(key)
        if field not in self._compiled:
            spec = weight_spec(self._mesh, field, jax.eval_shape(whole, key))
            self._compiled[field] = jax.jit(whole, out_shardings=named(self._mesh, spec))
        return self._compiled[field](key)

    def _whole(self, field: str, shape: tuple[int, ...], key: jax.Array) -> Weight:
        if len(shape) == 1:  # norms change nothing at first, and neither do biases
            weight: Any = jnp.full(shape, field.endswith("norm"), self._dtype)
            weight = with_hidden_units(field, weight, self.wide.hidden_dim)
        else:
            # Projections that add to the residual stream are scaled down. Otherwise its variance would grow with every
            # layer.
            scale = (2 * self._config.n_layers) ** -0.5 if field in ("wo", "w_down") else 1.0
            weight = _normal(key, shape, scale * 0.02, self._dtype)
            weight = with_hidden_units(field, weight, self.wide.hidden_dim)
            quant, group = field_format(field, self._config, self._quant, self._group)
            weight = quantizer(quant, group, divisor(field, self._shards))(weight)
        index = order(self.wide, self._shards, field)
        return weight if index is None else take_rows(field, weight, index)


def _stack_one_by_one(layers: Iterable[Layer], count: int) -> Layer:
    stacked = None
    for i, layer in enumerate(layers):
        stacked = put(stacked, layer, i, count)
    assert stacked is not None
    return stacked


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _normal(key: jax.Array, shape: tuple[int, ...], scale: float, dtype: jnp.dtype) -> jax.Array:
    return (jax.random.normal(key, shape, jnp.float32) * scale).astype(dtype)

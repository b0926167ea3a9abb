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
from jax.typing import DTypeLike

from jllama.config import LlamaConfig, Quant
from jllama.errors import InputError
from jllama.kernels import (
    GROUPS,
    LayerView,
    QuantizedTensor,
    Weight,
    WeightFormat,
    dequantize,
    group_size,
    materialize,
    quantize,
)


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

    ``config`` is static: it is part of the tree's structure.
    """

    embed: Weight  # [vocab_size, dim]; integers only where it is the head, too
    layers: tuple[Layer, ...] | Layer
    norm: jax.Array  # [dim]
    lm_head: Weight | None  # [vocab_size, dim]; None: tied to embed
    config: LlamaConfig = struct.field(pytree_node=False)

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
        if isinstance(self.embed, QuantizedTensor):
            rows = QuantizedTensor(self.embed.data[tokens], self.embed.scale[tokens])
            return dequantize(rows, self.dtype)
        return self.embed[tokens]


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
        stacked = jax.tree.map(lambda a: jnp.zeros((count, *a.shape), a.dtype), entry)
    return _put(stacked, entry, index)


@functools.partial(jax.jit, donate_argnums=0)
def _put(stacked: Any, entry: Any, index: int) -> Any:
    return jax.tree.map(lambda s, a: lax.dynamic_update_index_in_dim(s, a, index, 0), stacked, entry)


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


def quantizer(quant: Quant, group: int | None = None) -> Callable[[jax.Array], Weight]:
    """A function that converts a float weight to the given format: ``none``, ``int8`` (by default one scale per output
    channel) or ``int4`` (by default one scale per 128 inputs)."""
    if quant == "none":
        return lambda w: w
    fmt = WeightFormat(quant)
    requested = group if group is not None else {WeightFormat.INT8: None, WeightFormat.INT4: 128}[fmt]

    def apply(w: jax.Array) -> QuantizedTensor:
        size = None if requested is None else group_size(w.shape[-1], requested)
        return _quantize(w, fmt, size)

    return apply


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


def table_quantizer(quant: Quant, config: LlamaConfig) -> Callable[[jax.Array], Weight]:
    """`quantizer` for the embedding. A lookup table stays floats. One that is the head, too, is read whole at every
    step: with int8 or int4 layers it is int8, one scale a row, because 4 bits would lose too much in the logits."""
    return quantizer("none" if quant == "none" or not config.tie_embeddings else "int8")


@functools.partial(jax.jit, static_argnums=(1, 2))
def _quantize(w: jax.Array, fmt: WeightFormat, group: int | None) -> QuantizedTensor:
    return quantize(w, fmt, group=group)


def layer_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every field that a `Layer` of such a model has."""
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    shapes = {
        "attn_norm": (config.dim,),
        "wqkv": (q + 2 * kv, config.dim),
        "wo": (config.dim, q),
        "ffn_norm": (config.dim,),
        "w_gate_up": (2 * config.hidden_dim, config.dim),
        "w_down": (config.dim, config.hidden_dim),
    }
    attention = {"bqkv": (q + 2 * kv,), "bo": (config.dim,)} if config.attention_bias else {}
    mlp = {"b_gate_up": (2 * config.hidden_dim,), "b_down": (config.dim,)} if config.mlp_bias else {}
    return shapes | attention | mlp


def init(
    config: LlamaConfig,
    key: jax.Array,
    *,
    dtype: DTypeLike = jnp.float32,
    quant: Quant = "none",
    group: int | None = None,
    stacked: bool = False,
) -> Params:
    """Random weights for training, tests and benchmarks, scaled so that a deep model is stable at the start. With
    ``stacked``, they are created in the stacked form (see `Params`)."""
    to_weight = quantizer(quant, group)

    def normal(key: jax.Array, shape: tuple[int, ...], scale: float = 1.0) -> jax.Array:
        return _normal(key, shape, scale * 0.02, jnp.dtype(dtype))

    def one_layer(key: jax.Array) -> Layer:
        fields: dict[str, Any] = {}
        for i, (name, shape) in enumerate(layer_shapes(config).items()):
            if len(shape) == 1:  # norms change nothing at first, and neither do biases
                fields[name] = jnp.full(shape, name.endswith("norm"), dtype)
            else:
                # Projections that add to the residual stream are scaled down. Otherwise its variance would grow with
                # every layer.
                scale = (2 * config.n_layers) ** -0.5 if name in ("wo", "w_down") else 1.0
                fields[name] = to_weight(normal(jax.random.fold_in(key, i), shape, scale))
        return Layer(**fields)

    embed_key, head_key, layers_key = jax.random.split(key, 3)
    vocabulary = (config.vocab_size, config.dim)
    layers = (one_layer(jax.random.fold_in(layers_key, i)) for i in range(config.n_layers))
    return Params(
        embed=table_quantizer(quant, config)(normal(embed_key, vocabulary)),
        layers=_stack_one_by_one(layers, config.n_layers) if stacked else tuple(layers),
        norm=jnp.ones(config.dim, dtype),
        lm_head=None if config.tie_embeddings else to_weight(normal(head_key, vocabulary)),
        config=config,
    )


def _stack_one_by_one(layers: Iterable[Layer], count: int) -> Layer:
    stacked = None
    for i, layer in enumerate(layers):
        stacked = put(stacked, layer, i, count)
    assert stacked is not None
    return stacked


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _normal(key: jax.Array, shape: tuple[int, ...], scale: float, dtype: jnp.dtype) -> jax.Array:
    return (jax.random.normal(key, shape, jnp.float32) * scale).astype(dtype)

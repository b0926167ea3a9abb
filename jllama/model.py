"""The forward pass of the whole model, as pure functions."""

import functools
from dataclasses import replace
from typing import Any, overload

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from jllama.cache import KVCache, cached_attention
from jllama.config import Backend, LlamaConfig
from jllama.kernels import (
    DECODE_QUERIES,
    SplitRows,
    Weight,
    affine,
    attend_and_write,
    attend_and_write_reference,
    attention,
    ffn,
    ffn_reference,
    finish_layer,
    matmul,
    project_and_attend,
    project_and_attend_reference,
    qkv,
    qkv_reference,
    rms_norm,
    rotate,
    split_heads,
    split_rows,
    takes_limbs,
)
from jllama.mesh.layout import DATA, MODEL, spec
from jllama.mesh.run import meshed, on_shards, specs
from jllama.paged import PagedCache
from jllama.params import Layer, Params
from jllama.rope import rotations
from jllama.step import Cache, last_token, whole_step


@overload
def forward(
    params: Params,
    tokens: jax.Array,
    cache: None = None,
    *,
    lengths: jax.Array | None = None,
    last_only: bool = False,
    backend: Backend = "auto",
) -> tuple[jax.Array, None]: ...
@overload
def forward[C: (KVCache, PagedCache)](
    params: Params,
    tokens: jax.Array,
    cache: C,
    *,
    lengths: jax.Array | None = None,
    last_only: bool = False,
    backend: Backend = "auto",
) -> tuple[jax.Array, C]: ...
def forward(
    params: Params,
    tokens: jax.Array,
    cache: Cache | None = None,
    *,
    lengths: jax.Array | None = None,
    last_only: bool = False,
    backend: Backend = "auto",
) -> tuple[jax.Array, Cache | None]:
    """Run the model on ``tokens`` [B, T]. Each row continues after the tokens that its row of ``cache`` holds.

    ``lengths`` [B] is the number of real tokens in each row (default: T). The rest of the row is right padding.
    Returns float32 logits and the cache with the new keys and values. The logits are [B, T, vocab_size]; with
    ``last_only`` they are [B, vocab_size], for the last real token of each row. The returned cache is None if no cache
    was given.
    """
    params = meshed(params, tokens)
    if params.mesh is not None:
        traced = any(isinstance(a, Tracer) for a in jax.tree.leaves((params, tokens, cache, lengths)))
        run = _on_mesh if traced else _jit_on_mesh  # without jit, every operation would be a program of all devices
        return run(params, tokens, cache, lengths, last_only=last_only, backend=backend)
    B, T = tokens.shape
    start = jnp.zeros(B, jnp.int32) if cache is None else cache.lengths
    lengths = jnp.full(B, T, jnp.int32) if lengths is None else lengths
    positions = start[:, None] + jnp.arange(T)[None]  # [B, T]
    op_by_op = functools.partial(blocks, backend=backend)
    arguments = params.embedded(tokens), params, cache, *rotations(positions, params.config), lengths
    if cache is not None and T <= DECODE_QUERIES:  # one launch, if a kernel supports it
        logits, cache = whole_step.try_kernel(op_by_op, *arguments, last_only=last_only, backend=backend)
    else:
        logits, cache = op_by_op(*arguments, last_only=last_only)
    return logits, None if cache is None else cache.advanced(start + lengths)


def _on_mesh(params: Params, tokens: jax.Array, cache: Cache | None, lengths: jax.Array | None, **how: Any) -> Any:
    """`forward` on every shard. The vocabulary of the logits is divided over the mesh."""
    mesh = params.mesh
    assert mesh is not None
    logits = spec(mesh, DATA, *(None,) * (not how["last_only"]), MODEL)

    def of_shard(shard: Params, tokens: jax.Array, cache: Cache | None, lengths: jax.Array | None) -> Any:
        return forward(shard, tokens, cache, lengths=lengths, **how)

    after = None if cache is None else cache.advanced(cache.lengths)
    return on_shards(of_shard, params, tokens, cache, lengths, out=(logits, specs(after, mesh)))


_jit_on_mesh = jax.jit(_on_mesh, static_argnames=("last_only", "backend"))


def blocks(
    x: jax.Array,  # [B, T, dim]
    params: Params,
    cache: Cache | None,
    cos: jax.Array,  # [B, T, head_dim / 2]
    sin: jax.Array,  # [B, T, head_dim / 2]
    lengths: jax.Array,  # [B]
    *,
    last_only: bool,
    backend: str,
) -> tuple[jax.Array, Cache | None]:
    """Run all layers and the head op by op. Returns the logits and the cache with the new keys and values; the cache
    lengths are not advanced."""
    start = jnp.zeros(x.shape[0], jnp.int32) if cache is None else cache.lengths
    norm = functools.partial(rms_norm, eps=params.config.norm_eps, backend=backend)
    layers = [params.layer(i) for i in range(params.config.n_layers)]
    norms = [layer.attn_norm for layer in layers] + [params.norm]
    split = [wants_limbs(x, layer, cache, params, backend) for layer in layers] + [False]
    h = norm(x, norms[0])
    h = split_rows(h) if split[0] else h
    for i, layer in enumerate(layers):
        out, cache = attend(h, layer, i, cache, start, (cos, sin), params.config, backend)
        if last_only and x.shape[1] > 1 and i + 1 == len(layers):  # the rest, and the head, for one token of each row
            out, x = (last_token(a, lengths)[:, None] for a in (out, x))
        x, h = finish(out, x, layer, norms[i + 1], params, backend, split=split[i + 1])

    assert not isinstance(h, SplitRows)  # the head takes no limbs
    h = h[:, 0] if last_only else h
    return matmul(h, params.head, out_dtype=jnp.float32, backend=backend), cache


def wants_limbs(x: jax.Array, layer: Layer, cache: Cache | None, params: Params, backend: str) -> bool:
    """Whether the norm before a layer should give its result in a second form, too: as limbs.

    The limbs of an array of floats are two int8 arrays with scales, whose weighted sum is nearly that array (see
    `SplitRows`). Tensor cores can multiply them with int8 weights without converting the weights to floats. One kernel
    does so for the product with wqkv. True is returned where it will run: in a decode step of few rows, with int8
    weights, on one device (the norm of a model that is divided over devices writes no limbs). x is what is normed
    [B, T, dim]."""
    stepped = cache is not None and x.shape[1] <= DECODE_QUERIES and params.axis is None
    backend = "auto" if backend == "pallas" else backend  # where the kernel is refused, the product itself says so
    return stepped and takes_limbs(x, layer.wqkv) and matmul.choose(backend, x, layer.wqkv).impl == "pallas"


def attend(
    h: jax.Array | SplitRows,  # [B, T, dim], normed
    layer: Layer,
    index: int,
    cache: Cache | None,
    start: jax.Array,  # [B]: the position of each row's first token
    rotation: tuple[jax.Array, jax.Array],
    config: LlamaConfig,
    backend: str,
) -> tuple[jax.Array, Cache | None]:
    """Attention of a block [B, T, heads * head_dim], and the cache with the new keys and values."""
    B, T, _ = h.shape
    if cache is not None and T <= DECODE_QUERIES:
        return attend_new(h, layer, index, cache, rotation, backend)
    assert not isinstance(h, SplitRows)  # see `wants_limbs`
    q, new, cache = project(h, layer, index, cache, start, rotation, config, backend)
    if cache is None:
        out = attention(q, *new, start, backend=backend)
    else:
        k, v, place = cache.arrays(index)
        out = cached_attention(q, k, v, cache.table, start, layer=place, backend=backend)
    return out.reshape(B, T, -1), cache


def attend_new(
    h: jax.Array | SplitRows,  # [B, T, dim]
    layer: Layer,
    index: int,
    cache: Cache,
    rotation: tuple[jax.Array, jax.Array],
    backend: str,
) -> tuple[jax.Array, Cache]:
    """Attention [B, T, heads * head_dim] of a few tokens over the cache, to which their keys and values are written."""
    attend = functools.partial(_attend_new_by_ops, backend=backend)
    by_ops = functools.partial(
        project_and_attend_reference, product=functools.partial(matmul, backend=backend), attend=attend
    )
    *arrays, place = cache.arrays(index)
    arguments = h, layer.wqkv, *arrays, cache.table, cache.lengths, *rotation
    out, k, v = project_and_attend.try_kernel(by_ops, *arguments, bias=layer.bqkv, layer=place, backend=backend)
    return out, cache.with_arrays(index, k, v)


def _attend_new_by_ops(*arguments: Any, layer: jax.Array | int | None, backend: str) -> Any:
    by_ops = functools.partial(attend_and_write_reference, attend=functools.partial(cached_attention, backend=backend))
    return attend_and_write.try_kernel(by_ops, *arguments, layer=layer, backend=backend)


def project(
    h: jax.Array,  # [B, T, dim]
    layer: Layer,
    index: int,
    cache: Cache | None,
    start: jax.Array,
    rotation: tuple[jax.Array, jax.Array],
    config: LlamaConfig,
    backend: str,
) -> tuple[jax.Array, tuple[jax.Array, ...], Cache | None]:
    """Project to queries, keys and values, and apply rotary. With a cache, the new keys and values are written to it;
    without one, they are returned as [B, kv_heads, T, head_dim]."""
    product = functools.partial(matmul, backend=backend)
    if cache is None:
        y = affine(product, h, layer.wqkv, layer.bqkv)
        q, k, v = split_heads(y, config.n_heads // config.n_kv_heads, config.head_dim)
        q, k = rotate(q, *rotation), rotate(k, *rotation)
        return q, (k.swapaxes(1, 2), v.swapaxes(1, 2)), None
    *arrays, place = cache.arrays(index)
    by_ops = functools.partial(qkv_reference, product=product)
    arguments = h, layer.wqkv, *arrays, start, *rotation
    how: dict[str, Any] = dict(bias=layer.bqkv, layer=place, table=cache.table, aligned=cache.aligned)
    q, k, v = qkv.try_kernel(by_ops, *arguments, **how, backend=backend)
    return q, (), cache.with_arrays(index, k, v)


def finish(
    out: jax.Array,  # [B, T, heads * head_dim]
    x: jax.Array,  # [B, T, dim]
    layer: Layer,
    norm: jax.Array,  # of the next layer, or of the head
    params: Params,
    backend: str,
    *,
    split: bool = False,
) -> tuple[jax.Array, jax.Array | SplitRows]:
    """The rest of a block: x [B, T, dim] after it, and the norm of x, with ``split`` also in limbs. Kernels have all of
    it for the rows of a batched step; else it runs op by op, as on a shard, or with biases."""
    by_ops = functools.partial(_finish_by_ops, layer=layer, params=params, backend=backend)
    arguments = out, x, layer.wo, layer.ffn_norm, layer.w_gate_up, layer.w_down, norm
    if params.axis is not None or params.config.attention_bias or params.config.mlp_bias:
        return by_ops(*arguments, eps=params.config.norm_eps, split=split)
    return finish_layer.try_kernel(by_ops, *arguments, eps=params.config.norm_eps, split=split, backend=backend)


def _finish_by_ops(
    out: jax.Array,
    x: jax.Array,
    wo: Weight,
    ffn_norm: jax.Array,
    w_gate_up: Weight,
    w_down: Weight,
    norm: jax.Array,
    *,
    eps: float,
    split: bool,
    layer: Layer,  # its biases
    params: Params,
    backend: str,
) -> tuple[jax.Array, jax.Array | SplitRows]:
    product = functools.partial(matmul, backend=backend)
    if params.axis is not None:
        product = functools.partial(summed, axis=params.axis, backend=backend)
    x = affine(product, out, wo, layer.bo, residual=x)
    layer = replace(layer, ffn_norm=ffn_norm, w_gate_up=w_gate_up, w_down=w_down)
    x = feed_forward(x, layer, params, backend)
    h = rms_norm(x, norm, eps=eps, backend=backend)
    return x, split_rows(h) if split else h


def feed_forward(x: jax.Array, layer: Layer, params: Params, backend: str) -> jax.Array:
    """The other half of a block: x [B, T, dim] -> the same. With biases, which no kernel of it adds, op by op."""
    arguments, eps = (x, layer.ffn_norm, layer.w_gate_up, layer.w_down), params.config.norm_eps
    if params.axis is not None:
        part = _ffn(arguments, layer.b_gate_up, None, eps=eps, backend=backend, residual=False)
        y = lax.psum(part, params.axis)
        return x + (y if layer.b_down is None else y + layer.b_down)
    return _ffn(arguments, layer.b_gate_up, layer.b_down, eps=eps, backend=backend)


def _ffn(arguments: tuple, first: jax.Array | None, second: jax.Array | None, *, backend: str, **how: Any) -> jax.Array:
    if first is None:
        return ffn(*arguments, backend=backend, **how)
    by_ops = functools.partial(ffn_reference, product=functools.partial(matmul, backend=backend))
    return ffn.try_kernel(by_ops, *arguments, biases=(first, second), backend=backend, **how)


def summed(x: jax.Array, w: Weight, *, residual: jax.Array | None = None, axis: str, **how: Any) -> jax.Array:
    """`matmul` where every shard along ``axis`` has a part of x's features and of w's inputs."""
    y = lax.psum(matmul(x, w, **how), axis)
    return y if residual is None else residual + y

"""The QKV product of many rows with its rotary and cache write, in one launch: `wide` with another end."""

import functools
from typing import Any

import jax

from ...layer_view import layer_index
from ..common.tiles import Weight, data_and_scale, format_of, sm_count
from .large_m import launch, whole_tiles
from .large_m_plan import Problem, Rotary, WideTiles, tiles_for
from .large_m_rotary import tables


def wide_qkv(
    x: jax.Array,
    w: Weight,
    k: jax.Array,
    v: jax.Array,
    start: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    layer: jax.Array | int | None = None,
    cache_layer: jax.Array | int | None = None,
    tiles: WideTiles | None = None,
    sms: int | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`qkv_reference`; with ``layer`` w is stacked, with ``cache_layer`` the cache. Inside a jit that owns the cache,
    this is changed in place."""
    sms = sms or sm_count()
    tiles = tiles or tiles_for(format_of(w), x.shape[0] * x.shape[1], w.shape[-2], False, sms)
    return _wide_qkv(
        x, w, layer_index(layer), k, v, layer_index(cache_layer), start, cos, sin,
        tiles=tiles, sms=sms, interpret=interpret,
    )  # fmt: skip


# Compiled as a function of its own: the layers of a model then share one trace and one lowering.
@functools.partial(jax.jit, static_argnames=("interpret", "sms", "tiles"))
def _wide_qkv(x: jax.Array, w: Weight, layer: jax.Array, k: jax.Array, v: jax.Array, cache_layer: jax.Array,
              start: jax.Array, cos: jax.Array, sin: jax.Array, *, tiles: WideTiles, sms: int,
              interpret: Any) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    (B, T, inner), (*_, kv_heads, max_len, D) = x.shape, k.shape
    rotary = Rotary(head_dim=D, heads=w.shape[-2] // D - 2 * kv_heads, kv_heads=kv_heads, batch=B, tokens=T)
    x, cos, sin = (whole_tiles(a.reshape(B * T, -1), tiles) for a in (x, cos, sin))
    problem = Problem(
        fmt=format_of(w),
        rows=x.shape[0],
        inner=inner,
        out=w.shape[-2],
        dtype=x.dtype,
        out_dtype=k.dtype,
        rotary=rotary,
    )
    data, scale = data_and_scale(w)
    arguments = {"layer": layer, "x": x, "w": data, "scale": scale, "cache_layer": cache_layer, "start": start}
    arguments["cos"], arguments["sin"] = tables(cos, sin)
    planes = {name: jax.new_ref(a.reshape(-1, max_len, D)) for name, a in (("k", k), ("v", v))}
    q = launch(problem, tiles, sms, interpret, arguments | planes)
    k, v = (jax.freeze(ref).reshape(k.shape) for ref in planes.values())
    return q[: B * T].reshape(B, T, rotary.heads, D), k, v

"""The QKV product of many rows with its rotary and cache write, in one launch: `pallas_kernels.wide` with another end."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.indexed import layer_index
from pallas_kernels.tiles import Weight, format_of, sm_count, split
from pallas_kernels.wide import launch, whole_tiles
from pallas_kernels.wide_plan import Problem, Rotary, WideTiles, tiles_for


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
    """`qkv_reference`; with ``layer`` w is stacked, with ``cache_layer`` the cache. Inside a jit that owns the cache, it
    is changed in place."""
    stacked = k.ndim == 5
    k, v = (a if stacked else a[None] for a in (k, v))
    sms = sms or sm_count()
    B, T, _ = x.shape
    tiles = tiles or tiles_for(format_of(w), B * T, w.shape[-2] // 2, False, sms, rotary=True)
    q, k, v = _wide_qkv(
        x, w, layer_index(layer), k, v, layer_index(cache_layer), start, cos, sin,
        tiles=tiles, sms=sms, interpret=interpret,
    )  # fmt: skip
    return (q, k, v) if stacked else (q, k[0], v[0])


# Compiled as a function of its own: the layers of a model then share one trace and one lowering.
@functools.partial(jax.jit, static_argnames=("interpret", "sms", "tiles"))
def _wide_qkv(x: jax.Array, w: Weight, layer: jax.Array, k: jax.Array, v: jax.Array, cache_layer: jax.Array,
              start: jax.Array, cos: jax.Array, sin: jax.Array, *, tiles: WideTiles, sms: int,
              interpret: Any) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    (B, T, inner), (_, _, kv_heads, _, D) = x.shape, k.shape
    rotary = Rotary(head_dim=D, heads=w.shape[-2] // D - 2 * kv_heads, kv_heads=kv_heads, batch=B, tokens=T)
    x = whole_tiles(x.reshape(B * T, inner), tiles)
    problem = Problem(
        fmt=format_of(w),
        rows=x.shape[0],
        inner=inner,
        out=w.shape[-2] // 2,
        dtype=x.dtype,
        out_dtype=k.dtype,
        rotary=rotary,
    )

    def of_pairs(table: jax.Array) -> jax.Array:
        """[B, T, D / 2] as [pairs of a tile, rows]: as the sums lie in registers."""
        table = whole_tiles(table.reshape(B * T, rotary.pairs), tiles).astype(jnp.float32)
        return jnp.tile(table.T, (tiles.out // rotary.pairs, 1))

    data, scale = split(w)
    arguments = {"layer": layer, "x": x, "w": data, "scale": None if scale is None else in_tiles(scale, rotary, tiles)}
    arguments |= {"cache_layer": cache_layer, "start": start.astype(jnp.int32)}
    arguments |= {"cos": of_pairs(cos), "sin": of_pairs(sin), "k": jax.new_ref(k), "v": jax.new_ref(v)}
    q = launch(problem, tiles, sms, interpret, arguments)
    return q[: B * T].reshape(B, T, rotary.heads, D), jax.freeze(arguments["k"]), jax.freeze(arguments["v"])


def in_tiles(scale: jax.Array, rotary: Rotary, tiles: WideTiles) -> jax.Array:
    """Scales [layers, out, groups] in the order in which a tile has its weights: all first halves of heads, then all
    second ones. Where a tile is one head nothing moves."""
    L, _, groups = scale.shape
    heads = tiles.out // rotary.pairs
    return scale.reshape(L, -1, heads, 2, rotary.pairs, groups).swapaxes(2, 3).reshape(scale.shape)

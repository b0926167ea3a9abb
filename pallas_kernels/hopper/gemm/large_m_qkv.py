"""The QKV product of many rows with rotary embedding and cache write: a large-M GEMM with another epilogue."""

import functools
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl

from ...arch import planned
from ...layer_view import layer_index
from ..common.tiles import Weight, data_and_scale, format_of
from .large_m import launch, pad_to_tiles
from .large_m_cache import page_places
from .large_m_plan import LargeMProblem, LargeMTiles, Rotary, tiles_for
from .large_m_rotary import tables


def large_m_qkv(
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
    table: jax.Array | None = None,
    tiles: LargeMTiles | None = None,
    sms: int | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`qkv_reference`; with ``layer`` w is stacked, with ``cache_layer`` the cache, with ``table`` it has pages. Inside
    a jit that owns the cache, it is changed in place."""
    sms = sms or planned().sms
    tiles = tiles or tiles_for(format_of(w), x.shape[0] * x.shape[1], w.shape[-2], False, sms)
    return _qkv(
        x, w, layer_index(layer), k, v, layer_index(cache_layer), start, cos, sin, table,
        tiles=tiles, sms=sms, interpret=interpret,
    )  # fmt: skip


# A jit of its own: all layers of a model share one trace and one lowering.
@functools.partial(jax.jit, static_argnames=("interpret", "sms", "tiles"))
def _qkv(x: jax.Array, w: Weight, layer: jax.Array, k: jax.Array, v: jax.Array, cache_layer: jax.Array,
         start: jax.Array, cos: jax.Array, sin: jax.Array, table: jax.Array | None, *, tiles: LargeMTiles, sms: int,
         interpret: Any) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    (B, T, inner), (*_, cached, kv_heads, max_len, D) = x.shape, k.shape
    rotary = Rotary(
        head_dim=D,
        heads=w.shape[-2] // D - 2 * kv_heads,
        kv_heads=kv_heads,
        batch=B,
        tokens=T,
        pages=None if table is None else cached,
    )
    x, cos, sin = (pad_to_tiles(a.reshape(B * T, -1), tiles) for a in (x, cos, sin))
    problem = LargeMProblem(
        fmt=format_of(w),
        rows=x.shape[0],
        inner=inner,
        out=w.shape[-2],
        dtype=x.dtype,
        out_dtype=k.dtype,
        rotary=rotary,
    )
    data, scale = data_and_scale(w)
    arguments = {"layer": layer, "x": x, "w": data, "scale": scale, "cache_layer": cache_layer}
    if table is None:
        arguments["start"] = start
    else:
        arguments["places"] = page_places(table, start, cached, max_len, problem, tiles.chunk)
    arguments["cos"], arguments["sin"] = tables(cos, sin)
    state = {name: a.reshape(-1, max_len, D) for name, a in (("k", k), ("v", v))}
    state["q"] = lax.empty((problem.rows, problem.columns), dtype=problem.out_dtype)

    def write(refs: dict[str, Any]) -> None:
        q = refs.pop("q")
        q[...] = launch(problem, tiles, sms, interpret, arguments | refs)

    # Not jax.new_ref: a function with such effects has no rule under jax.custom_jvp.
    done = pl.run_state(write)(state)
    return done["q"][: B * T].reshape(B, T, rotary.heads, D), done["k"].reshape(k.shape), done["v"].reshape(k.shape)

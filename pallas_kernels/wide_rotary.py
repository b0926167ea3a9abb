"""What ends a QKV product: heads are turned, queries written, keys and values put into the cache."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.wide_plan import Rotary

Refs = dict[str, Any]
Angles = tuple[jax.Array, jax.Array]  # cosines and sines, each [outputs, tokens]


def tables(cos: jax.Array, sin: jax.Array) -> Angles:
    """cos and sin [rows, D / 2] as [D, rows] float32, the way sums lie in registers: an output is
    ``it * cos + its partner, half a head away, * sin``."""
    cos, sin = cos.astype(jnp.float32).T, sin.astype(jnp.float32).T
    return jnp.concatenate([cos, cos]), jnp.concatenate([-sin, sin])


def angles(refs: Refs, rotary: Rotary, out: Any, row: Any, shape: tuple[int, ...]) -> Angles:
    """What turns a tile of ``shape`` from output ``out`` and token ``row`` on."""
    outputs, tokens = (pl.ds(first, n) for first, n in zip((lax.rem(out, rotary.head_dim), row), shape, strict=True))
    cos, sin = (
        plgpu.load(refs[name].at[outputs, tokens], layout=plgpu.Layout.WGMMA, optimized=False)
        for name in ("cos", "sin")
    )
    return cos, sin


def turned(values: jax.Array, partners: jax.Array, by: Angles) -> jax.Array:
    """A part of a head, given what lies half a head away."""
    cos, sin = by
    return values * cos + partners * sin


def put(refs: Refs, rotary: Rotary, place: Any, out: Any, row: Any) -> None:
    """Copy ``place`` [tokens, outputs], a head or half of one, to where it belongs.

    Chunks behind the last token go past the cache's end, where nothing is written: each to a place of its own."""
    tokens, width = place.shape
    rows = rotary.batch * rotary.tokens
    columns = pl.ds(lax.rem(out, rotary.head_dim), width)
    kv = lax.div(out, rotary.head_dim) - rotary.heads  # k's heads, then v's
    _, max_len, _ = refs["k"].shape

    first = jnp.minimum(row, rows - 1)
    sequence = lax.div(first, rotary.tokens)
    slot = jnp.where(row < rows, refs["start"][sequence] + lax.rem(first, rotary.tokens), max_len + row)

    @pl.when(kv < 0)
    def _() -> None:
        plgpu.copy_smem_to_gmem(place, refs["out"].at[pl.ds(row, tokens), pl.ds(out, width)])

    def cache(name: str, head: Any) -> None:
        plane = (refs["cache_layer"][0] * rotary.batch + sequence) * rotary.kv_heads + head
        plgpu.copy_smem_to_gmem(place, refs[name].at[plane, pl.ds(slot, tokens), columns])

    pl.when((kv >= 0) & (kv < rotary.kv_heads))(lambda: cache("k", kv))
    pl.when(kv >= rotary.kv_heads)(lambda: cache("v", kv - rotary.kv_heads))

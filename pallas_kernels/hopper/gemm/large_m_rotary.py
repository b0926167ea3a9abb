"""What ends a QKV product: heads are turned, queries written, keys and values put into the cache."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .large_m_exchange import Trade
from .large_m_plan import Refs, Rotary

Angles = tuple[jax.Array, jax.Array]  # cosines and sines, each [outputs, tokens]


def tables(cos: jax.Array, sin: jax.Array) -> Angles:
    """cos and sin [rows, D / 2] as [D, rows] float32, the way sums lie in registers: a turned output is
    ``it * cos + its partner, half a head away, * sin``."""
    cos, sin = cos.astype(jnp.float32).T, sin.astype(jnp.float32).T
    return jnp.concatenate([cos, cos]), jnp.concatenate([-sin, sin])


def angles(refs: Refs, rotary: Rotary, out: Any, row: Any, shape: tuple[int, int]) -> Angles:
    """What turns a chunk of ``shape`` from output ``out`` and token ``row`` on."""
    outputs, tokens = pl.ds(lax.rem(out, rotary.head_dim), shape[0]), pl.ds(row, shape[1])
    cos, sin = (
        plgpu.load(refs[name].at[outputs, tokens], layout=plgpu.Layout.WGMMA, optimized=False)
        for name in ("cos", "sin")
    )
    return cos, sin


def finish(refs: Refs, rotary: Rotary, chunks: list[jax.Array], by: Angles, out: Any, row: Any, trade: Trade,
           write: Callable[[int, jax.Array, Callable[[Any], None]], None]) -> None:  # fmt: skip
    """Turn the ``chunks`` of sums [outputs, tokens] from ``out`` and ``row`` on, the first by ``by``, and ``write``
    them: a head or half of one, of q and k; v stays as it is."""
    (width, tokens), count = chunks[0].shape, len(chunks)

    def to_cache(name: str, i: int, place: Any) -> None:
        target = place_of(refs, rotary, name, out, row + i * tokens, place.shape)
        plgpu.copy_smem_to_gmem(place, target)

    def to_queries_or_keys(i: int, place: Any) -> None:
        target = refs["out"].at[pl.ds(row + i * tokens, tokens), pl.ds(out, width)]
        pl.when(out < rotary.queries)(lambda: plgpu.copy_smem_to_gmem(place, target))
        pl.when(out >= rotary.queries)(lambda: to_cache("k", i, place))

    @pl.when(out >= rotary.turned)
    def _() -> None:
        for i, chunk in enumerate(chunks):
            write(i, chunk, functools.partial(to_cache, "v", i))

    @pl.when(out < rotary.turned)
    def _() -> None:
        """Chunks are given, and angles fetched, before the previous ones are written."""
        (cos, sin), given = by, 0
        for i, chunk in enumerate(chunks):
            while given < min(i + trade.slots, count):
                trade.give(chunks[given], given)
                given += 1
            value = chunk * cos + trade.take(i) * sin
            if i + 1 < count:
                cos, sin = angles(refs, rotary, out, row + (i + 1) * tokens, chunk.shape)
            write(i, value, functools.partial(to_queries_or_keys, i))
        trade.end(count)


def place_of(refs: Refs, rotary: Rotary, name: str, out: Any, row: Any, shape: tuple[int, int]) -> Any:
    """Where in the cache ``name`` a chunk [tokens, outputs] belongs that is a key or a value.

    Chunks behind the last token go past the cache's end, where nothing is written: each to a place of its own."""
    (tokens, width), rows = shape, rotary.batch * rotary.tokens
    first = jnp.minimum(row, rows - 1)
    sequence = lax.div(first, rotary.tokens)
    slot = jnp.where(row < rows, refs["start"][sequence] + lax.rem(first, rotary.tokens), refs[name].shape[1] + row)
    head = lax.div(out, rotary.head_dim) - rotary.heads - (rotary.kv_heads if name == "v" else 0)
    plane = (refs["cache_layer"][0] * rotary.batch + sequence) * rotary.kv_heads + head
    return refs[name].at[plane, pl.ds(slot, tokens), pl.ds(lax.rem(out, rotary.head_dim), width)]

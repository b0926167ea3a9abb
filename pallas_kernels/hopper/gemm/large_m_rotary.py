"""Rotary epilogue of a QKV product: q and k are rotated, q is written, k and v are put into the cache."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .large_m_block import Operands
from .large_m_cache import CachedHead, Found, find_in_pages
from .large_m_exchange import Exchange
from .large_m_plan import Rotary

Angles = tuple[jax.Array, jax.Array]  # cosines and sines, each [outputs, tokens]
# ``write(i, value, copy)``: put chunk ``i`` into shared memory in the order of the result, and ``copy`` it from there.
Write = Callable[[int, jax.Array, Callable[[Any], None]], None]


def tables(cos: jax.Array, sin: jax.Array) -> Angles:
    """cos and sin [rows, D / 2] as [D, rows] float32, the order of sums in registers.

    A rotated output is ``sum * cos + partner * sin``. Its partner is the sum half a head away. The sign of rotate-half
    is in the table."""
    cos, sin = cos.astype(jnp.float32).T, sin.astype(jnp.float32).T
    return jnp.concatenate([cos, cos]), jnp.concatenate([-sin, sin])


def load_angles(operands: Operands, rotary: Rotary, out: Any, row: Any, shape: tuple[int, int]) -> Angles:
    """The angles of a chunk of ``shape`` from output ``out`` and token ``row`` on."""
    outputs, tokens = pl.ds(lax.rem(out, rotary.head_dim), shape[0]), pl.ds(row, shape[1])
    cos, sin = (
        plgpu.load(table.at[outputs, tokens], layout=plgpu.Layout.WGMMA, optimized=False)
        for table in (operands.cos, operands.sin)
    )
    return cos, sin


def rotary_epilogue(operands: Operands, rotary: Rotary, chunks: list[jax.Array], angles: Angles, out: Any, row: Any,
                    exchange: Exchange, write: Write) -> None:  # fmt: skip
    """Write the ``chunks`` of sums [outputs, tokens] from output ``out`` and token ``row`` on: a head, or half of one.

    q and k are rotated, the first chunk by ``angles``. v stays as it is."""
    (width, tokens), count = chunks[0].shape, len(chunks)

    def find(i: int) -> Found | None:
        return find_in_pages(operands, row + i * tokens, tokens)

    def to_cache(cache: Any, key_heads: int, i: int, found: Found | None, place: Any) -> None:
        head = CachedHead(operands, rotary, cache, key_heads, out)
        shape = place.shape
        target = head.slots(row + i * tokens, shape) if found is None else head.slots_in_page(found, shape)
        plgpu.copy_smem_to_gmem(place, target)

    def to_queries_or_keys(i: int, found: Found | None, place: Any) -> None:
        target = operands.out.at[pl.ds(row + i * tokens, tokens), pl.ds(out, width)]
        pl.when(out < rotary.queries)(lambda: plgpu.copy_smem_to_gmem(place, target))
        pl.when(out >= rotary.queries)(lambda: to_cache(operands.k, 0, i, found, place))

    @pl.when(out >= rotary.rotated)
    def _() -> None:
        for i, chunk in enumerate(chunks):
            write(i, chunk, functools.partial(to_cache, operands.v, rotary.kv_heads, i, find(i)))

    @pl.when(out < rotary.rotated)
    def _() -> None:
        """A chunk is sent, and its angles are loaded, before the chunk before it is written."""
        (cos, sin), sent = angles, 0
        for i, chunk in enumerate(chunks):
            while sent < min(i + exchange.slots, count):
                exchange.send(chunks[sent], sent)
                sent += 1
            found = find(i)
            value = chunk * cos + exchange.receive(i) * sin
            if i + 1 < count:
                cos, sin = load_angles(operands, rotary, out, row + (i + 1) * tokens, chunk.shape)
            write(i, value, functools.partial(to_queries_or_keys, i, found))
        exchange.finish(count)

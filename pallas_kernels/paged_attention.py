"""Causal attention over a paged cache. A sequence's keys are in pages, in any order, and a table lists them.

Position ``p`` of row ``b`` is slot ``p % size`` of page ``table[b, p // size]``. Rows may name the same page. That is
how sequences share a prefix, and how one sequence has several rows of queries in one call. As in `attention`, query
``i`` of row ``b`` has position ``start[b] + i`` and sees positions ``0 .. start[b] + i``. Pages after that position are
never read, so their table entries do not matter. An entry past the last page means that there is no page.
"""

from typing import Any

import jax

from .attention import DECODE_QUERIES, attention_reference
from .dispatch import Kernel, Op
from .hopper.attention import decode, prefill

PAGE = 64  # positions per page: a tile of keys of the attention kernels, so that each tile needs one lookup


def paged_attention_reference(
    q: jax.Array,  # [B, T, heads, D]
    k: jax.Array,  # [layers, pages, kv_heads, size, D]
    v: jax.Array,  # [layers, pages, kv_heads, size, D]
    table: jax.Array,  # [B, P] int32
    start: jax.Array,  # [B]
    *,
    layer: jax.Array | int,
) -> jax.Array:
    """-> [B, T, heads, D]; softmax in float32. The kernels do without the gathered copy of keys and values."""
    return attention_reference(q, gather(k, table, layer), gather(v, table, layer), start)


def gather(pages: jax.Array, table: jax.Array, layer: jax.Array | int) -> jax.Array:
    """[B, kv_heads, P * size, D]: the pages of every row, side by side."""
    rows = pages.at[layer, table].get(mode="clip")  # [B, P, kv_heads, size, D]
    B, P, kv_heads, size, D = rows.shape
    return rows.swapaxes(1, 2).reshape(B, kv_heads, P * size, D)


def _kernel(queries: int) -> Kernel:
    """As for contiguous keys, few queries a row are bound by the bytes of the cache, many by arithmetic."""
    if queries <= DECODE_QUERIES:
        return Kernel(decode.flash_decode_paged, decode.check_paged)
    return Kernel(prefill.flash_attention_paged, prefill.check_paged)


def _check(q: jax.Array, *args: Any, **kwargs: Any) -> None:
    check = _kernel(q.shape[1]).check
    assert check is not None
    check(q, *args, **kwargs)


def _run(q: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
    return _kernel(q.shape[1]).run(q, *args, **kwargs)


paged_attention = Op("paged_attention", paged_attention_reference, {"hopper": Kernel(_run, _check)})

CASES = {
    "7b": dict(heads=32, kv_heads=32, head_dim=128, size=PAGE),
    "70b": dict(heads=64, kv_heads=8, head_dim=128, size=PAGE),
    "tinyllama": dict(heads=32, kv_heads=4, head_dim=64, size=PAGE),
}

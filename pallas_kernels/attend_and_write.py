"""What stands between the QKV product and the o product of a decode step: rotary, the cache write and attention.

As in `attention`, query ``i`` of row ``b`` has position ``start[b] + i`` and sees positions ``0 .. start[b] + i``, its
own key among them. The cache is contiguous or, with a table, paged. Rows may share pages (see `paged_attention`), but
none may read what another writes: the kernel reads the cache as it was before the call.
"""

from collections.abc import Callable

import jax

from .attention import attention_reference
from .dispatch import Kernel, Op
from .hopper.attention.decode import check_and_write, flash_decode_and_write
from .paged_attention import PAGE, paged_attention_reference
from .qkv import rotate, split_heads, write_cache


def _attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    table: jax.Array | None,
    start: jax.Array,
    *,
    layer: jax.Array | int | None,
) -> jax.Array:
    if table is not None:
        assert layer is not None
        return paged_attention_reference(q, k, v, table, start, layer=layer)
    k, v = (k, v) if layer is None else (k[layer], v[layer])
    return attention_reference(q, k, v, start)


def attend_and_write_reference(
    y: jax.Array,  # [B, T, (heads + 2 * kv_heads) * D]: the heads of q, k and v, before rotary
    k: jax.Array,  # [layers, pages, kv_heads, size, D]; without a table [layers, B, kv_heads, S, D]
    v: jax.Array,
    table: jax.Array | None,  # [B, P] int32
    start: jax.Array,  # [B]
    cos: jax.Array,  # [B, T, D / 2]
    sin: jax.Array,
    *,
    layer: jax.Array | int | None,  # None, without a table: k and v are of one layer, [B, kv_heads, S, D]
    attend: Callable[..., jax.Array] = _attention,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """-> [B, T, heads * D], and the cache with the new keys and values; positions without room are dropped. ``attend``
    is the attention of q [B, T, heads, D] over the new cache."""
    kv_heads, D = k.shape[-3], k.shape[-1]
    q, k_new, v_new = split_heads(y, y.shape[-1] // D // kv_heads - 2, D)
    q, new = rotate(q, cos, sin), (rotate(k_new, cos, sin), v_new)
    k, v = (write_cache(a, b, table, start, layer) for a, b in zip((k, v), new, strict=True))
    out = attend(q, k, v, table, start, layer=layer)
    return out.reshape(*y.shape[:2], -1), k, v


attend_and_write = Op(
    "attend_and_write", attend_and_write_reference, {"hopper": Kernel(flash_decode_and_write, check_and_write)}
)

CASES = {
    "7b": dict(heads=32, kv_heads=32, head_dim=128, size=PAGE),
    "llama3-8b": dict(heads=32, kv_heads=8, head_dim=128, size=PAGE),
    "70b": dict(heads=64, kv_heads=8, head_dim=128, size=PAGE),
    "tinyllama": dict(heads=32, kv_heads=4, head_dim=64, size=PAGE),
}

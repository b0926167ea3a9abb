"""The QKV product and what always follows it: the rotary embedding, and the cache write of new keys and values."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .dispatch import Kernel, Op, Unsupported
from .hopper.common.tiles import Weight
from .hopper.gemm.large_m import check_large_m
from .hopper.gemm.large_m_plan import LargeMTiles
from .hopper.gemm.large_m_qkv import large_m_qkv
from .layer_view import LayerView, stack_of
from .matmul import NO_BIAS, affine, matmul_reference

Result = tuple[jax.Array, jax.Array, jax.Array]
START_MULTIPLE = LargeMTiles.chunk  # where the kernel can begin in a page
FEW_ROWS = 64  # of a prompt: then product, rotation and cache write are three steps


def qkv_reference(
    x: jax.Array,
    w: Weight,
    k: jax.Array,
    v: jax.Array,
    start: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    bias: jax.Array | None = None,
    layer: jax.Array | int | None = None,
    table: jax.Array | None = None,
    aligned: bool = False,
    product: Callable[..., jax.Array] = matmul_reference,
) -> Result:
    """x [B, T, dim], w [(heads + 2 * kv_heads) * D, dim], k and v [B, kv_heads, S, D] of a cache (with ``layer``:
    [layers, ...]), start [B], cos and sin [B, T, D / 2] of the tokens' positions -> q [B, T, heads, D], and the cache
    with the new keys and values from ``start`` on. Tokens past its end are dropped. ``bias``, where there is one, is
    [(heads + 2 * kv_heads) * D]. ``product`` does the matmul. With ``table`` [B, P] the cache is paged, k and v are
    [layers, pages, kv_heads, size, D], and tokens without a page are dropped: see `write_pages`. With ``aligned``,
    every ``start`` is a multiple of `START_MULTIPLE`: the kernel needs that of pages.

    The slots of a row after its new tokens are free: the kernel may write there, too."""
    del aligned
    kv_heads, _, D = k.shape[-3:]
    q, k_new, v_new = split_heads(affine(product, x, w, bias), w.shape[0] // D // kv_heads - 2, D)
    k, v = (write_cache(a, new, table, start, layer) for a, new in ((k, rotate(k_new, cos, sin)), (v, v_new)))
    return rotate(q, cos, sin), k, v


def split_heads(y: jax.Array, shared: int, head_dim: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Split the product [B, T, all heads * D] into the heads of q, k and v; ``shared`` query heads share a key head.
    Head counts come from the array's shape, so the same code runs on a shard with some of the heads."""
    heads = y.reshape(*y.shape[:-1], -1, head_dim)
    kv_heads = heads.shape[-2] // (shared + 2)
    q, k, v = jnp.split(heads, [shared * kv_heads, (shared + 1) * kv_heads], axis=-2)
    return q, k, v


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the pairs (i, i + D / 2) of x [B, T, heads, D] by cos and sin [B, T, D / 2], in float32."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def write_cache(
    cache: jax.Array, new: jax.Array, table: jax.Array | None, start: jax.Array, layer: jax.Array | int | None
) -> jax.Array:
    """`write` without a table, `write_pages` with one."""
    if table is None:
        return write(cache, new, start, layer)
    assert layer is not None
    return write_pages(cache, new, table, start, layer)


def write(cache: jax.Array, new: jax.Array, start: jax.Array, layer: jax.Array | int | None = None) -> jax.Array:
    """``cache`` [B, kv_heads, S, D], or ``layer`` of [layers, ...], with new [B, T, kv_heads, D] from ``start`` [B] on.
    Tokens past its end are dropped."""
    B, T = new.shape[:2]
    rows, slots = jnp.arange(B)[:, None], start[:, None] + jnp.arange(T)[None]  # [B, 1], [B, T]
    if layer is not None:
        return put_tokens(cache, new, layer, rows, slots)
    written = cache.at[rows, :, slots].set(new.astype(cache.dtype), mode="drop", unique_indices=True)
    # Attention reads what is written here. Without the barrier, XLA's CPU backend also fuses the write into that read:
    # every layer is then copied and written twice.
    return lax.optimization_barrier(written)


def write_pages(
    pages: jax.Array,  # [layers, pages, kv_heads, size, D]
    new: jax.Array,  # [B, T, kv_heads, D]
    table: jax.Array,  # [B, P] int32
    start: jax.Array,  # [B]
    layer: jax.Array | int,
) -> jax.Array:
    """``pages`` with ``new`` at positions ``start`` and after. Positions without a page are dropped."""
    B, T = new.shape[:2]
    count, size = pages.shape[1], pages.shape[3]
    position = start[:, None] + jnp.arange(T)  # [B, T]
    page = jnp.take_along_axis(table, position // size, axis=1, mode="fill", fill_value=count)
    # The scatter promises unique indices, so indices outside must differ, too.
    nowhere = count + jnp.arange(B * T, dtype=page.dtype).reshape(B, T)
    page = jnp.where((page >= 0) & (page < count), page, nowhere)
    written = put_tokens(pages, new, layer, page, position % size)
    # The barrier keeps XLA's CPU backend from fusing the write into the read that follows.
    return jax.lax.optimization_barrier(written)


def put_tokens(
    cache: jax.Array, new: jax.Array, layer: jax.Array | int, rows: jax.Array, slots: jax.Array
) -> jax.Array:
    """``cache`` [layers, rows, kv_heads, slots, D] with new [B, T, kv_heads, D], each token in its row and slot [B, T].
    No two tokens may have the same place. A token whose place lies outside is dropped."""
    # Every axis but the last has an index, in the order of the axes. With a slice among them, XLA's GPU backend
    # transposes the cache before it writes, and that copies all of it.
    places = cache.at[layer, rows[:, :, None], jnp.arange(new.shape[2]), slots[:, :, None]]
    return places.set(new.astype(cache.dtype), mode="drop", unique_indices=True)


def check_qkv(
    x: jax.Array,
    w: Weight | LayerView,
    k: jax.Array,
    v: jax.Array,
    start: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    bias: jax.Array | None = None,
    layer: jax.Array | int | None = None,
    table: jax.Array | None = None,
    aligned: bool = False,
) -> None:
    """Raise `Unsupported` where `qkv_kernel` cannot run."""
    if bias is not None:
        raise Unsupported(NO_BIAS)
    w, _ = stack_of(w)
    (B, T, inner), (cached, kv_heads, size, D) = x.shape, k.shape[-4:]
    cached = cached if table is None else table.shape[0]
    rows, chunk = math.prod(x.shape[:2]), LargeMTiles.chunk
    if rows <= FEW_ROWS:
        raise Unsupported(f"{rows} rows: smaller GEMMs take up to {FEW_ROWS}")
    if D not in (64, 128):
        raise Unsupported(f"head_dim must be 64 or 128, found {D}")
    if k.shape != v.shape or k.ndim != (4 if layer is None else 5) or (cached, *start.shape) != (B, B):
        found = f"found x {x.shape}, start {start.shape}, k {k.shape} and v {v.shape}"
        raise Unsupported(f"k and v must have one shape, and x, start and the cache one batch size: {found}")
    if table is not None and size % chunk:
        raise Unsupported(f"pages of {size} positions: must hold a multiple of {chunk}")
    if table is not None and not aligned:
        raise Unsupported(f"rows may start anywhere in a page: must be known to start at multiples of {chunk}")
    if not x.dtype == k.dtype == v.dtype:
        raise Unsupported(f"activations and cache must have one dtype, found {x.dtype}, {k.dtype} and {v.dtype}")
    if cos.shape != sin.shape or cos.shape != (B, T, D // 2):
        raise Unsupported(f"cos {cos.shape} and sin {sin.shape} are not {(B, T, D // 2)}")
    if B > 1 and T % chunk:
        raise Unsupported(f"{T} tokens of {B} sequences: with several sequences, expected a multiple of {chunk}")
    if w.shape[-2] % D or w.shape[-2] <= 2 * kv_heads * D:
        raise Unsupported(f"{w.shape[-2]} outputs are not q's heads and 2 x {kv_heads} heads of {D}")
    check_large_m(jax.ShapeDtypeStruct((rows, inner), x.dtype), w)


def qkv_kernel(
    x: jax.Array,
    w: Weight | LayerView,
    k: jax.Array,
    v: jax.Array,
    start: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    bias: None = None,
    layer: jax.Array | int | None = None,
    table: jax.Array | None = None,
    aligned: bool = False,
    **options: Any,
) -> Result:
    """`qkv_reference` in one launch; ``options`` are those of `large_m_qkv`."""
    del aligned  # see `check_qkv`
    w, index = stack_of(w)
    return large_m_qkv(x, w, k, v, start, cos, sin, layer=index, cache_layer=layer, table=table, **options)


qkv = Op("qkv", qkv_reference, {"hopper": Kernel(qkv_kernel, check_qkv)})

CASES = {
    "7b": dict(dim=4096, heads=32, kv_heads=32, head_dim=128),
    "13b": dict(dim=5120, heads=40, kv_heads=40, head_dim=128),
    "70b": dict(dim=8192, heads=64, kv_heads=8, head_dim=128),
    "tinyllama": dict(dim=2048, heads=32, kv_heads=4, head_dim=64),
}

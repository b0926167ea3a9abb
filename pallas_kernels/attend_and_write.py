"""What stands between the QKV product and the o product of a decode step: rotary, the cache write and attention.

As in `attention`, query ``i`` of row ``b`` has position ``start[b] + i`` and sees positions ``0 .. start[b] + i``, its
own key among them. The cache is contiguous or, with a table, paged. Rows may share pages (see `paged_attention`), but
none may read what another writes: the kernel reads the cache as it was before the call.

`project_and_attend` has the QKV product, too. K splits of it are then added where attention reads them.
"""

import math
from collections.abc import Callable
from typing import Any

import jax

from .attention import attention_reference
from .dispatch import Kernel, Op, Unsupported
from .hopper.attention.decode import check_and_write, flash_decode_and_write
from .hopper.common.tiles import Weight
from .hopper.gemm.medium_m import MEDIUM_M_MAX, check_medium_m, medium_m_sums
from .layer_view import LayerView, stack_of
from .matmul import NO_BIAS, SMALL_M_MAX, affine, matmul_reference
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


def project_and_attend_reference(
    x: jax.Array,
    w: Weight,
    *arguments: Any,
    bias: jax.Array | None = None,
    layer: jax.Array | int | None,
    product: Callable[..., jax.Array] = matmul_reference,
    attend: Callable[..., Any] = attend_and_write_reference,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`attend_and_write_reference` of x [B, T, dim] · w [(heads + 2 * kv_heads) * D, dim] (+ bias) and its other
    ``arguments``; ``product`` does the matmul, ``attend`` the rest."""
    return attend(affine(product, x, w, bias), *arguments, layer=layer)


def check_project_and_attend(
    x: jax.Array,
    w: Weight | LayerView,
    *arguments: Any,
    bias: jax.Array | None = None,
    layer: jax.Array | int | None,
) -> None:
    """Raise `Unsupported` where `project_and_attend_kernel` cannot run."""
    if bias is not None:
        raise Unsupported(NO_BIAS)
    w, _ = stack_of(w)
    (B, T, inner), rows = x.shape, math.prod(x.shape[:2])
    if not SMALL_M_MAX < rows <= MEDIUM_M_MAX:
        raise Unsupported(f"{rows} rows: from {SMALL_M_MAX + 1} to {MEDIUM_M_MAX} gain")
    if T > 1:
        raise Unsupported(f"{T} new tokens a row: registers have room for the K splits of one")
    check_medium_m(jax.ShapeDtypeStruct((rows, inner), x.dtype), w)
    check_and_write(jax.ShapeDtypeStruct((B, T, w.shape[-2]), x.dtype), *arguments, layer=layer)


def project_and_attend_kernel(
    x: jax.Array,
    w: Weight | LayerView,
    *arguments: Any,
    bias: None = None,
    layer: jax.Array | int | None,
    interpret: Any = None,
    **options: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`project_and_attend_reference` in two launches; ``options`` are those of `medium_m_sums`."""
    del bias  # see `check_project_and_attend`
    w, index = stack_of(w)
    rows = x.reshape(-1, x.shape[-1])
    sums = medium_m_sums(rows, w, layer=index, out_dtype=x.dtype, interpret=interpret or False, **options)
    return flash_decode_and_write(sums, *arguments, layer=layer, interpret=interpret)


project_and_attend = Op(
    "project_and_attend",
    project_and_attend_reference,
    {"hopper": Kernel(project_and_attend_kernel, check_project_and_attend)},
)

CASES = {
    "7b": dict(heads=32, kv_heads=32, head_dim=128, size=PAGE),
    "llama3-8b": dict(heads=32, kv_heads=8, head_dim=128, size=PAGE),
    "70b": dict(heads=64, kv_heads=8, head_dim=128, size=PAGE),
    "tinyllama": dict(heads=32, kv_heads=4, head_dim=64, size=PAGE),
}

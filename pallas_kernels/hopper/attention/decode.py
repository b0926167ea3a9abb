"""Decode attention on Hopper: a few queries a row against a long cache, bound by the cache's bytes.

The queries that share a key head are rows of one product, so that the cache is read once. The keys of a row are split
over blocks so that every SM reads; each block leaves its part of the answer and the logarithm of its part of the
softmax's sum, and the parts are joined in the order of the keys, whichever block was done first.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ...arch import planned
from ...dispatch import Unsupported
from ...layer_view import LayerView, as_stacked
from ..common.online_softmax import ROWS, hide, no_keys, rescale, soften, weigh
from ..common.tiles import fill_rows, pad_rows, swizzled
from . import prefill as flash_attention


@dataclasses.dataclass(frozen=True)
class Tiles:
    """What can be tuned: keys per tile, tiles in flight, and blocks to spread the work over (None: one for each
    multiprocessor)."""

    keys: int = 128
    stages: int = 3
    blocks: int | None = None


FUSED_SPLITS = 16  # more parts than this are joined by reductions

TILES = {64: Tiles(stages=5), 128: Tiles()}  # by head_dim


def check(q: jax.Array, k: jax.Array | LayerView, v: jax.Array | LayerView, start: jax.Array) -> None:
    """Raise `Unsupported` where `flash_decode` cannot run these arguments."""
    flash_attention.check(q, k, v, start)
    rows = q.shape[1] * q.shape[2] // k.shape[1]
    if rows > ROWS:
        raise Unsupported(f"at most {ROWS} query rows for a key head (queries times heads that share it), found {rows}")


# A jit of its own: all layers of a model share one lowering, and the compiled kernel with it.
@functools.partial(jax.jit, static_argnames=("tiles", "interpret"))
def flash_decode(
    q: jax.Array,
    k: jax.Array | LayerView,
    v: jax.Array | LayerView,
    start: jax.Array,
    *,
    tiles: Tiles | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> jax.Array:
    """q [B, T, heads, D], k and v [B, kv_heads, S, D], start [B] -> [B, T, heads, D]; see `attention_reference`."""
    B, T, heads, D = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    tiles = tiles or TILES[D]
    rows = q.reshape(B, T, kv_heads, group, D).swapaxes(1, 2).reshape(B, kv_heads, T * group, D)
    parts, logs = decode_parts(rows, k, v, start, queries=T, tiles=tiles, interpret=interpret)
    out = join(parts[:, :, :, : T * group], logs[:, :, :, : T * group, None])
    return out.astype(q.dtype).reshape(B, kv_heads, T, group, D).swapaxes(1, 2).reshape(B, T, heads, D)


def join(parts: jax.Array, logs: jax.Array) -> jax.Array:
    """The mean of ``parts`` [B, kv_heads, splits, rows, D], each with weight exp2(logs), that of an empty part 0."""
    if parts.shape[2] > FUSED_SPLITS:
        weights = jnp.exp2(logs - logs.max(axis=2, keepdims=True))
        return (parts * weights).sum(axis=2) / weights.sum(axis=2)
    # Written out it has no reductions, and XLA makes one kernel of it instead of three.
    pairs = [(parts[:, :, i], logs[:, :, i]) for i in range(parts.shape[2])]
    top = functools.reduce(jnp.maximum, (log for _, log in pairs))
    weighted = [(part * (weight := jnp.exp2(log - top)), weight) for part, log in pairs]
    return sum(part for part, _ in weighted) / sum(weight for _, weight in weighted)


def decode_parts(
    q: jax.Array,  # [B, kv_heads, rows, D], rows in order of the query, then of the head
    k: jax.Array | LayerView,
    v: jax.Array | LayerView,
    start: jax.Array,
    *,
    queries: int,
    tiles: Tiles,
    interpret: plgpu.InterpretGPUParams | None,
) -> tuple[jax.Array, jax.Array]:
    """Attention over each part of the keys, [B, kv_heads, splits, rows, D], and log2 of the sum of its weights' terms,
    [B, kv_heads, splits, ROWS], both in float32."""
    B, kv_heads, rows, D = q.shape
    q = fill_rows(q, 2)
    (k, layer), (v, _) = as_stacked(k), as_stacked(v)
    k, v = pad_rows(k, 3), pad_rows(v, 3)
    S, group = k.shape[3], rows // queries
    rows = q.shape[2]
    splits = max(1, min((tiles.blocks or planned().sms) // (B * kv_heads), pl.cdiv(S, tiles.keys)))
    scale = D**-0.5 * math.log2(math.e)

    def body(layer_ref, start_ref, q_ref, k_ref, v_ref, part_ref, log_ref, q_smem, shared, log_smem, p_smem, barriers):
        (k_smem, v_smem), out_smem = shared
        q_full, k_full, v_full = barriers
        b, head, split = (lax.axis_index(name) for name in ("b", "head", "split"))
        begin, layer = start_ref[b], layer_ref[0]
        # Tiles with a key that some query sees, and this block's share of them; the first `whole` are seen by all.
        count = lax.div(jnp.minimum(begin + queries, S) - 1, tiles.keys) + 1
        low, high = lax.div(split * count, splits), lax.div((split + 1) * count, splits)
        whole = lax.div(jnp.minimum(begin + 1, S), tiles.keys)

        def load(j):
            slot, keys = lax.rem(j - low, tiles.stages), pl.ds(j * tiles.keys, tiles.keys)
            plgpu.copy_gmem_to_smem(k_ref.at[layer, b, head, keys], k_smem.at[slot], k_full.at[slot])
            plgpu.copy_gmem_to_smem(v_ref.at[layer, b, head, keys], v_smem.at[slot], v_full.at[slot])

        # Copies fill the rows behind q's with zeros, and drop those behind the result's. JAX 0.12 refuses such slices
        # where their start is a constant.
        first = split * 0
        plgpu.copy_gmem_to_smem(q_ref.at[b, head, pl.ds(first, ROWS)], q_smem, q_full)
        lax.fori_loop(low, jnp.minimum(low + tiles.stages, high), lambda j, _: load(j), None)
        plgpu.barrier_wait(q_full)

        def last(j):
            row = plgpu.broadcasted_iota(jnp.int32, (ROWS, tiles.keys), 0, layout=plgpu.Layout.WGMMA)
            return jnp.minimum(begin + lax.div(row, group), S - 1) - j * tiles.keys

        def step(j, carry, *, masked):
            acc, m, total = carry
            slot = lax.rem(j - low, tiles.stages)
            plgpu.barrier_wait(k_full.at[slot])

            def scores(s_ref):
                plgpu.wgmma(s_ref, q_smem, k_smem.at[slot].T)
                return s_ref[...]

            s = pl.run_scoped(scores, plgpu.ACC((ROWS, tiles.keys), jnp.float32))
            p, alpha, m, total = soften(hide(s, last(j)) if masked else s, m, total, scale)
            plgpu.barrier_wait(v_full.at[slot])
            acc = weigh(rescale(acc, alpha), p.astype(q.dtype), v_smem.at[slot], p_smem)

            @pl.when(j + tiles.stages < high)
            def _():
                load(j + tiles.stages)

            return acc, m, total

        zeros = plgpu.layout_cast(jnp.zeros((ROWS, D), jnp.float32), plgpu.Layout.WGMMA)
        carry = (zeros, *no_keys())
        border = jnp.clip(whole, low, high)
        carry = lax.fori_loop(low, border, functools.partial(step, masked=False), carry)
        acc, m, total = lax.fori_loop(border, high, functools.partial(step, masked=True), carry)

        share = 1 / jnp.where(total > 0, total, 1.0)  # a part without keys is zero, not 0 / 0
        out_smem[...] = rescale(acc, share)
        log_smem[...] = m + jnp.log2(total)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, part_ref.at[b, head, split, pl.ds(first, ROWS)])
        plgpu.copy_smem_to_gmem(log_smem, log_ref.at[b, head, split])
        plgpu.wait_smem_to_gmem(0)

    ring = plgpu.Barrier(num_barriers=tiles.stages)
    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((B, kv_heads, splits, rows, D), jnp.float32),
            jax.ShapeDtypeStruct((B, kv_heads, splits, ROWS), jnp.float32),
        ),
        scratch_types=(
            swizzled((ROWS, D), q.dtype),
            plgpu.RefUnion(
                (swizzled((tiles.stages, tiles.keys, D), q.dtype),) * 2,
                plgpu.SMEM((ROWS, D), jnp.float32),  # written when all tiles are used
            ),
            plgpu.SMEM((ROWS,), jnp.float32),
            None if interpret is None else swizzled((ROWS, tiles.keys), q.dtype),
            (plgpu.Barrier(), ring, ring),
        ),
        grid=(splits, kv_heads, B),
        grid_names=("split", "head", "b"),
        interpret=interpret,
        kernel_name="flash_decode",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(layer, start, q, k, v)

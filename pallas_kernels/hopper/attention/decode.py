"""Decode attention on Hopper: a few queries a row against a long cache. The bytes of the cache bound it.

The queries that share a key head are rows of one product, so the cache is read once. The keys of a row are split over
blocks, so that every SM reads. Each block writes the attention over its split and the logarithm of its softmax sum.
The splits are joined in the order of the keys, so the result does not depend on which block finished first.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ...arch import planned
from ...dispatch import Unsupported
from ...layer_view import LayerView, as_stacked
from ..common.online_softmax import QUERY_TILE, KeyValueTile, attend_tiles, empty_softmax, mask_after
from ..common.tiles import pad_rows, pad_rows_unless_short, swizzled
from . import prefill

Ref = Any  # Pallas has no public type for a reference
FUSED_SPLITS = 16  # more splits than this are joined by reductions


@dataclass(frozen=True)
class DecodeTiles:
    """What can be tuned."""

    keys: int = 128  # of a tile
    stages: int = 3  # tiles in flight
    blocks: int | None = None  # None: one a multiprocessor


TILES = {64: DecodeTiles(stages=5), 128: DecodeTiles()}  # by head_dim


def check(q: jax.Array, k: jax.Array | LayerView, v: jax.Array | LayerView, start: jax.Array) -> None:
    """Raise `Unsupported` where `flash_decode` cannot run these arguments."""
    prefill.check(q, k, v, start)
    rows = q.shape[1] * q.shape[2] // k.shape[1]
    if rows > QUERY_TILE:
        raise Unsupported(
            f"at most {QUERY_TILE} query rows a key head (queries times heads that share it), found {rows}"
        )


# A jit of its own: all layers of a model share one lowering and one compiled kernel.
@functools.partial(jax.jit, static_argnames=("tiles", "interpret"))
def flash_decode(
    q: jax.Array,
    k: jax.Array | LayerView,
    v: jax.Array | LayerView,
    start: jax.Array,
    *,
    tiles: DecodeTiles | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> jax.Array:
    """q [B, T, heads, D], k and v [B, kv_heads, S, D], start [B] -> [B, T, heads, D]; see `attention_reference`."""
    B, T, heads, D = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    tiles = tiles or TILES[D]
    rows = q.reshape(B, T, kv_heads, group, D).swapaxes(1, 2).reshape(B, kv_heads, T * group, D)
    outputs, logs = attend_splits(rows, k, v, start, queries=T, tiles=tiles, interpret=interpret)
    out = join(outputs[:, :, :, : T * group], logs[:, :, :, : T * group, None])
    return out.astype(q.dtype).reshape(B, kv_heads, T, group, D).swapaxes(1, 2).reshape(B, T, heads, D)


def join(outputs: jax.Array, logs: jax.Array) -> jax.Array:
    """The mean of ``outputs`` [B, kv_heads, splits, rows, D] over the splits, weighted by exp2(logs).

    An empty split has the log -inf, so its weight is 0."""
    if outputs.shape[2] > FUSED_SPLITS:
        weights = jnp.exp2(logs - logs.max(axis=2, keepdims=True))
        return (outputs * weights).sum(axis=2) / weights.sum(axis=2)
    # Unrolled there is no reduction, and XLA makes one kernel of it instead of three.
    splits = [(outputs[:, :, i], logs[:, :, i]) for i in range(outputs.shape[2])]
    top = functools.reduce(jnp.maximum, (log for _, log in splits))
    weighted = [(out * (weight := jnp.exp2(log - top)), weight) for out, log in splits]
    return sum(out for out, _ in weighted) / sum(weight for _, weight in weighted)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scratch:
    """Shared memory and barriers of a block."""

    q: Ref  # [QUERY_TILE, D]
    rings_or_output: (
        Any  # a union: keys and values [stages, keys, D] each; once all are used, the output [QUERY_TILE, D]
    )
    log: Ref  # [QUERY_TILE]
    p: Ref | None  # [QUERY_TILE, keys], only for the interpreter
    q_full: Ref
    k_full: Ref  # a barrier a stage
    v_full: Ref


def attend_splits(
    q: jax.Array,  # [B, kv_heads, rows, D], rows in order of the query, then of the head
    k: jax.Array | LayerView,
    v: jax.Array | LayerView,
    start: jax.Array,
    *,
    queries: int,
    tiles: DecodeTiles,
    interpret: plgpu.InterpretGPUParams | None,
) -> tuple[jax.Array, jax.Array]:
    """Attention over each split of the keys, [B, kv_heads, splits, rows, D], and log2 of its softmax sum,
    [B, kv_heads, splits, QUERY_TILE], both in float32."""
    B, kv_heads, rows, D = q.shape
    group = rows // queries
    q = pad_rows_unless_short(q, 2)
    (k, layer), (v, _) = as_stacked(k), as_stacked(v)
    k, v = pad_rows(k, 3), pad_rows(v, 3)
    rows = q.shape[2]
    splits = max(1, min((tiles.blocks or planned().sms) // (B * kv_heads), pl.cdiv(k.shape[3], tiles.keys)))
    ring = swizzled((tiles.stages, tiles.keys, D), q.dtype)
    scratch = Scratch(
        q=swizzled((QUERY_TILE, D), q.dtype),
        rings_or_output=plgpu.RefUnion((ring, ring), plgpu.SMEM((QUERY_TILE, D), jnp.float32)),
        log=plgpu.SMEM((QUERY_TILE,), jnp.float32),
        p=None if interpret is None else swizzled((QUERY_TILE, tiles.keys), q.dtype),
        q_full=plgpu.Barrier(),
        k_full=plgpu.Barrier(num_barriers=tiles.stages),
        v_full=plgpu.Barrier(num_barriers=tiles.stages),
    )
    return plgpu.kernel(
        functools.partial(_block, tiles=tiles, queries=queries, group=group, splits=splits),
        out_type=(
            jax.ShapeDtypeStruct((B, kv_heads, splits, rows, D), jnp.float32),
            jax.ShapeDtypeStruct((B, kv_heads, splits, QUERY_TILE), jnp.float32),
        ),
        scratch_types=(scratch,),
        grid=(splits, kv_heads, B),
        grid_names=("split", "head", "b"),
        interpret=interpret,
        kernel_name="flash_decode",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(layer, start, q, k, v)


def _block(layer_ref: Ref, start_ref: Ref, q_ref: Ref, k_ref: Ref, v_ref: Ref, out_ref: Ref, log_ref: Ref,
           scratch: Scratch, *, tiles: DecodeTiles, queries: int, group: int, splits: int) -> None:  # fmt: skip
    """Attention over one split of the keys of one row of the batch and one key head."""
    (k_ring, v_ring), out_smem = scratch.rings_or_output
    D, S = q_ref.shape[3], k_ref.shape[3]
    b, head, split = (lax.axis_index(name) for name in ("b", "head", "split"))
    begin, layer = start_ref[b], layer_ref[0]
    # Tiles that some query sees, this block's share of them, and how many tiles every query sees whole.
    count = lax.div(jnp.minimum(begin + queries, S) - 1, tiles.keys) + 1
    low, high = lax.div(split * count, splits), lax.div((split + 1) * count, splits)
    whole = lax.div(jnp.minimum(begin + 1, S), tiles.keys)

    def load(j: Any) -> None:
        slot, keys = lax.rem(j - low, tiles.stages), pl.ds(j * tiles.keys, tiles.keys)
        plgpu.copy_gmem_to_smem(k_ref.at[layer, b, head, keys], k_ring.at[slot], scratch.k_full.at[slot])
        plgpu.copy_gmem_to_smem(v_ref.at[layer, b, head, keys], v_ring.at[slot], scratch.v_full.at[slot])

    # The copy fills rows past q's end with zeros, and the copy of the result drops them. JAX 0.12 refuses such a slice
    # if its start is a constant.
    first = split * 0
    plgpu.copy_gmem_to_smem(q_ref.at[b, head, pl.ds(first, QUERY_TILE)], scratch.q, scratch.q_full)
    lax.fori_loop(low, jnp.minimum(low + tiles.stages, high), lambda j, _: load(j), None)
    plgpu.barrier_wait(scratch.q_full)

    def mask(j: Any, scores: jax.Array) -> jax.Array:
        row = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=plgpu.Layout.WGMMA)
        return mask_after(scores, jnp.minimum(begin + lax.div(row, group), S - 1) - j * tiles.keys)

    def tile(j: Any, *, masked: bool) -> KeyValueTile:
        slot = lax.rem(j - low, tiles.stages)
        return KeyValueTile(
            k=k_ring.at[slot],
            v=v_ring.at[slot],
            wait_keys=lambda: plgpu.barrier_wait(scratch.k_full.at[slot]),
            wait_values=lambda: plgpu.barrier_wait(scratch.v_full.at[slot]),
            release=lambda: pl.when(j + tiles.stages < high)(lambda: load(j + tiles.stages)),
            mask=functools.partial(mask, j) if masked else None,
        )

    attend = functools.partial(attend_tiles, q=scratch.q, scale=D**-0.5 * math.log2(math.e), p_smem=scratch.p)
    softmax = empty_softmax(D)
    border = jnp.clip(whole, low, high)
    softmax = attend(softmax, low, border, functools.partial(tile, masked=False))
    softmax = attend(softmax, border, high, functools.partial(tile, masked=True))

    out_smem[...] = softmax.output()
    scratch.log[...] = softmax.log_total()
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_smem, out_ref.at[b, head, split, pl.ds(first, QUERY_TILE)])
    plgpu.copy_smem_to_gmem(scratch.log, log_ref.at[b, head, split])
    plgpu.wait_smem_to_gmem(0)

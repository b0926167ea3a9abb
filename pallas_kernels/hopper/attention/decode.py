"""Decode attention on Hopper: a few queries a row against a long cache. The bytes of the cache bound it.

The queries that share a key head are rows of one product, so the cache is read once. Where rows and key heads are too
few to fill the multiprocessors, the keys of a row are split over blocks. Then each block writes the attention over its
split and the logarithm of its softmax sum, and the splits are joined in the order of the keys, so the result does not
depend on which block finished first. The keys lie in rows of their own or in pages: see `cache`.
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
from ...layer_view import LayerView
from ..common.online_softmax import QUERY_TILE, KeyValueTile, attend_tiles, empty_softmax, mask_after
from ..common.tiles import pad_rows_unless_short, swizzled
from . import prefill
from .cache import Cache, Ref

FUSED_SPLITS = 16  # more splits than this are joined by reductions


@dataclass(frozen=True)
class DecodeTiles:
    """What can be tuned."""

    keys: int = 128  # of a tile
    stages: int = 3  # tiles in flight
    blocks: int | None = None  # None: one a multiprocessor


TILES = {64: DecodeTiles(stages=5), 128: DecodeTiles()}  # by head_dim
# Of as many blocks as multiprocessors or more, several share a multiprocessor: one loads while another begins or ends.
SHARED_TILES = {64: DecodeTiles(stages=2), 128: DecodeTiles(keys=64, stages=2)}


def check(q: jax.Array, k: jax.Array | LayerView, v: jax.Array | LayerView, start: jax.Array) -> None:
    """Raise `Unsupported` where `flash_decode` cannot run these arguments."""
    prefill.check(q, k, v, start)
    if (rows := _query_rows(q.shape[1], q.shape[2] // k.shape[1])) > QUERY_TILE:
        raise Unsupported(
            f"at most {QUERY_TILE} query rows a key head (queries times heads that share it, "
            f"these in whole eights), found {rows}"
        )


def check_paged(q: jax.Array, k: jax.Array, v: jax.Array, table: jax.Array, start: jax.Array, *, layer: Any) -> None:
    """Raise `Unsupported` where `flash_decode_paged` cannot run these arguments."""
    prefill.check_paged(q, k, v, table, start, layer=layer)
    check(q, LayerView(k, layer), LayerView(v, layer), start)


def _query_rows(queries: int, group: int) -> int:
    """Rows of the query tile in use. The heads that share a key head begin a new eight for every query, so that one
    copy brings them and one takes them back."""
    return queries * pl.cdiv(group, 8) * 8


# Jits of their own: all layers of a model share one lowering and one compiled kernel.
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
    return _attend(q, Cache.contiguous(k, v), start, tiles, interpret)


@functools.partial(jax.jit, static_argnames=("tiles", "interpret"))
def flash_decode_paged(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    table: jax.Array,
    start: jax.Array,
    *,
    layer: jax.Array | int,
    tiles: DecodeTiles | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> jax.Array:
    """q [B, T, heads, D], k and v [layers, pages, kv_heads, size, D], table [B, P], start [B] -> [B, T, heads, D]; see
    `paged_attention_reference`."""
    return _attend(q, Cache.paged(k, v, table, layer), start, tiles, interpret)


def _attend(
    q: jax.Array, cache: Cache, start: jax.Array, tiles: DecodeTiles | None, interpret: plgpu.InterpretGPUParams | None
) -> jax.Array:
    B, T, heads, D = q.shape
    kv_heads = cache.k.shape[2]
    group = heads // kv_heads
    q = pad_rows_unless_short(q.reshape(B, T, kv_heads, group, D), 3)
    tiles = tiles or (SHARED_TILES if B * kv_heads >= planned().sms else TILES)[D]
    splits = max(1, min((tiles.blocks or planned().sms) // (B * kv_heads), pl.cdiv(cache.positions, tiles.keys)))
    found = attend_splits(q, cache, start, splits=splits, tiles=tiles, interpret=interpret)
    if splits == 1:
        out = found[0]  # [B, T, kv_heads, rows, D]
    else:
        outputs, logs = found
        logs = logs[:, :, :, : _query_rows(T, group)].reshape(*outputs.shape[:4], -1, 1)
        out = join(outputs, logs[:, :, :, :, : outputs.shape[4]]).astype(q.dtype).swapaxes(1, 2)
    return out[:, :, :, :group].reshape(B, T, heads, D)


def join(outputs: jax.Array, logs: jax.Array) -> jax.Array:
    """The mean of ``outputs`` [B, kv_heads, splits, ...] over the splits, weighted by exp2(logs).

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
    # A union: keys and values [stages, keys, D] each; once all are used, the output [QUERY_TILE, D].
    rings_or_output: Any
    log: Ref | None  # [QUERY_TILE], with several splits
    p: Ref | None  # [QUERY_TILE, keys], only for the interpreter
    q_full: Ref
    k_full: Ref  # a barrier a stage
    v_full: Ref


def attend_splits(
    q: jax.Array,  # [B, T, kv_heads, group, D]
    cache: Cache,
    start: jax.Array,
    *,
    splits: int,
    tiles: DecodeTiles,
    interpret: plgpu.InterpretGPUParams | None,
) -> tuple[jax.Array, ...]:
    """Attention over each split of the keys, [B, kv_heads, splits, T, group, D], and log2 of its softmax sum,
    [B, kv_heads, splits, QUERY_TILE], both in float32. With one split, attention alone, like q."""
    B, T, kv_heads, group, D = q.shape
    whole = splits == 1
    ring = swizzled((tiles.stages, tiles.keys, D), q.dtype)
    output = swizzled((QUERY_TILE, D), q.dtype) if whole else plgpu.SMEM((QUERY_TILE, D), jnp.float32)
    copies = cache.copies(tiles.keys)
    scratch = Scratch(
        q=swizzled((QUERY_TILE, D), q.dtype),
        rings_or_output=plgpu.RefUnion((ring, ring), output),
        log=None if whole else plgpu.SMEM((QUERY_TILE,), jnp.float32),
        p=None if interpret is None else swizzled((QUERY_TILE, tiles.keys), q.dtype),
        q_full=plgpu.Barrier(num_arrivals=T),
        k_full=plgpu.Barrier(num_arrivals=copies, num_barriers=tiles.stages),
        v_full=plgpu.Barrier(num_arrivals=copies, num_barriers=tiles.stages),
    )
    parts = (B, kv_heads, splits)
    out_type = (jax.ShapeDtypeStruct(q.shape, q.dtype),) if whole else (
        jax.ShapeDtypeStruct((*parts, T, group, D), jnp.float32),
        jax.ShapeDtypeStruct((*parts, QUERY_TILE), jnp.float32),
    )  # fmt: skip
    structure = jax.tree.structure(cache)

    def body(start_ref: Ref, q_ref: Ref, *refs: Ref) -> None:
        *refs, scratch = refs
        leaves, outputs = refs[: structure.num_leaves], refs[structure.num_leaves :]
        _block(start_ref, q_ref, jax.tree.unflatten(structure, leaves), outputs, scratch, tiles=tiles, splits=splits)

    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=(scratch,),
        grid=(splits, kv_heads, B),
        grid_names=("split", "head", "b"),
        interpret=interpret,
        kernel_name="flash_decode" if cache.table is None else "flash_decode_paged",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(start, q, *jax.tree.leaves(cache))


def _block(start_ref: Ref, q_ref: Ref, cache: Cache, outputs: list[Ref], scratch: Scratch,
           *, tiles: DecodeTiles, splits: int) -> None:  # fmt: skip
    """Attention over one split of the keys of one row of the batch and one key head."""
    (k_ring, v_ring), out_smem = scratch.rings_or_output
    queries, D, S = q_ref.shape[1], q_ref.shape[4], cache.positions
    rows = _query_rows(1, q_ref.shape[3])  # of a query
    b, head, split = (lax.axis_index(name) for name in ("b", "head", "split"))
    begin = start_ref[b]
    # Tiles that some query sees, this block's share of them, and how many tiles every query sees whole.
    last = jnp.minimum(begin + queries, S) - 1
    count = lax.div(last, tiles.keys) + 1
    low, high = lax.div(split * count, splits), lax.div((split + 1) * count, splits)
    whole = lax.div(jnp.minimum(begin + 1, S), tiles.keys)

    def load(j: Any) -> None:
        slot = lax.rem(j - low, tiles.stages)
        cache.load(cache.k, b, head, j, last, k_ring.at[slot], scratch.k_full.at[slot])
        cache.load(cache.v, b, head, j, last, v_ring.at[slot], scratch.v_full.at[slot])

    # The copies fill rows past the end of q's heads with zeros, and the copies of the result drop them. JAX 0.12
    # refuses such a slice if its start is a constant. Rows of the tile that no query has are never written: what comes
    # of them is not used.
    heads = pl.ds(split * 0, rows)
    own = [pl.ds(t * rows, rows) for t in range(queries)]
    for t in range(queries):
        plgpu.copy_gmem_to_smem(q_ref.at[b, t, head, heads], scratch.q.at[own[t]], scratch.q_full)
    lax.fori_loop(low, jnp.minimum(low + tiles.stages, high), lambda j, _: load(j), None)
    plgpu.barrier_wait(scratch.q_full)

    def mask(j: Any, scores: jax.Array) -> jax.Array:
        row = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=plgpu.Layout.WGMMA)
        return mask_after(scores, jnp.minimum(begin + lax.div(row, rows), S - 1) - j * tiles.keys)

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

    out_smem[...] = softmax.output().astype(out_smem.dtype)
    if scratch.log is not None:
        scratch.log[...] = softmax.log_total()
    plgpu.commit_smem()
    for t in range(queries):
        target = outputs[0].at[b, t, head] if splits == 1 else outputs[0].at[b, head, split, t]
        plgpu.copy_smem_to_gmem(out_smem.at[own[t]], target.at[heads])
    if scratch.log is not None:
        plgpu.copy_smem_to_gmem(scratch.log, outputs[1].at[b, head, split])
    plgpu.wait_smem_to_gmem(0)

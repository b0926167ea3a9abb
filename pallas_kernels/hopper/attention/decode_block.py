"""A block of decode attention: the queries that share a key head of a row, over one split of that row's keys."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..common.online_softmax import QUERY_TILE, KeyValueTile, attend_tiles, empty_softmax, mask_after
from ..common.tiles import swizzled
from .cache import Cache, Ref
from .queries import GivenQueries, NewTokens, Place

Queries = GivenQueries | NewTokens


@dataclass(frozen=True)
class DecodeTiles:
    """What can be tuned."""

    keys: int = 128  # of a tile
    stages: int = 3  # tiles in flight
    blocks: int | None = None  # None: one a multiprocessor


def query_rows(queries: int, group: int) -> int:
    """Rows of the query tile in use. The heads that share a key head begin a new eight for every query, so that one
    copy brings them and one takes them back."""
    return queries * pl.cdiv(group, 8) * 8


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scratch:
    """Shared memory and barriers of a block."""

    q: Ref  # [QUERY_TILE, D]
    # A union: keys and values [stages, keys, D] each; once all are used, the output [QUERY_TILE, D].
    rings_or_output: Any
    log: Ref | None  # [QUERY_TILE], with several splits
    p: Ref | None  # [QUERY_TILE, keys], only for the interpreter
    q_full: Ref | None  # of queries that are copied
    k_full: Ref  # a barrier a stage
    v_full: Ref
    new: Ref | None  # [2, T, D], keys and values of new tokens

    @staticmethod
    def types(queries: Queries, cache: Cache, tiles: DecodeTiles, *, whole: bool, interpret: bool) -> "Scratch":
        """What a launch asks for; ``whole``: there is one split."""
        _, T, _, _, D = queries.shape
        ring = swizzled((tiles.stages, tiles.keys, D), queries.dtype)
        output = swizzled((QUERY_TILE, D), queries.dtype) if whole else plgpu.SMEM((QUERY_TILE, D), jnp.float32)
        copies, new = cache.copies(tiles.keys), isinstance(queries, NewTokens)
        return Scratch(
            q=swizzled((QUERY_TILE, D), queries.dtype),
            rings_or_output=plgpu.RefUnion((ring, ring), output),
            log=None if whole else plgpu.SMEM((QUERY_TILE,), jnp.float32),
            p=swizzled((QUERY_TILE, tiles.keys), queries.dtype) if interpret else None,
            q_full=None if new else plgpu.Barrier(num_arrivals=T),
            k_full=plgpu.Barrier(num_arrivals=copies, num_barriers=tiles.stages),
            v_full=plgpu.Barrier(num_arrivals=copies, num_barriers=tiles.stages),
            new=plgpu.SMEM((2, T, D), queries.dtype) if new else None,
        )


def run_block(start_ref: Ref, queries: Queries, cache: Cache, outputs: Sequence[Ref], scratch: Scratch,
              *, tiles: DecodeTiles, splits: int) -> None:  # fmt: skip
    """Attention over one split of the keys of one row of the batch and one key head."""
    (k_ring, v_ring), out_smem = scratch.rings_or_output
    _, T, _, group, D = queries.shape
    S, new = cache.positions, isinstance(queries, NewTokens)
    rows = query_rows(1, group)  # of a query
    b, head, split = (lax.axis_index(name) for name in ("b", "head", "split"))
    begin = start_ref[b]
    # Tiles that some query sees, this block's share of them, and how many tiles every query sees whole. A tile that
    # new keys come to does not count as whole.
    last = jnp.minimum(begin + T, S) - 1
    count = lax.div(last, tiles.keys) + 1
    low, high = lax.div(split * count, splits), lax.div((split + 1) * count, splits)
    whole = lax.div(jnp.minimum(begin + (0 if new else 1), S), tiles.keys)
    place = Place(b, head, rows, pl.ds(split * 0, rows), scratch.q, scratch.q_full, scratch.new)

    def load(j: Any) -> None:
        slot = lax.rem(j - low, tiles.stages)
        cache.load(cache.k, b, head, j, last, k_ring.at[slot], scratch.k_full.at[slot])
        cache.load(cache.v, b, head, j, last, v_ring.at[slot], scratch.v_full.at[slot])

    begun = queries.begin(place)
    lax.fori_loop(low, jnp.minimum(low + tiles.stages, high), lambda j, _: load(j), None)
    slots = [cache.find(b, head, begin + t) for t in range(T)] if new else []
    queries.finish(place, begun)

    def mask(j: Any, scores: jax.Array) -> jax.Array:
        row = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=plgpu.Layout.WGMMA)
        return mask_after(scores, jnp.minimum(begin + lax.div(row, rows), S - 1) - j * tiles.keys)

    def tile(j: Any, *, masked: bool) -> KeyValueTile:
        slot = lax.rem(j - low, tiles.stages)

        def wait_keys() -> None:
            plgpu.barrier_wait(scratch.k_full.at[slot])
            if masked and isinstance(queries, NewTokens):
                plgpu.barrier_wait(scratch.v_full.at[slot])
                for t, found in enumerate(slots):
                    at = begin + t - j * tiles.keys
                    here = k_ring.at[slot], v_ring.at[slot]
                    add = functools.partial(queries.add_to_tile, place, cache, found, t, at, here)
                    pl.when((at >= 0) & (at < tiles.keys))(add)
                plgpu.commit_smem()

        def wait_values() -> None:
            if not (masked and new):
                plgpu.barrier_wait(scratch.v_full.at[slot])

        return KeyValueTile(
            k=k_ring.at[slot],
            v=v_ring.at[slot],
            wait_keys=wait_keys,
            wait_values=wait_values,
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
    for t in range(T):
        target = outputs[0].at[b, t, head] if splits == 1 else outputs[0].at[b, head, split, t]
        plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(t * rows, rows)], target.at[place.heads])
    if scratch.log is not None:
        plgpu.copy_smem_to_gmem(scratch.log, outputs[1].at[b, head, split])
    plgpu.wait_smem_to_gmem(0)

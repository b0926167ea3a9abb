"""Attention of one consumer's 64 queries in prefill.

The scores of tile j are computed together with the PV product of tile j - 1, so that the weights of tile j can be
found while that product still runs.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..common.online_softmax import (
    QUERY_TILE,
    Ref,
    empty_statistics,
    mask_after,
    pv_product,
    rescale,
    update_softmax,
)
from ..common.ring import TileRing


@dataclass(frozen=True)
class Queries:
    """The queries of one consumer, and the keys and values that they see."""

    q: Ref  # [QUERY_TILE, D] in shared memory
    q_free: Ref  # barrier: q may be overwritten
    keys: TileRing
    values: TileRing
    take_turn: Callable[[], None]  # wait until this consumer may use the tensor cores
    pass_turn: Callable[[], None]  # let the other consumer use them
    last_key: Callable[[Any], jax.Array]  # the last key of a tile that each query sees, [QUERY_TILE, keys]
    whole: jax.Array  # the first tiles of keys, which every query sees
    count: jax.Array  # tiles of keys that some query sees
    scale: float
    p_smem: Ref | None  # [QUERY_TILE, keys], only for the interpreter

    def weights(self, scores: jax.Array, j: Any, m: jax.Array, total: jax.Array, *, masked: bool) -> Any:
        """Release the keys of tile ``j`` and turn its scores into weights, see `update_softmax`."""
        self.keys.release(j)
        return update_softmax(mask_after(scores, self.last_key(j)) if masked else scores, m, total, self.scale)


def attend(queries: Queries) -> jax.Array:
    """Attention of the queries, [QUERY_TILE, D] in their dtype."""
    keys, values, q = queries.keys, queries.values, queries.q
    dtype, n_keys, D = keys.smem.dtype, *keys.smem.shape[1:]
    scores_type = plgpu.ACC((QUERY_TILE, n_keys), jnp.float32)

    def first_scores(scores_ref: Ref) -> jax.Array:
        keys.wait(0)
        queries.take_turn()
        plgpu.wgmma(scores_ref, q, keys.tile(0).T)
        queries.pass_turn()
        return scores_ref[...]

    def step(j: Any, carry: Any, *, masked: bool) -> Any:
        """Scores and weights of tile j, PV product of tile j - 1."""
        acc, p, m, total = carry
        keys.wait(j)
        values.wait(j - 1)
        queries.take_turn()

        def overlapped(refs: Any) -> None:
            acc_ref, p_ref, alpha_ref, m_ref, total_ref = refs

            def products(scores_ref: Ref) -> jax.Array:
                plgpu.wgmma(scores_ref, q, keys.tile(j).T)
                plgpu.wgmma(acc_ref, p, values.tile(j - 1))
                queries.pass_turn()
                return plgpu.wgmma_accumulator_load(scores_ref, wait_n=1)

            scores = pl.run_scoped(products, scores_type)
            updated = queries.weights(scores, j, m, total, masked=masked)
            p_ref[...], alpha_ref[...], m_ref[...], total_ref[...] = updated

        def scores_alone(scores_ref: Ref) -> jax.Array:
            plgpu.wgmma(scores_ref, q, keys.tile(j).T)
            return scores_ref[...]

        if queries.p_smem is None:
            empty = plgpu.layout_cast(jnp.zeros((QUERY_TILE, n_keys), jnp.float32), plgpu.Layout.WGMMA)
            state = (plgpu.ACC.init(acc), empty, m, m, total)
            acc, p, alpha, m, total = pl.run_state(overlapped)(state)
        else:
            scores = pl.run_scoped(scores_alone, scores_type)
            acc = pv_product(acc, p, values.tile(j - 1), queries.p_smem)
            queries.pass_turn()
            p, alpha, m, total = queries.weights(scores, j, m, total, masked=masked)
        # The barrier delays the rounding of p until the product that reads the p of tile j - 1 is done. Otherwise both
        # may get the same registers, and then ptxas serialises every wgmma.
        acc, p = lax.optimization_barrier((acc, p))
        values.release(j - 1)
        return rescale(acc, alpha), p.astype(dtype), m, total

    scores = pl.run_scoped(first_scores, scores_type)
    p, _, m, total = queries.weights(scores, 0, *empty_statistics(), masked=True)
    acc = plgpu.layout_cast(jnp.zeros((QUERY_TILE, D), jnp.float32), plgpu.Layout.WGMMA)
    carry = (acc, p.astype(dtype), m, total)
    whole, count = queries.whole, queries.count
    carry = lax.fori_loop(1, whole, functools.partial(step, masked=False), carry)
    acc, p, _, total = lax.fori_loop(jnp.maximum(whole, 1), count, functools.partial(step, masked=True), carry)
    plgpu.barrier_arrive(queries.q_free)
    values.wait(count - 1)
    acc = pv_product(acc, p, values.tile(count - 1), queries.p_smem)
    values.release(count - 1)
    return rescale(acc, 1 / total).astype(dtype)

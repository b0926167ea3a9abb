"""Online softmax: attention over tiles of keys and values as they arrive, with a running maximum and sum a query.

Scores are taken to base 2, because exp2 is the hardware's exponential: ``scale`` holds the factor log2(e).
`attend_tiles` is the whole loop, for kernels that wait for a tile, multiply and go on. Prefill attention overlaps the
products of two tiles and uses the single steps.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .tiles import broadcast_rows

QUERY_TILE = 64  # query rows of one warpgroup: the rows of a wgmma
EMPTY_MAX = -1e30  # maximum over no keys: finite, so that differences of maxima are numbers

Ref = Any  # Pallas has no public type for a reference


class Softmax(NamedTuple):
    """The running state of an online softmax, all in float32."""

    acc: jax.Array  # [QUERY_TILE, head_dim]: values weighted so far, relative to the maximum
    maximum: jax.Array  # [QUERY_TILE]: largest score so far, times scale
    total: jax.Array  # [QUERY_TILE]: sum of the weights so far, relative to the maximum

    def output(self) -> jax.Array:
        """Attention over the keys so far, [QUERY_TILE, head_dim]; zeros, not 0 / 0, where there were none."""
        return rescale(self.acc, 1 / jnp.where(self.total > 0, self.total, 1.0))

    def log_total(self) -> jax.Array:
        """log2 of the sum of all weights, [QUERY_TILE], by which splits of the keys are joined; -inf without keys."""
        return self.maximum + jnp.log2(self.total)


@dataclasses.dataclass(frozen=True)
class KeyValueTile:
    """One tile of keys and values in shared memory, and how to synchronise with whoever loads it."""

    k: Ref  # [keys, head_dim]
    v: Ref  # [keys, head_dim]
    wait_keys: Callable[[], Any]
    wait_values: Callable[[], Any]
    release: Callable[[], Any]  # called when the tile has been used: its slot may be loaded again
    mask: Callable[[jax.Array], jax.Array] | None = None  # puts -inf into scores [QUERY_TILE, keys]; None: all are seen


def attend_tiles(
    softmax: Softmax,
    first: Any,
    end: Any,
    tile: Callable[[Any], KeyValueTile],
    *,
    q: Ref,  # [QUERY_TILE, head_dim] in shared memory
    scale: float,
    p_smem: Ref | None,  # [QUERY_TILE, keys], only for the interpreter
) -> Softmax:
    """Fold ``tile(j)`` for j from ``first`` to ``end`` into ``softmax``."""

    def fold(j: Any, softmax: Softmax) -> Softmax:
        current = tile(j)
        current.wait_keys()

        def product(scores_ref: Ref) -> jax.Array:
            plgpu.wgmma(scores_ref, q, current.k.T)
            return scores_ref[...]

        scores = pl.run_scoped(product, plgpu.ACC((QUERY_TILE, current.k.shape[0]), jnp.float32))
        if current.mask is not None:
            scores = current.mask(scores)
        p, alpha, maximum, total = update_softmax(scores, softmax.maximum, softmax.total, scale)
        current.wait_values()
        acc = pv_product(rescale(softmax.acc, alpha), p.astype(q.dtype), current.v, p_smem)
        current.release()
        return Softmax(acc, maximum, total)

    return lax.fori_loop(first, end, fold, softmax)


def empty_softmax(head_dim: int) -> Softmax:
    """The state before the first tile."""
    acc = plgpu.layout_cast(jnp.zeros((QUERY_TILE, head_dim), jnp.float32), plgpu.Layout.WGMMA)
    return Softmax(acc, *empty_statistics())


def empty_statistics() -> tuple[jax.Array, jax.Array]:
    """Maximum (times scale) and sum of the weights over no keys, [QUERY_TILE] each."""
    row = plgpu.Layout.WGMMA.reduce(1)
    return tuple(plgpu.layout_cast(jnp.full((QUERY_TILE,), x, jnp.float32), row) for x in (EMPTY_MAX, 0.0))


def mask_after(scores: jax.Array, last: jax.Array) -> jax.Array:
    """``scores`` [queries, keys] with -inf at the keys after ``last`` [queries, keys]."""
    key = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA)
    return jnp.where(key <= last, scores, -jnp.inf)


def update_softmax(scores: jax.Array, maximum: jax.Array, total: jax.Array, scale: float) -> tuple[jax.Array, ...]:
    """Weights of a tile of scores, the factor that rescales the accumulator, and the new maximum and total."""
    new_maximum = jnp.maximum(maximum, scores.max(axis=1) * scale)
    alpha = jnp.exp2(maximum - new_maximum)
    p = jnp.exp2(scores * scale - broadcast_rows(new_maximum, scores.shape))
    return p, alpha, new_maximum, total * alpha + p.sum(axis=1)


def rescale(acc: jax.Array, factor: jax.Array) -> jax.Array:
    """Each row of ``acc`` [rows, columns] times its ``factor`` [rows]."""
    return acc * broadcast_rows(factor, acc.shape)


def pv_product(acc: jax.Array, p: jax.Array, v: Ref, p_smem: Ref | None) -> jax.Array:
    """acc + p @ v. The interpreter has no wgmma with A in registers: there ``p`` goes through ``p_smem``."""
    if p_smem is None:
        return pl.run_state(lambda ref: plgpu.wgmma(ref, p, v))(plgpu.ACC.init(acc))
    p_smem[...] = p
    plgpu.commit_smem()

    def product(ref: Ref) -> jax.Array:
        plgpu.wgmma(ref, p_smem, v)
        return ref[...]

    return acc + pl.run_scoped(product, plgpu.ACC(acc.shape, jnp.float32))

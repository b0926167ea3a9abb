"""Both ends of the product phases of a decode step: what x is, and what becomes of the sums.

What other blocks wrote in an earlier phase is read with ordinary loads only, never by TMA: a semaphore's release and
acquire order those, and no proxy fence is needed. What no block writes is read before the barrier: building a `Fill`
loads the gains.
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

from ..common.layouts import EIGHT_PER_THREAD
from .plan import ROW_UNIT, Plan, Product

Refs = dict[str, Any]


@dataclass(frozen=True)
class Fill:
    """What x is, in two halves, so that loads are on their way while something else is done: ``fetch`` of a token and
    the first stage of a chunk loads what `make` turns into this consumer's units of the chunk, [4, 32, 8]."""

    fetch: Callable[[Any, Any], Any]
    make: Callable[[Any], list[jax.Array]]


def load(ref: Any, layout: Any) -> jax.Array:
    """A small array from shared or global memory, where banks and coalescing hardly matter."""
    return plgpu.load(ref, layout=layout, optimized=False)


def unit(plan: Plan, row: Any, column: Any) -> jax.Array:
    """1024 columns of one token as [4, 32, 8]: neighbours stay together in a thread."""
    return reshaped(plan, row.at[pl.ds(column, ROW_UNIT)], (4, 32, 8), EIGHT_PER_THREAD)


def reshaped(plan: Plan, ref: Any, shape: tuple[int, ...], layout: Any) -> jax.Array:
    """An array as another shape of its numbers."""
    if plan.interpret:  # it reshapes arrays, but no references
        return ref[...].reshape(shape)
    return load(ref.reshape(shape), layout)


def units_of(plan: Plan, p: Product, me: Any) -> list[Any]:
    """Which units of a token's chunk a consumer has: all, or, of a single token, as many as the others. A number
    behind the last is of none."""
    count = p.cuts * p.held_units
    if plan.shape.rows > 1:
        return [jnp.int32(i) for i in range(count)]
    return [me + i for i in range(0, count, plan.tiles.consumers)]


def columns_of(plan: Plan, p: Product, me: Any, first: Any) -> list[Any]:
    """First columns of this consumer's units in the chunk that begins with stage ``first`` of every cut."""
    last = p.cuts * p.held_units - 1
    return [p.column(first, jnp.minimum(number, last)) for number in units_of(plan, p, me)]


# What x is


def as_x(plan: Plan, x: jax.Array) -> jax.Array:
    """bfloat16, unless `put_row` makes digits of it, which keep more."""
    return x if plan.shape.fmt.quantized else x.astype(jnp.bfloat16)


def normalised(plan: Plan, p: Product, x: Any, weight: Any, me: Any, smem: Refs) -> Fill:
    """RMSNorm of x [8, dim]."""
    early = len(list(p.chunks())) == 1
    gains = [unit(plan, weight, column) for column in columns_of(plan, p, me, 0)] if early else []

    def fetch(row: Any, first: Any) -> Any:
        columns = columns_of(plan, p, me, first)
        whole = [unit(plan, x.at[row], i * ROW_UNIT) for i in range(x.shape[1] // ROW_UNIT)]
        mine = [unit(plan, x.at[row], column) for column in columns]  # once more, now near
        return whole, mine, gains or [unit(plan, weight, column) for column in columns]

    def make(fetched: Any) -> list[jax.Array]:
        whole, mine, factors = fetched
        squares = functools.reduce(jnp.add, [jnp.square(a.astype(jnp.float32)) for a in whole])
        smem["squares"].at[me][...] = squares.sum(axis=2).sum(axis=1)  # one of each warp
        warps = [smem["squares"][me, i] for i in range(4)]
        scale = lax.rsqrt(((warps[0] + warps[1]) + (warps[2] + warps[3])) * (1 / p.inner) + plan.shape.eps)
        both = zip(mine, factors, strict=True)
        return [as_x(plan, a.astype(jnp.float32) * scale * b.astype(jnp.float32)) for a, b in both]

    return Fill(fetch, make)


def plain(plan: Plan, p: Product, x: Any, me: Any) -> Fill:
    """x [8, inner] as it is."""

    def fetch(row: Any, first: Any) -> list[jax.Array]:
        return [unit(plan, x.at[row], column) for column in columns_of(plan, p, me, first)]

    return Fill(fetch, lambda units: units)


def joined(plan: Plan, p: Product, parts: Any, logs: Any, me: Any) -> Fill:
    """Attention from its parts [splits, 8, inner], each with weight exp2(log), in the order of the keys."""

    if plan.splits == 1:
        whole = plain(plan, p, parts.at[0], me)
        return Fill(whole.fetch, lambda units: [as_x(plan, a) for a in units])

    def fetch(row: Any, first: Any) -> Any:
        def one(column: Any, split: int) -> tuple[jax.Array, jax.Array]:
            lines = pl.ds(pl.multiple_of(lax.div(column, 8), ROW_UNIT // 8), ROW_UNIT // 8)
            log = reshaped(plan, logs.at[split, row, lines], (4, 32), EIGHT_PER_THREAD.reduce(2))
            return unit(plan, parts.at[split, row], column), log

        return [[one(column, split) for split in range(plan.splits)] for column in columns_of(plan, p, me, first)]

    def join(several: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
        values, log = zip(*several, strict=True)
        top = functools.reduce(jnp.maximum, log)  # a number: the last part is never empty
        weights = [jnp.exp2(one - top) for one in log]
        share = 1 / functools.reduce(jnp.add, weights)
        shares = [lax.broadcast_in_dim(one * share, (4, 32, 8), (0, 1)) for one in weights]
        return as_x(plan, functools.reduce(jnp.add, [a * b for a, b in zip(values, shares, strict=True)]))

    return Fill(fetch, lambda fetched: [join(several) for several in fetched])


# What becomes of the sums


@dataclass(frozen=True)
class Finish:
    """What is written to ``out``: ``combine`` of the sums [8, n] of each half, and of as much of ``residual``."""

    out: Any
    combine: Callable[[list[jax.Array], jax.Array | None], jax.Array]
    residual: Any = None


def store(out: Any) -> Finish:
    """The product itself, in ``out``'s dtype."""
    return Finish(out, lambda sums, _: sums[0])


def add_to(residual: Any, out: Any) -> Finish:
    """The product plus ``residual``, rounded once."""
    return Finish(out, lambda sums, before: sums[0] + before, residual)


def swiglu(out: Any) -> Finish:
    """silu(gate) * up."""

    def combine(sums: list[jax.Array], _: Any) -> jax.Array:
        gate, up = sums
        return gate / (1 + jnp.exp(-gate)) * up

    return Finish(out, combine)

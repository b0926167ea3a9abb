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

from pallas_kernels.persistent_layouts import UNIT
from pallas_kernels.persistent_plan import ROW_UNIT, Plan, Product

Refs = dict[str, Any]
Units = Callable[[Any, int], jax.Array]  # first column, which of the phase's units -> [4, 32, 8] bf16
Fill = Callable[[Any], Units]  # token -> its x


def load(ref: Any, layout: Any) -> jax.Array:
    """A small array from shared or global memory, where banks and coalescing hardly matter."""
    return plgpu.load(ref, layout=layout, optimized=False)


def unit(plan: Plan, row: Any, column: Any) -> jax.Array:
    """1024 columns of one token as [4, 32, 8]: neighbours stay together in a thread."""
    return reshaped(plan, row.at[pl.ds(column, ROW_UNIT)], (4, 32, 8), UNIT)


def reshaped(plan: Plan, ref: Any, shape: tuple[int, ...], layout: Any) -> jax.Array:
    """An array as another shape of its numbers."""
    if plan.interpret:  # it reshapes arrays, but no references
        return ref[...].reshape(shape)
    return load(ref.reshape(shape), layout)


# What x is


def normalised(plan: Plan, p: Product, x: Any, weight: Any, me: Any, smem: Refs) -> Fill:
    """RMSNorm of x [8, dim]."""
    columns = list(p.unit_columns())
    gains = [unit(plan, weight, column) for column in columns] if len(list(p.chunks())) == 1 else []

    def fill(row: Any) -> Units:
        values = [unit(plan, x.at[row], i * ROW_UNIT).astype(jnp.float32) for i in range(x.shape[1] // ROW_UNIT)]
        squares = values[0] * values[0]
        for more in values[1:]:
            squares = squares + more * more
        smem["squares"].at[me][...] = squares.sum(axis=2).sum(axis=1)  # one of each warp
        warps = [smem["squares"][me, i] for i in range(4)]
        scale = lax.rsqrt(((warps[0] + warps[1]) + (warps[2] + warps[3])) * (1 / p.inner) + plan.shape.eps)

        def units(column: Any, index: int) -> jax.Array:
            part = unit(plan, x.at[row], column).astype(jnp.float32) * scale
            gain = gains[index] if gains else unit(plan, weight, column)
            return (part * gain.astype(jnp.float32)).astype(jnp.bfloat16)

        return units

    return fill


def plain(plan: Plan, x: Any) -> Fill:
    """x [8, inner] as it is."""
    return lambda row: lambda column, _: unit(plan, x.at[row], column)


def joined(plan: Plan, parts: Any, logs: Any) -> Fill:
    """Attention from its parts [splits, 8, inner], each with weight exp2(log), in the order of the keys."""
    splits = range(plan.splits)

    def fill(row: Any) -> Units:
        def units(column: Any, _: int) -> jax.Array:
            log = [
                reshaped(plan, logs.at[i, row, pl.ds(column // 8, ROW_UNIT // 8)], (4, 32), UNIT.reduce(2))
                for i in splits
            ]
            top = functools.reduce(jnp.maximum, log)  # a number: the last part is never empty
            weights = [jnp.exp2(one - top) for one in log]
            share = 1 / functools.reduce(jnp.add, weights)
            shares = (lax.broadcast_in_dim(one * share, (4, 32, 8), (0, 1)) for one in weights)
            weighted = [unit(plan, parts.at[i, row], column) * each for i, each in zip(splits, shares, strict=True)]
            return functools.reduce(jnp.add, weighted).astype(jnp.bfloat16)

        return units

    return fill


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

"""What x is in each product phase: how a token's columns are made of what earlier phases wrote.

What other blocks wrote in an earlier phase is read with ordinary loads only, never by TMA: the semaphore's release and
acquire order those, and no proxy fence is needed. What no block writes is read before the grid barrier: building a
`Prologue` loads the norm's gains.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..common.tiles import store
from .block import Block
from .memory import Ref
from .phase import ProductPhase, Prologue
from .plan import UNIT_COLUMNS


def rms_norm(b: Block, phase: ProductPhase) -> Prologue:
    """RMSNorm of x [8, inner]."""
    p, x, gain = b.product(phase), b.buffers.of(phase.reads[0]), b.gain(phase)
    prefetched = b.ops.load_units(gain, own_columns(b, phase, 0))[0] if p.chunks == 1 else []

    def fetch(token: Any, first_step: Any) -> Any:
        columns, row = own_columns(b, phase, first_step), x.at[token]
        (whole,) = b.ops.load_units(row, [jnp.int32(i) for i in range(0, x.shape[1], UNIT_COLUMNS)])
        (own,) = b.ops.load_units(row, columns)  # again, now from the L1 cache
        return whole, own, prefetched or b.ops.load_units(gain, columns)[0]

    def make(fetched: Any) -> list[jax.Array]:
        whole, own, gains = fetched
        squares = functools.reduce(jnp.add, [jnp.square(a.astype(jnp.float32)) for a in whole])
        store(b.scratch.squares.at[b.warpgroup], squares.sum(axis=2).sum(axis=1))  # one per warp
        warps = b.ops.load_scalars(b.scratch.squares, [(b.warpgroup, i) for i in range(4)])
        mean = ((warps[0] + warps[1]) + (warps[2] + warps[3])) * (1 / p.inner)
        scale = lax.rsqrt(mean + b.plan.shape.eps)
        both = zip(own, gains, strict=True)
        return [as_x(b, a.astype(jnp.float32) * scale * g.astype(jnp.float32)) for a, g in both]

    return Prologue(fetch, make)


def plain(b: Block, phase: ProductPhase) -> Prologue:
    """x [8, inner] as it is."""
    return _plain(b, phase, b.buffers.of(phase.reads[0]))


def _plain(b: Block, phase: ProductPhase, x: Ref) -> Prologue:
    def fetch(token: Any, first_step: Any) -> list[jax.Array]:
        return b.ops.load_units(x.at[token], own_columns(b, phase, first_step))[0]

    return Prologue(fetch, lambda units: units)


def join_key_splits(b: Block, phase: ProductPhase) -> Prologue:
    """Attention's output: the mean of its parts [key_splits, 8, inner], each with weight exp2(log), in the order of the
    keys."""
    parts, logs = b.buffers.parts, b.buffers.logs
    if b.plan.key_splits == 1:
        only = _plain(b, phase, parts.at[0])
        return Prologue(only.fetch, lambda units: [as_x(b, a) for a in units])

    def fetch(token: Any, first_step: Any) -> Any:
        columns = own_columns(b, phase, first_step)
        log = b.ops.load_units(logs.at[:, token], [lax.div(column, 8) for column in columns], neighbours=1)
        values = b.ops.load_units(parts.at[:, token], columns)
        return list(zip(zip(*values, strict=True), zip(*log, strict=True), strict=True))  # of each unit

    def join(values: tuple[jax.Array, ...], log: tuple[jax.Array, ...]) -> jax.Array:
        top = functools.reduce(jnp.maximum, log)  # finite: the last part is never empty
        weights = [jnp.exp2(one - top) for one in log]
        inverse = 1 / functools.reduce(jnp.add, weights)
        shares = [b.ops.broadcast_to_unit(one * inverse) for one in weights]
        return as_x(b, functools.reduce(jnp.add, [v * share for v, share in zip(values, shares, strict=True)]))

    return Prologue(fetch, lambda fetched: [join(*unit) for unit in fetched])


# What prologues are made of


def own_units(b: Block, phase: ProductPhase) -> list[Any]:
    """Which units of a token's chunk this consumer makes. With several tokens it makes all units of its tokens; with a
    single token consumers share its units. Indices past the end are no-ops."""
    p = b.product(phase)
    count = p.k_splits * p.held_units
    if b.plan.shape.tokens > 1:
        return [jnp.int32(i) for i in range(count)]
    return [b.warpgroup + i for i in range(0, count, b.plan.tiles.consumers)]


def own_columns(b: Block, phase: ProductPhase, first_step: Any) -> list[Any]:
    """Where this consumer's units begin, in the chunk that begins at stage ``first_step`` of every K split."""
    p = b.product(phase)
    last = p.k_splits * p.held_units - 1
    return [p.column(first_step, jnp.minimum(unit, last)) for unit in own_units(b, phase)]


def as_x(b: Block, x: jax.Array) -> jax.Array:
    """bfloat16, unless `TileOps.store_x` makes limbs of it, which keep more bits."""
    return x if b.plan.shape.fmt.quantized else x.astype(jnp.bfloat16)

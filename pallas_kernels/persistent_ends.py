"""Both ends of the product phases of a decode step: what x is, and what becomes of the sums.

What other blocks wrote in an earlier phase is read with ordinary loads only, never by TMA: a semaphore's release and
acquire order those, and no proxy fence is needed.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.persistent_layouts import outputs, tokens
from pallas_kernels.persistent_plan import ROWS, Product

MOST_IN_FLIGHT = 2048  # columns of x: 128 numbers a thread
WIDEST = 128  # columns of x in which a thread has neighbours: 8 of them, the 16 bytes of a swizzle

Fill = Callable[[Any, int], jax.Array]  # first step, number of steps -> those columns of x
Finish = Callable[[Any, int, list[jax.Array]], None]  # first row, rows, sums [8, rows] of each half


def load(ref: Any, layout: Any) -> jax.Array:
    """A small array from shared or global memory, where banks and coalescing hardly matter."""
    return plgpu.load(ref, layout=layout, optimized=False)


def batch_of(steps: int, step: int) -> int:
    """How many steps of x a warpgroup loads before it uses the first: a load of what another SM wrote takes long."""
    return max(n for n in range(1, MOST_IN_FLIGHT // step + 1) if steps % n == 0)


# What x is


def normalised(x: Any, weight: Any, p: Product, eps: float) -> Fill:
    """RMSNorm of x [8, dim]. Every consumer forms the sums of squares for itself."""
    layout = tokens(WIDEST)

    steps = p.inner // p.step
    batch = batch_of(steps, p.step)

    def read(k: Any, n: int) -> jax.Array:
        return load(x.at[:, pl.ds(k * p.step, n * p.step)], layout).astype(jnp.float32)

    def squares(i: Any, total: Any) -> Any:
        part = read(i * batch, batch)
        return total + (part * part).sum(axis=1)

    zero = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), layout.reduce(1))
    inv_rms = lax.rsqrt(lax.fori_loop(0, steps // batch, squares, zero) * (1 / p.inner) + eps)

    def fill(k: Any, n: int) -> jax.Array:
        part = read(k, n)
        gain = load(weight.at[pl.ds(k * p.step, n * p.step)], layout.reduce(0)).astype(jnp.float32)
        part = part * lax.broadcast_in_dim(inv_rms, part.shape, (0,))
        return (part * lax.broadcast_in_dim(gain, part.shape, (1,))).astype(jnp.bfloat16)

    return fill


def plain(x: Any, p: Product) -> Fill:
    """x [8, inner] as it is."""
    return lambda k, n: load(x.at[:, pl.ds(k * p.step, n * p.step)], tokens(WIDEST))


# What becomes of the sums


def store(out: Any, scale: Callable[[int, Any, int], Any]) -> Finish:
    """The product itself, in ``out``'s dtype."""

    def finish(row: Any, rows: int, sums: list[jax.Array]) -> None:
        out[:, pl.ds(pl.multiple_of(row, 8), rows)] = scale(0, row, rows)(sums[0]).astype(out.dtype)

    return finish


def add_to(residual: Any, out: Any, scale: Callable[[int, Any, int], Any]) -> Finish:
    """The product plus ``residual``, rounded once."""

    def finish(row: Any, rows: int, sums: list[jax.Array]) -> None:
        columns = pl.ds(pl.multiple_of(row, 8), rows)
        before = load(residual.at[:, columns], outputs()).astype(jnp.float32)
        out[:, columns] = (scale(0, row, rows)(sums[0]) + before).astype(out.dtype)

    return finish


def swiglu(out: Any, scale: Callable[[int, Any, int], Any]) -> Finish:
    """silu(gate) * up."""

    def finish(row: Any, rows: int, sums: list[jax.Array]) -> None:
        gate, up = (scale(half, row, rows)(total) for half, total in enumerate(sums))
        out[:, pl.ds(pl.multiple_of(row, 8), rows)] = (gate / (1 + jnp.exp(-gate)) * up).astype(out.dtype)

    return finish


def scaling(scales: Any, p: Product, grouped: bool) -> Callable[[int, Any, int], Any]:
    """``scale(half, row, rows)`` gives what puts the scales of output channels on sums [8, rows]."""

    def scale(half: int, row: Any, rows: int) -> Any:
        if scales is None or grouped:
            return lambda sums: sums
        column = load(scales.at[pl.ds(pl.multiple_of(half * p.out + row, 8), rows), 0], outputs().reduce(0))
        return lambda sums: sums * lax.broadcast_in_dim(column.astype(jnp.float32), sums.shape, (1,))

    return scale

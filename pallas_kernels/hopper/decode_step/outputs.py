"""The outputs that one consumer finishes: what becomes of a product's sums."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from ..common.thread_ops import WARPGROUP_SIZE, load_per_thread, store_per_thread
from .block import Block
from .phase import ProductPhase
from .plan import n_share
from .schedule import loop


@dataclass(frozen=True)
class Outputs:
    """A consumer's share of the N tile of its block. ``pieces`` are (begin, count) within the share, at most one output
    a thread; ``row_scales`` are theirs, of each half, where every row of the weight has one scale."""

    b: Block
    phase: ProductPhase
    row: Any  # where the share begins within the N tile
    outer: Any  # and among all outputs
    pieces: list[tuple[int, int]]
    row_scales: list[list[jax.Array] | None]

    def finish(self) -> None:
        """Finish all outputs, on one device."""

        def one(token: Any, _: Any) -> None:
            for piece, scales in zip(self.pieces, self.row_scales, strict=True):
                self._end(token, *piece, self._sums(token, *piece, scales))

        self._over_tokens(one)

    def send(self) -> None:
        """Give what this device has of the sums to all devices."""
        p, share = self.b.product(self.phase), n_share(self.b.product(self.phase), self.b.plan)
        # Where N tiles or shares overlap, the first has the outputs.
        lowest = jnp.maximum(self.b.index * p.n_tile, p.first_row(self.b.index) + self.b.warpgroup * share)

        def one(token: Any, _: Any) -> None:
            for (at, count), scales in zip(self.pieces, self.row_scales, strict=True):
                (sums,) = self._sums(token, at, count, scales)
                self.b.ops.send(self.b, self.phase, token, self.outer + at, lowest, sums, count)

        self._over_tokens(one)

    def receive(self) -> None:
        """Finish all outputs with the sums over all devices."""

        def one(token: Any, _: Any) -> None:
            for at, count in self.pieces:
                sums = self.b.ops.receive(self.b, self.phase, token, self.outer + at, count)
                self._end(token, at, count, [sums])

        self._over_tokens(one)

    def _over_tokens(self, one: Any) -> None:
        tokens = self.b.plan.shape.tokens
        pl.when(self.b.product(self.phase).has_tile(self.b.index))(lambda: loop(tokens, one, None))

    def _sums(self, token: Any, at: int, count: int, scales: list[jax.Array] | None) -> list[jax.Array]:
        """The sums of all consumers and K splits, in their order, of each half."""
        b, p = self.b, self.b.product(self.phase)
        consumers = b.plan.tiles.consumers
        places = [
            (other, token, (half * p.k_splits + split) * p.n_tile + self.row + at)
            for half in range(p.halves)
            for other in range(consumers)
            for split in range(p.k_splits)
        ]
        parts, some = load_per_thread(b.plan, b.memory(self.phase).sums, places, count), consumers * p.k_splits
        halves = [functools.reduce(jnp.add, parts[i : i + some]) for i in range(0, len(parts), some)]
        return halves if scales is None else [a * s for a, s in zip(halves, scales, strict=True)]

    def _end(self, token: Any, at: int, count: int, halves: list[jax.Array]) -> None:
        """The epilogue, and the store."""
        b, phase, residual = self.b, self.phase, None
        out = b.buffers.of(phase.writes[0])
        if phase.residual is not None:
            prefetched = load_per_thread(b.plan, b.scratch.residual, [(b.warpgroup, token, at)], count)
            residual = prefetched[0].astype(jnp.float32)
        result = phase.epilogue(halves, residual).astype(out.dtype)
        store_per_thread(b.plan, out, [(token, self.outer + at)], [result], count)


def own_outputs(b: Block, phase: ProductPhase) -> Outputs:
    """This consumer's outputs. What they need besides the sums is read now: no earlier block writes it."""
    p = b.product(phase)
    share = n_share(p, b.plan)
    row = pl.multiple_of(jnp.minimum(b.warpgroup * share, p.n_tile - share), 8)
    outer = pl.multiple_of(p.first_row(b.index) + row, 8)
    pieces = [(at, min(WARPGROUP_SIZE, share - at)) for at in range(0, share, WARPGROUP_SIZE)]
    row_scales = [_row_scales(b, phase, outer + at, some) for at, some in pieces]
    if phase.residual is not None:
        _prefetch_residual(b, phase, outer, pieces)
    return Outputs(b, phase, row, outer, pieces, row_scales)


def _row_scales(b: Block, phase: ProductPhase, outer: Any, some: int) -> list[jax.Array] | None:
    """The scales of int8 weights of ``some`` outputs, of each half: one scale per row."""
    fmt, p = b.plan.shape.fmt, b.product(phase)
    if not fmt.quantized or fmt.grouped:
        return None
    scales = b.weight(phase)[1].at[:, 0]
    return load_per_thread(b.plan, scales, [(half * p.outer + outer,) for half in range(p.halves)], some)


def _prefetch_residual(b: Block, phase: ProductPhase, outer: Any, pieces: list[tuple[int, int]]) -> None:
    """Prefetch the residual to shared memory; the previous phase did not write it."""
    assert phase.residual is not None
    residual, tokens = b.buffers.of(phase.residual), range(b.plan.shape.tokens)
    values = [load_per_thread(b.plan, residual, [(t, outer + at) for t in tokens], some) for at, some in pieces]
    for (at, some), rows in zip(pieces, values, strict=True):
        store_per_thread(b.plan, b.scratch.residual, [(b.warpgroup, t, at) for t in tokens], rows, some)

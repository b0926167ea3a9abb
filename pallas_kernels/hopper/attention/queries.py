"""Where decode attention gets its queries: from an array, or from the output of the QKV product.

`GivenQueries` are ready, and their keys and values are in the cache. `NewTokens` are the outputs of the QKV product.
They may be K splits, which are added first. Their heads are rotated on the way to shared memory. Their keys and values
are put into the tile that holds their positions, and into the cache. So attention never reads from global memory what
its own launch writes.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.utils import when
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from ..common.layouts import one_per_thread
from ..common.limbs import swizzled_store
from ..common.thread_ops import (
    SCALAR,
    WARPGROUP_SIZE,
    add,
    aligned_load,
    aligned_store,
    as_i32,
    as_indices,
    div,
    load_per_thread,
    mul,
    rem,
    store_per_thread,
    thread_in_warpgroup,
)
from ..common.tiles import transforms_of
from .cache import Cache, Ref

GRANULE = 8  # 16-bit numbers in 16 bytes: what a swizzle moves as one, and what a thread copies at a time
Row = tuple[jax.Array, jax.Array]  # the halves of a head, one number a thread; there are D / 2 of each


@dataclass(frozen=True)
class Place:
    """A block's row of the batch and key head, and where its queries go in shared memory."""

    row: Any
    head: Any
    rows: int  # of the query tile that each query has
    heads: Any  # all of these rows, as a slice whose start is no constant
    q: Ref  # [QUERY_TILE, D]
    q_full: Ref | None  # barrier, for `GivenQueries`
    new: Ref | None  # [2, T, D], for the keys and values of `NewTokens`


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GivenQueries:
    """Queries after rotary. On the host the field is an array, in a kernel a reference."""

    q: Any  # [B, T, kv_heads, group, D]

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """B, T, kv_heads, group, D."""
        return self.q.shape

    @property
    def dtype(self) -> Any:
        return self.q.dtype

    def begin(self, place: Place) -> None:
        """Start to load the queries of a block."""
        # The copies fill rows past the end of q's heads with zeros, and the copies of the result drop them. JAX 0.12
        # refuses such a slice if its start is a constant. Rows of the tile that no query has are never written: what
        # comes of them is not used.
        for t in range(self.shape[1]):
            own = place.q.at[pl.ds(t * place.rows, place.rows)]
            plgpu.copy_gmem_to_smem(self.q.at[place.row, t, place.head, place.heads], own, place.q_full)

    def finish(self, place: Place, begun: None) -> None:
        """Have the queries in shared memory; ``begun`` is what `begin` gave."""
        plgpu.barrier_wait(place.q_full)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NewTokens:
    """What the QKV product gives for new tokens. On the host the fields are arrays, in a kernel references."""

    y: Any  # [k_splits, B, T, heads + 2 * kv_heads, D]: the heads of q, of k and of v, before rotary
    cos: Any  # [B, T, D / 2] float32
    sin: Any
    kv_heads: int = field(metadata=dict(static=True))
    dtype: Any = field(metadata=dict(static=True))  # of queries and cache, to which the sum of the K splits is rounded
    interpret: bool = field(metadata=dict(static=True))

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """B, T, kv_heads, group, D of the queries."""
        _, B, T, heads, D = self.y.shape
        return B, T, self.kv_heads, heads // self.kv_heads - 2, D

    def begin(self, place: Place) -> list[tuple[Row, list[jax.Array]]]:
        """Start to load the rotations, and the heads of q, k and v that a block needs, for every token: the K splits of
        each half head."""
        _, T, kv_heads, group, D = self.shape
        half, key, splits = D // 2, kv_heads * group + place.head, range(self.y.shape[0])
        own = [*(place.head * group + g for g in range(group)), key, key + kv_heads]

        def token(t: int) -> tuple[Row, list[jax.Array]]:
            at = place.row, t
            rotation = tuple(load_per_thread(self, a, [(*at, 0)], half)[0] for a in (self.cos, self.sin))
            places = [(i, *at, head, begin) for head in own for begin in (0, half) for i in splits]
            return rotation, load_per_thread(self, self.y, places, half)  # pyright: ignore[reportReturnType]

        return [token(t) for t in range(T)]

    def finish(self, place: Place, begun: list[tuple[Row, list[jax.Array]]]) -> None:
        """Add K splits, rotate, and have the queries and the new keys and values in shared memory."""
        half, splits = self.shape[4] // 2, self.y.shape[0]
        for t, (rotation, parts) in enumerate(begun):
            sums = [functools.reduce(jnp.add, parts[i : i + splits]) for i in range(0, len(parts), splits)]
            halves = [a.astype(self.dtype) for a in sums]
            *queries, key, value = zip(halves[::2], halves[1::2], strict=True)
            _store_queries(self, place.q, t * place.rows, [_rotate(head, rotation) for head in queries])
            for i, new in enumerate((_rotate(key, rotation), value)):
                store_per_thread(self, place.new, [(i, t, 0), (i, t, half)], new, half)
        plgpu.commit_smem()

    def add_to_tile(
        self, place: Place, cache: Cache, found: tuple[Any, ...], t: int, slot: Any, tiles: tuple[Ref, Ref]
    ) -> None:
        """Put the key and value of token ``t`` into the cache, where `Cache.find` has ``found`` its position, and into
        slot ``slot`` of the ``tiles`` of keys and values, the same position; nothing where the cache has no room."""
        exists, at = found
        pl.when(exists)(lambda: _write_new(self, place.new, t, tiles, slot, (cache.k, cache.v), at))


def _rotate(row: Row, rotation: Row) -> Row:
    """As the reference does it: in float32, rounded once."""
    (a, b), (cos, sin) = (x.astype(jnp.float32) for x in row), rotation
    return (a * cos - b * sin).astype(row[0].dtype), (b * cos + a * sin).astype(row[0].dtype)


def _store_queries(tokens: NewTokens, q: Ref, first: int, heads: Sequence[Row]) -> None:
    """Write heads to the rows of the query tile from ``first`` on."""
    D = tokens.shape[4]
    half = D // 2
    if tokens.interpret:
        for g, (a, b) in enumerate(heads):
            q[first + g] = jnp.concatenate([a[:half], b[:half]])
        return

    transforms = transforms_of(D, tokens.dtype)
    row = one_per_thread(WARPGROUP_SIZE)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(transforms), ((row, row),) * len(heads)))
    def store(_: Any, q: Any, heads: Any) -> None:
        thread = thread_in_warpgroup()
        with when(arith.cmpi(arith.CmpIPredicate.ult, thread, as_i32(half))):
            for g, halves in enumerate(heads):
                for i, numbers in enumerate(halves):
                    at = add(thread, i * half)
                    swizzled_store(numbers.registers.item(), q, transforms, GRANULE, None, as_i32(first + g), at)

    store(q, tuple(heads))  # type: ignore[call-arg]


def _write_new(tokens: NewTokens, new: Ref, t: int, tiles: tuple[Ref, Ref], slot: Any, arrays: tuple[Ref, Ref],
               at: tuple[Any, ...]) -> None:  # fmt: skip
    """Write new[:, t], a key and a value, to row ``slot`` of the two tiles, and to ``arrays`` at ``at``."""
    D = tokens.shape[4]
    if tokens.interpret:
        for i, (tile, array) in enumerate(zip(tiles, arrays, strict=True)):
            tile[slot] = array[at] = new[i, t]
        return

    transforms, scalars = transforms_of(D, tokens.dtype), (SCALAR,) * (1 + len(at))
    memory = (plgpu.RefType(), (plgpu.RefType(transforms),) * 2, (plgpu.RefType(),) * 2)

    @plgpu.inline_mgpu(arg_types=(*memory, scalars))
    def write(_: Any, new: Any, tiles: Any, arrays: Any, scalars: Any) -> None:
        slot, *place = (a.registers.item() for a in scalars)
        thread = thread_in_warpgroup()
        which, first = div(thread, D // GRANULE), mul(rem(thread, D // GRANULE), GRANULE)
        for i in range(2):
            with when(arith.cmpi(arith.CmpIPredicate.eq, which, as_i32(i))):
                numbers = aligned_load(new, as_indices(i, t, first), GRANULE)
                swizzled_store(numbers, tiles[i], transforms, GRANULE, None, slot, first)
                aligned_store(numbers, arrays[i], as_indices(*place, first))

    write(new, tiles, arrays, tuple(jnp.int32(a) for a in (slot, *at)))  # type: ignore[call-arg]

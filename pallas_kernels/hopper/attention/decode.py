"""Decode attention on Hopper: a few queries a row against a long cache. The bytes of the cache bound it.

The queries that share a key head are rows of one product, so the cache is read once. Where rows and key heads are too
few to fill the multiprocessors, the keys of a row are split over blocks. Then each block writes the attention over its
split and the logarithm of its softmax sum, and the splits are joined in the order of the keys, so the result does not
depend on which block finished first. The keys lie in rows of their own or in pages: see `cache`. The queries are given,
or are made of the QKV product, whose keys and values are then written to the cache in the same launch: see `queries`.
"""

import functools
from collections.abc import Sequence
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
from ..common.online_softmax import QUERY_TILE
from ..common.tiles import pad_rows_unless_short
from . import prefill
from .cache import Cache, Ref
from .decode_block import DecodeTiles, Queries, Scratch, query_rows, run_block
from .queries import GivenQueries, NewTokens

FUSED_SPLITS = 16  # more splits than this are joined by reductions
TILES = {64: DecodeTiles(stages=5), 128: DecodeTiles()}  # by head_dim
# Of as many blocks as multiprocessors or more, several share a multiprocessor: one loads while another begins or ends.
SHARED_TILES = {64: DecodeTiles(stages=2), 128: DecodeTiles(keys=64, stages=2)}


def check(q: jax.Array, k: jax.Array | LayerView, v: jax.Array | LayerView, start: jax.Array) -> None:
    """Raise `Unsupported` where `flash_decode` cannot run these arguments."""
    prefill.check(q, k, v, start)
    if (rows := query_rows(q.shape[1], q.shape[2] // k.shape[1])) > QUERY_TILE:
        raise Unsupported(
            f"at most {QUERY_TILE} query rows a key head (queries times heads that share it, "
            f"these in whole eights), found {rows}"
        )


def check_paged(q: jax.Array, k: jax.Array, v: jax.Array, table: jax.Array, start: jax.Array, *, layer: Any) -> None:
    """Raise `Unsupported` where `flash_decode_paged` cannot run these arguments."""
    prefill.check_paged(q, k, v, table, start, layer=layer)
    check(q, LayerView(k, layer), LayerView(v, layer), start)


def check_and_write(
    y: jax.Array,
    k: jax.Array,
    v: jax.Array,
    table: jax.Array | None,
    start: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    layer: Any,
) -> None:
    """Raise `Unsupported` where `flash_decode_and_write` cannot run these arguments."""
    (B, T, columns), (*_, cached, kv_heads, size, D) = y.shape, k.shape
    if k.shape != v.shape or k.ndim != (4 if layer is None else 5) or (table is None and cached != B):
        raise Unsupported(f"k and v must have one shape and layers of the batch: found k {k.shape} and v {v.shape}")
    if columns % D or columns <= 2 * kv_heads * D:
        raise Unsupported(f"{columns} outputs are not q's heads and 2 x {kv_heads} heads of {D}")
    if cos.shape != sin.shape or cos.shape != (B, T, D // 2) or not cos.dtype == sin.dtype == jnp.float32:
        raise Unsupported(f"cos {cos.shape} and sin {sin.shape} are not float32 {(B, T, D // 2)}")
    q: Any = jax.ShapeDtypeStruct((B, T, columns // D - 2 * kv_heads, D), y.dtype)
    k, v = (jax.ShapeDtypeStruct((1, *a.shape[-4:]), a.dtype) for a in (k, v))  # type: ignore[assignment]
    if table is not None:
        check_paged(q, k, v, table, start, layer=0)
        return
    if size % 8:
        raise Unsupported(f"a cache of {size} positions: must be a multiple of 8 to be written in place")
    check(q, LayerView(k, 0), LayerView(v, 0), start)


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
    return _attend(q, Cache.in_place(k, v, table, layer), start, tiles, interpret)


@functools.partial(jax.jit, static_argnames=("tiles", "interpret"))
def flash_decode_and_write(
    y: jax.Array,
    k: jax.Array,
    v: jax.Array,
    table: jax.Array | None,
    start: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    layer: jax.Array | int | None,
    tiles: DecodeTiles | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `attend_and_write_reference`; y may also be K splits [k_splits, B, T, ...]. Inside a jit that owns k and v,
    they are changed in place."""
    (B, T, _), (*_, kv_heads, _, D) = cos.shape, k.shape
    stacked = k.reshape(-1, *k.shape[-4:]), v.reshape(-1, *v.shape[-4:])
    heads = y.reshape(-1, B, T, y.shape[-1] // D, D)
    tokens = NewTokens(heads, cos, sin, kv_heads, k.dtype, interpret is not None)
    plan = Plan.of(tokens, Cache.in_place(*stacked, table, layer), tiles)
    empty = [lax.empty(a.shape, dtype=a.dtype) for a in plan.outputs(tokens)]

    def run(state: tuple[tuple[Ref, Ref], list[Ref]]) -> None:
        (k, v), outputs = state
        cache = Cache.in_place(k, v, table, layer)
        for ref, found in zip(outputs, plan.launch(tokens, cache, start, interpret), strict=True):
            ref[...] = found

    # Not jax.new_ref: a function with such effects has no rule under jax.custom_jvp.
    written, outputs = pl.run_state(run)((stacked, empty))
    return plan.joined(tokens, outputs).reshape(B, T, -1), *(a.reshape(k.shape) for a in written)


def _attend(
    q: jax.Array, cache: Cache, start: jax.Array, tiles: DecodeTiles | None, interpret: plgpu.InterpretGPUParams | None
) -> jax.Array:
    B, T, _, D = q.shape
    given = q.reshape(B, T, cache.k.shape[2], -1, D)
    queries = GivenQueries(pad_rows_unless_short(given, 3))
    plan = Plan.of(queries, cache, tiles)
    out = plan.joined(queries, plan.launch(queries, cache, start, interpret))
    return out[:, :, :, : given.shape[3]].reshape(q.shape)


@dataclass(frozen=True)
class Plan:
    """The tiles of a launch, and into how many splits the keys of a row are divided."""

    tiles: DecodeTiles
    splits: int

    @staticmethod
    def of(queries: Queries, cache: Cache, tiles: DecodeTiles | None) -> "Plan":
        """For these arguments; ``tiles`` None: those that were quickest."""
        B, _, kv_heads, _, D = queries.shape
        tiles = tiles or (SHARED_TILES if B * kv_heads >= planned().sms else TILES)[D]
        splits = min((tiles.blocks or planned().sms) // (B * kv_heads), pl.cdiv(cache.positions, tiles.keys))
        return Plan(tiles, max(1, splits))

    def outputs(self, queries: Queries) -> list[jax.ShapeDtypeStruct]:
        """Attention over each split of the keys, [B, kv_heads, splits, T, group, D], and log2 of its softmax sum,
        [B, kv_heads, splits, QUERY_TILE], both in float32. With one split, attention alone,
        [B, T, kv_heads, group, D]. A group of more than 8 heads is padded to whole eights."""
        B, T, kv_heads, group, D = queries.shape
        group = group if group < 8 else query_rows(1, group)
        if self.splits == 1:
            return [jax.ShapeDtypeStruct((B, T, kv_heads, group, D), queries.dtype)]
        parts = (B, kv_heads, self.splits)
        return [
            jax.ShapeDtypeStruct((*parts, T, group, D), jnp.float32),
            jax.ShapeDtypeStruct((*parts, QUERY_TILE), jnp.float32),
        ]

    def launch(
        self, queries: Queries, cache: Cache, start: jax.Array, interpret: plgpu.InterpretGPUParams | None
    ) -> Sequence[jax.Array]:
        """Run the kernel; what `outputs` says."""
        B, _, kv_heads, _, _ = queries.shape
        whole = self.splits == 1
        scratch = Scratch.types(queries, cache, self.tiles, whole=whole, interpret=interpret is not None)
        arguments, structure = jax.tree.flatten((queries, cache))

        def body(start_ref: Ref, *refs: Ref) -> None:
            *refs, scratch = refs
            queries, cache = jax.tree.unflatten(structure, refs[: len(arguments)])
            outputs = refs[len(arguments) :]
            run_block(start_ref, queries, cache, outputs, scratch, tiles=self.tiles, splits=self.splits)

        name = ("flash_decode", "and_write" * isinstance(queries, NewTokens), "paged" * (cache.table is not None))
        return plgpu.kernel(
            body,
            out_type=tuple(self.outputs(queries)),
            scratch_types=(scratch,),
            grid=(self.splits, kv_heads, B),
            grid_names=("split", "head", "b"),
            interpret=interpret,
            kernel_name="_".join(filter(None, name)),
            compiler_params=plgpu.CompilerParams(approx_math=True),
        )(start, *arguments)

    def joined(self, queries: Queries, found: Sequence[jax.Array]) -> jax.Array:
        """Attention [B, T, kv_heads, group, D] from what `launch` gave."""
        _, T, _, group, _ = queries.shape
        if self.splits == 1:
            return found[0][:, :, :, :group]
        outputs, logs = found
        logs = logs[:, :, :, : query_rows(T, group)].reshape(*outputs.shape[:4], -1, 1)
        out = join(outputs, logs[:, :, :, :, : outputs.shape[4]])
        return out.astype(queries.dtype).swapaxes(1, 2)[:, :, :, :group]


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

"""The attention phases of a decode step as functions over tiles: parts of the keys, with rotary and the cache write,
then the parts joined.

An *item* is a row of the batch, a key head and a part of that row's cached keys. Its queries are all 8 token rows of
all heads that share the key head, whichever row of the batch they belong to: what a row computes against the cache of
another is not stored. The new keys are no part of the cache yet. They are one more tile, the same for all rows of the
batch, in which a token sees its own row up to itself; the item with the last part of the keys adds it, and writes it.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.persistent_ends import load
from pallas_kernels.persistent_layouts import line, pairs, tokens
from pallas_kernels.persistent_plan import ROWS, Plan
from pallas_kernels.persistent_products import Refs
from pallas_kernels.softmax_tiles import ROWS as TILE
from pallas_kernels.softmax_tiles import hide, no_keys, rescale, soften, weigh


def attend(plan: Plan, layer: Any, block: Any, refs: Refs, smem: Refs) -> None:
    """Every item of this block, by one warpgroup."""

    def turn(i: Any, _: Any) -> None:
        item = i * plan.blocks + block
        row_and_head, split = item // plan.splits, lax.rem(item, plan.splits)
        b, head = row_and_head // plan.shape.kv_heads, lax.rem(row_and_head, plan.shape.kv_heads)
        one_item(plan, layer, b, head, split, refs, smem)

    lax.fori_loop(0, (plan.items - block + plan.blocks - 1) // plan.blocks, turn, None)


def one_item(plan: Plan, layer: Any, b: Any, head: Any, split: Any, refs: Refs, smem: Refs) -> None:
    """Attention of the queries over a part of the cache, and over the new keys where it is the last part."""
    shape, keys, stages = plan.shape, plan.tiles.keys, plan.tiles.stages
    scale = shape.head_dim**-0.5 * math.log2(math.e)
    start = refs["start"][b]
    count = (start + keys - 1) // keys
    low, high = split * count // plan.splits, (split + 1) * count // plan.splits
    k_cache, v_cache = (refs[name].at[layer, b, head] for name in ("k", "v"))

    def fetch(j: Any) -> None:
        slot, part = lax.rem(j - low, stages), pl.ds(j * keys, keys)
        plgpu.copy_gmem_to_smem(k_cache.at[part], smem["k"].at[slot], smem["keys_full"].at[slot])
        plgpu.copy_gmem_to_smem(v_cache.at[part], smem["v"].at[slot], smem["keys_full"].at[slot])

    plgpu.commit_smem()  # ordinary accesses to what shares this memory are over before TMA writes it
    lax.fori_loop(low, jnp.minimum(low + stages, high), lambda j, _: fetch(j), None)
    for g in range(shape.group):
        smem["q"].at[pl.ds(g * ROWS, ROWS)][...] = rotated(plan, head * shape.group + g, refs)
    plgpu.commit_smem()

    def scores(slot: Any) -> jax.Array:
        def product(acc: Any) -> jax.Array:
            plgpu.wgmma(acc, smem["q"], smem["k"].at[slot].T)
            return acc[...]

        return pl.run_scoped(product, plgpu.ACC((TILE, keys), jnp.float32))

    def add(s: jax.Array, slot: Any, carry: Any) -> Any:
        acc, m, total = carry
        p, alpha, m, total = soften(s, m, total, scale)
        acc = weigh(rescale(acc, alpha), p.astype(jnp.bfloat16), smem["v"].at[slot], smem.get("weights"))
        return acc, m, total

    def cached(j: Any, carry: Any) -> Any:
        slot = lax.rem(j - low, stages)
        plgpu.barrier_wait(smem["keys_full"].at[slot])
        carry = add(hide(scores(slot), start - 1 - j * keys), slot, carry)

        @pl.when(j + stages < high)
        def _() -> None:
            fetch(j + stages)

        return carry

    def new(carry: Any) -> Any:
        new_tile(plan, head, refs, smem)
        write_cache(plan, b, start, k_cache, v_cache, smem)
        slot = jnp.minimum(low, 0)  # 0, but no literal: pallas does not close over those
        return add(visible(scores(slot), shape.queries), slot, carry)

    zeros = plgpu.layout_cast(jnp.zeros((TILE, shape.head_dim), jnp.float32), plgpu.Layout.WGMMA)
    carry = lax.fori_loop(low, high, cached, (zeros, *no_keys()))
    last = (split == plan.splits - 1).astype(jnp.int32)
    acc, m, total = lax.fori_loop(0, last, lambda _, carry: new(carry), carry)

    share = 1 / jnp.where(total > 0, total, 1.0)  # a part without keys is zero, not 0 / 0
    smem["part"][...] = rescale(acc, share)
    smem["log"][...] = m + jnp.log2(total)
    D = shape.head_dim
    for g in range(shape.group):
        column = head * shape.group + g

        def save(t: Any, _: Any, g: int = g, column: Any = column) -> None:
            token = b * shape.queries + t
            place = refs["parts"].at[split, token, pl.ds(column * D, D)]
            place[...] = load(smem["part"].at[g * ROWS + token], line(D))
            refs["logs"][split, column, token] = smem["log"][g * ROWS + token]

        lax.fori_loop(0, shape.queries, save, None)


def rotated(plan: Plan, column: Any, refs: Refs) -> jax.Array:
    """One head of all tokens [8, D], turned by the tokens' positions; in float32, as the reference does."""
    D, layout = plan.shape.head_dim, pairs()
    first, second = (
        load(refs["qkv"].at[:, pl.ds(column * D + half * (D // 2), D // 2)], layout).astype(jnp.float32)
        for half in range(2)
    )
    cos, sin = load(refs["cos"], layout), load(refs["sin"], layout)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=1)
    return turned.astype(jnp.bfloat16)


def new_tile(plan: Plan, head: Any, refs: Refs, smem: Refs) -> None:
    """The new keys and values of a key head as a tile of their own, in the place of the first cached one."""
    shape, D, rest = plan.shape, plan.shape.head_dim, plan.tiles.keys - ROWS
    k = rotated(plan, shape.heads + head, refs)
    column = (shape.heads + shape.kv_heads + head) * D
    v = load(refs["qkv"].at[:, pl.ds(column, D)], pairs())
    # Weights of keys that are not there are zero, but zero times what happens to lie there may be no number.
    token = plgpu.broadcasted_iota(jnp.int32, (ROWS, D), 0, layout=pairs())
    v = jnp.where(token < shape.rows, v.astype(jnp.float32), 0.0).astype(jnp.bfloat16)
    zeros = plgpu.layout_cast(jnp.zeros((rest, D), jnp.bfloat16), pairs())
    for name, value in (("k", k), ("v", v)):
        smem[name].at[0, pl.ds(0, ROWS)][...] = value
        smem[name].at[0, pl.ds(ROWS, rest)][...] = zeros
        smem[f"new_{name}"][...] = value
    plgpu.commit_smem()


def write_cache(plan: Plan, b: Any, start: Any, k_cache: Any, v_cache: Any, smem: Refs) -> None:
    """Put the new keys and values of row ``b`` behind its length; what has no room is dropped."""
    shape = plan.shape

    def token(t: Any, _: Any) -> None:
        @pl.when(start + t < shape.max_len)
        def _() -> None:
            for cache, new in ((k_cache, smem["new_k"]), (v_cache, smem["new_v"])):
                cache.at[start + t][...] = load(new.at[b * shape.queries + t], line(shape.head_dim))

    lax.fori_loop(0, shape.queries, token, None)


def visible(s: jax.Array, queries: int) -> jax.Array:
    """Scores [64, keys] of the new keys: token row i % 8 sees those of its own row of the batch, up to itself."""
    row = lax.rem(plgpu.broadcasted_iota(jnp.int32, s.shape, 0, layout=plgpu.Layout.WGMMA), ROWS)
    key = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=plgpu.Layout.WGMMA)
    return jnp.where((key <= row) & (lax.div(key, queries) == lax.div(row, queries)), s, -jnp.inf)


def join(plan: Plan, block: Any, refs: Refs) -> None:
    """Attention from its parts, each with weight exp2(log), in the order of the keys; a block takes whole heads."""
    D = plan.shape.head_dim
    layout = tokens(D)

    def head(i: Any, _: Any) -> None:
        column = i * plan.blocks + block

        def part(split: Any) -> tuple[jax.Array, jax.Array]:
            values = load(refs["parts"].at[split, :, pl.ds(column * D, D)], layout)
            return values, load(refs["logs"].at[split, column], layout.reduce(1))

        def add(split: Any, carry: Any) -> Any:
            values, top, total = carry
            more, log = part(split)
            new_top = jnp.maximum(top, log)
            old, weight = jnp.exp2(top - new_top), jnp.exp2(log - new_top)
            return rescale(values, old) + rescale(more, weight), new_top, total * old + weight

        # The last part is never empty, so that the maximum is a number from the start.
        values, top = part(plan.splits - 1)
        one = plgpu.layout_cast(jnp.ones((ROWS,), jnp.float32), layout.reduce(1))
        values, _, total = lax.fori_loop(0, plan.splits - 1, add, (values, top, one))
        joined = rescale(values, 1 / total).astype(jnp.bfloat16)
        refs["attention"].at[:, pl.ds(column * D, D)][...] = joined

    lax.fori_loop(0, (plan.shape.heads - block + plan.blocks - 1) // plan.blocks, head, None)

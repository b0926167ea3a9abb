"""Where a QKV product puts keys and values: into rows of a cache, or into pages that a table lists."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .large_m_block import Operands
from .large_m_plan import LargeMProblem, Rotary

Found = tuple[jax.Array, ...]  # four scalars, see `page_places`


def page_places(
    table: jax.Array, start: jax.Array, pages: int, size: int, problem: LargeMProblem, chunk: int
) -> jax.Array:
    """Where the tokens of every chunk go, int32 [rows / chunk, 4]: the page of the first token, and its slot there; and
    the page after that, with the slot that the first token would have there, which is negative.

    A chunk is copied to both places, and what lies outside of a page is dropped. So a chunk without a page has slots
    past the end of one, in one place, and ``-chunk`` in the other. It is the same for all layers: XLA computes it once.
    """
    rotary = problem.rotary
    assert rotary is not None
    first, real = jnp.arange(0, problem.rows, chunk), rotary.batch * rotary.tokens
    row, token = jnp.divmod(jnp.minimum(first, real - 1), rotary.tokens)
    number, slot = jnp.divmod(start[row] + token, size)

    def page_of(number: jax.Array) -> tuple[jax.Array, jax.Array]:
        page = table.at[row, number].get(mode="fill", fill_value=pages)
        exists = (page >= 0) & (page < pages) & (first < real)
        return jnp.where(exists, page, 0), exists

    (page, exists), (following, goes_on) = page_of(number), page_of(number + 1)
    # Two chunks without a page have different slots: the interpreter takes writes to one slot for a race.
    where = page, jnp.where(exists, slot, size + first), following, jnp.where(goes_on, slot - size, -chunk)
    return jnp.stack(where, axis=1).astype(jnp.int32)


def find_in_pages(operands: Operands, row: Any, tokens: int) -> Found | None:
    """Where the chunk of ``tokens`` from ``row`` on goes; None for a cache without pages. It is loaded, so find it
    before it is needed."""
    if operands.places is None:
        return None
    return tuple(operands.places[lax.div(row, tokens), i] for i in range(4))


@dataclass(frozen=True)
class CachedHead:
    """The head of keys or values that outputs from ``out`` on belong to."""

    operands: Operands
    rotary: Rotary
    cache: Any  # operands.k or operands.v
    key_heads: int  # of the product's heads, those between q's and the cache's own
    out: Any

    def slots(self, row: Any, shape: tuple[int, int]) -> Any:
        """Where a chunk [tokens, outputs] belongs in a cache without pages.

        Chunks after the last token go past the cache's end, where nothing is written: each to a place of its own."""
        operands, rotary = self.operands, self.rotary
        (tokens, width), rows = shape, rotary.batch * rotary.tokens
        first = jnp.minimum(row, rows - 1)
        sequence = lax.div(first, rotary.tokens)
        slot = jnp.where(
            row < rows, operands.start[sequence] + lax.rem(first, rotary.tokens), self.cache.shape[1] + row
        )
        head = lax.div(self.out, rotary.head_dim) - rotary.heads - self.key_heads
        plane = (operands.cache_layer[0] * rotary.batch + sequence) * rotary.kv_heads + head
        return self.cache.at[plane, pl.ds(slot, tokens), pl.ds(lax.rem(self.out, rotary.head_dim), width)]

    def copy_to_pages(self, place: Any, found: Found) -> None:
        """Copy a chunk [tokens, outputs] from shared memory to its page, and to the next one if it goes on there."""
        rotary, (tokens, width) = self.rotary, place.shape
        page, slot, following, before = found
        head = lax.div(self.out, rotary.head_dim) - rotary.heads - self.key_heads
        columns = pl.ds(lax.rem(self.out, rotary.head_dim), width)

        def plane(page: Any) -> Any:
            return (self.operands.cache_layer[0] * rotary.pages + page) * rotary.kv_heads + head

        def one_by_one(i: Any, _: Any) -> None:
            target = self.cache.at[plane(following), pl.ds(before + i, 1), columns]
            plgpu.copy_smem_to_gmem(place.at[pl.ds(i, 1)], target)

        if rotary.interpret:  # the interpreter does not clip a copy to before the first slot
            lax.fori_loop(-before, tokens, one_by_one, None)
        else:
            target = self.cache.at[plane(following), pl.ds(before, tokens), columns]
            pl.when(before > -tokens)(lambda: plgpu.copy_smem_to_gmem(place, target, commit_group=False))
        plgpu.copy_smem_to_gmem(place, self.cache.at[plane(page), pl.ds(slot, tokens), columns])

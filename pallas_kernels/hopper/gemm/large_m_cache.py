"""Where a QKV product puts keys and values: into rows of a cache, or into pages that a table lists."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from .large_m_block import Operands
from .large_m_plan import LargeMProblem, Rotary

Found = tuple[jax.Array, jax.Array]  # a page, and a slot in it


def page_places(
    table: jax.Array, start: jax.Array, pages: int, size: int, problem: LargeMProblem, chunk: int
) -> jax.Array:
    """Where the tokens of every chunk go, int32 [rows / chunk, 2]: a page, and the first token's slot there.

    Every ``start`` is a multiple of ``chunk``, and so is ``size``: no chunk goes on in another page. The copy of a
    chunk that has no page is dropped, because its slots lie past the end of one. The array is the same for all layers:
    XLA computes it once."""
    rotary = problem.rotary
    assert rotary is not None
    first, real = jnp.arange(0, problem.rows, chunk), rotary.batch * rotary.tokens
    row, token = jnp.divmod(jnp.minimum(first, real - 1), rotary.tokens)
    number, slot = jnp.divmod(start[row] + token, size)

    page = table.at[row, number].get(mode="fill", fill_value=pages)
    exists = (page >= 0) & (page < pages) & (first < real)
    # Two chunks without a page have different slots: the interpreter takes writes to one slot for a race.
    where = jnp.where(exists, page, 0), jnp.where(exists, slot, size + first)
    return jnp.stack(where, axis=1).astype(jnp.int32)


def find_in_pages(operands: Operands, row: Any, tokens: int) -> Found | None:
    """Where the chunk of ``tokens`` from ``row`` on goes; None for a cache without pages. It is loaded, so find it
    before it is needed."""
    if operands.places is None:
        return None
    at = lax.div(row, tokens)
    return operands.places[at, 0], operands.places[at, 1]


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
        rows = rotary.batch * rotary.tokens
        first = jnp.minimum(row, rows - 1)
        sequence = lax.div(first, rotary.tokens)
        slot = jnp.where(
            row < rows, operands.start[sequence] + lax.rem(first, rotary.tokens), self.cache.shape[1] + row
        )
        return self._at(rotary.batch, sequence, slot, shape)

    def slots_in_page(self, found: Found, shape: tuple[int, int]) -> Any:
        """The same in a cache with pages, for a chunk whose place was found."""
        page, slot = found
        return self._at(self.rotary.pages, page, slot, shape)

    def _at(self, count: Any, index: Any, slot: Any, shape: tuple[int, int]) -> Any:
        """The slots from ``slot`` on of this head in one of a layer's ``count`` sequences, or pages."""
        rotary, (tokens, width) = self.rotary, shape
        head = lax.div(self.out, rotary.head_dim) - rotary.heads - self.key_heads
        plane = (self.operands.cache_layer[0] * count + index) * rotary.kv_heads + head
        return self.cache.at[plane, pl.ds(slot, tokens), pl.ds(lax.rem(self.out, rotary.head_dim), width)]

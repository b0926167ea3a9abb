"""Paged attention gives what attention over contiguous keys gives, for any order of pages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from h200 import H200

from pallas_kernels import OPS, paged_attention, write_pages
from pallas_kernels.attention import attention_reference
from pallas_kernels.paged_attention import CASES, PAGE

jit_paged = jax.jit(paged_attention, static_argnames="layer")
jit_reference = jax.jit(attention_reference)
LAYERS, HEADS, KV_HEADS, D, SIZE = 2, 4, 2, 8, 16


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def scattered(rows: jax.Array, table: np.ndarray, pages: int) -> jax.Array:
    """[LAYERS, pages, ...]: rows [B, kv_heads, S, D] in the pages that the table names, in layer 1; the rest is NaN."""
    B, kv_heads, S, _ = rows.shape
    out = np.full((LAYERS, pages, kv_heads, SIZE, D), np.nan, np.float32)
    for b in range(B):
        for p in range(S // SIZE):
            out[1, table[b, p]] = rows[b, :, p * SIZE : (p + 1) * SIZE]
    return jnp.asarray(out)


@pytest.mark.parametrize(("queries", "start"), [(1, (0, 17, 47)), (5, (3, 16, 40)), (32, (0, 16, 9))])
def test_it_is_attention_whatever_the_order_of_the_pages(queries: int, start: tuple[int, ...]) -> None:
    table = np.random.RandomState(0).permutation(9).reshape(3, 3).astype(np.int32)
    q, k, v = normal(3, queries, HEADS, D), normal(3, KV_HEADS, 48, D, seed=1), normal(3, KV_HEADS, 48, D, seed=2)
    pools = [scattered(a, table, 9) for a in (k, v)]
    out = jit_paged(q, *pools, table, jnp.asarray(start), layer=1)
    np.testing.assert_array_equal(out, jit_reference(q, k, v, jnp.asarray(start)))


def test_rows_share_pages_and_what_lies_behind_a_row_does_not_matter() -> None:
    k, v = normal(1, KV_HEADS, 48, D, seed=1), normal(1, KV_HEADS, 48, D, seed=2)
    pools = [scattered(a, np.asarray([[4, 0, 2]]), 5).at[1, 1].set(7.0) for a in (k, v)]
    table, start = jnp.asarray([[4, 0, 2], [4, 0, 1], [4, 99, 99]]), jnp.asarray([40, 20, 3])
    q = normal(1, 2, HEADS, D).repeat(3, 0)
    out = jit_paged(q, *pools, table, start, layer=1)
    for row in range(3):  # chunks of one sequence, as rows of one call
        wanted = jit_reference(q[:1], k, v, start[row : row + 1])
        np.testing.assert_allclose(out[row], wanted[0], atol=1e-6)


def test_new_keys_go_to_their_pages_and_nowhere_else() -> None:
    pool, new = normal(LAYERS, 5, KV_HEADS, SIZE, D), normal(3, 4, KV_HEADS, D, seed=1)
    table, start = jnp.asarray([[3, 1], [0, 9], [7, 7]]), jnp.asarray([14, 15, 0])
    out = np.asarray(jax.jit(write_pages, static_argnums=4)(pool, new, table, start, 1))
    wanted = np.asarray(pool).copy()
    for row, at, page, slot in ((0, 0, 3, 14), (0, 1, 3, 15), (0, 2, 1, 0), (0, 3, 1, 1), (1, 0, 0, 15)):
        wanted[1, page, :, slot] = new[row, at]  # what has no page, and what is past the table, is dropped
    np.testing.assert_array_equal(out, wanted)
    past = write_pages(pool, new[:1], jnp.asarray([[0, 1]]), jnp.asarray([30]), 0)
    np.testing.assert_array_equal(past[0, 1, :, 14:], new[0, :2].swapaxes(0, 1))
    np.testing.assert_array_equal(past.at[0, 1, :, 14:].set(pool[0, 1, :, 14:]), pool)


@pytest.mark.parametrize("name", CASES)
def test_a_step_lowers_for_a_gpu_and_donates_its_pool(name: str) -> None:
    heads, kv_heads, D = (CASES[name][key] for key in ("heads", "kv_heads", "head_dim"))
    pool = jax.ShapeDtypeStruct((2, 100, kv_heads, PAGE, D), jnp.bfloat16)
    q, new = (jax.ShapeDtypeStruct((8, 1, n, D), jnp.bfloat16) for n in (heads, kv_heads))
    table, start = jax.ShapeDtypeStruct((8, 16), jnp.int32), jax.ShapeDtypeStruct((8,), jnp.int32)

    def step(q, k, v, new, table, start):
        k, v = (write_pages(a, new, table, start, 1) for a in (k, v))
        return paged_attention(q, k, v, table, start, layer=1, backend="xla"), k, v

    with jax.sharding.use_abstract_mesh(H200):
        jax.jit(step).trace(q, pool, pool, new, table, start).lower(lowering_platforms=("cuda",))
    compiled = jax.jit(step, donate_argnums=(1, 2)).lower(q, pool, pool, new, table, start).compile()
    bytes_of_pool = 2 * 100 * kv_heads * PAGE * D * 2
    assert compiled.memory_analysis().alias_size_in_bytes >= 2 * bytes_of_pool


def test_it_is_among_the_ops() -> None:
    assert OPS["paged_attention"] is paged_attention

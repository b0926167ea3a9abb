"""`forward` gives the same over a paged cache as over a contiguous one."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from h200 import H200

from jllama.cache import init_cache
from jllama.config import LlamaConfig
from jllama.errors import InputError
from jllama.kernels import PAGE, Choice, recorded
from jllama.model import forward
from jllama.paged import PagedCache, init_pages, page_bytes, pages_for
from jllama.params import Params, init
from jllama.stream import pad

jit_forward = functools.partial(jax.jit, static_argnames="last_only")(forward)
CLOSE = {"float32": 1e-5, "bfloat16": 4e-2}


def empty(dtype: str, lengths: tuple[int, ...] = (0, 0, 0)) -> PagedCache:
    table = jnp.asarray([[7, 2, 5], [0, 3, 1], [4, 8, 99]])
    return PagedCache(*init_pages(tiny.CONFIG, 9, dtype), table, jnp.asarray(lengths))


def assert_close(found: jax.Array, wanted: jax.Array, dtype: str) -> None:
    a, b = (np.asarray(x, np.float64) for x in (found, wanted))
    assert np.abs(a - b).max() <= CLOSE[dtype] * np.abs(b).max()


@pytest.mark.parametrize("dtype", CLOSE)
def test_prefill_and_steps_over_pages_equal_those_over_a_contiguous_cache(dtype: str) -> None:
    params, (tokens, lengths) = tiny.model(dtype), pad([tiny.prompt(n) for n in (60, 128, 9)])
    paged, plain = empty(dtype), init_cache(tiny.CONFIG, 3, 3 * PAGE, dtype)
    for new, count in ((tokens, lengths), *((np.full((3, 1), 7 + i), np.ones(3, np.int32)) for i in range(6))):
        (one, paged), (other, plain) = (
            jit_forward(params, jnp.asarray(new), cache, lengths=jnp.asarray(count), last_only=True)
            for cache in (paged, plain)
        )
        assert_close(one, other, dtype)
        np.testing.assert_array_equal(paged.lengths, plain.lengths)


def test_pieces_of_one_prompt_may_be_rows_of_one_call() -> None:
    params, prompt = tiny.model(), tiny.prompt(150)
    whole, _ = jit_forward(params, jnp.asarray([prompt]), init_cache(tiny.CONFIG, 1, 192, "float32"))
    pages = init_pages(tiny.CONFIG, 9, "float32")
    cache = PagedCache(*pages, jnp.asarray([[6, 1, 4]] * 5), jnp.arange(5) * 32)
    rows = jnp.asarray(prompt + [0] * 10).reshape(5, 32)
    logits, _ = jit_forward(params, rows, cache)
    assert_close(logits.reshape(1, 160, -1)[:, :150], whole, "float32")


@pytest.mark.parametrize("tokens", [1, 32])
def test_forward_takes_the_kernel_where_there_is_one(tokens: int) -> None:
    config = LlamaConfig(dim=256, n_layers=1, n_heads=4, n_kv_heads=2, hidden_dim=512, vocab_size=64)

    def run(params: Params, cache: PagedCache, tokens: jax.Array) -> Any:
        return recorded(forward)(params, tokens, cache)[1]

    def trace() -> dict[str, Choice]:
        params = jax.eval_shape(lambda key: init(config, key, dtype=jnp.bfloat16), jax.random.key(0))
        pages = jax.eval_shape(lambda: init_pages(config, 8, jnp.bfloat16))
        numbers = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((16, 2), (16,), (16, tokens))]
        return jax.eval_shape(run, params, PagedCache(*pages, *numbers[:2]), numbers[2]).choices

    assert trace()["paged_attention"].impl == "xla"
    with jax.sharding.use_abstract_mesh(H200):
        assert trace()["paged_attention"] == Choice("pallas", "kernel runs here")


def test_sizes_are_what_they_are() -> None:
    k, v = init_pages(tiny.CONFIG, 3, "bfloat16")
    assert k.nbytes + v.nbytes == 3 * page_bytes(tiny.CONFIG, "bfloat16")
    assert [pages_for(n) for n in (0, 1, PAGE, PAGE + 1)] == [0, 1, 1, 2]
    with pytest.raises(InputError, match="pages: expected at least 1, found 0"):
        init_pages(tiny.CONFIG, 0, "float32")

"""`forward` gives the same over a paged cache as over a contiguous one."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from fake_kernels import faked
from greedy_text import worst_choice
from h200 import H200

from jllama.cache import init_cache
from jllama.config import LlamaConfig
from jllama.engine import steps
from jllama.engine.engine import Engine
from jllama.engine.state import EngineState, Rows, init_state
from jllama.errors import InputError
from jllama.kernels import PAGE, Choice, recorded
from jllama.model import forward
from jllama.paged import PagedCache, init_pages, page_bytes, pages_for
from jllama.params import Params, init, stack
from jllama.step import whole_step
from jllama.stream import pad
from pallas_kernels import record
from pallas_kernels.arch import HOPPER, pinned

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
        choices = trace()
    name = "project_and_attend" if tokens == 1 else "paged_attention"
    assert choices[name] == Choice("pallas", "kernel runs here")
    assert choices.keys() & {"project_and_attend", "attend_and_write", "paged_attention"} == {name}


def test_sizes_are_what_they_are() -> None:
    k, v = init_pages(tiny.CONFIG, 3, "bfloat16")
    assert k.nbytes + v.nbytes == 3 * page_bytes(tiny.CONFIG, "bfloat16")
    assert [pages_for(n) for n in (0, 1, PAGE, PAGE + 1)] == [0, 1, 1, 2]
    with pytest.raises(InputError, match="pages: expected at least 1, found 0"):
        init_pages(tiny.CONFIG, 0, "float32")


# The step in one launch

SMALL = LlamaConfig(
    dim=128, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=64, hidden_dim=256, vocab_size=128, max_seq_len=192
)  # the smallest that the kernel takes


def decode(params: Params, state: EngineState, rows: int, backend: str = "auto") -> Any:
    """The engine's step for ``rows`` rows, all but the last of them real."""
    slots, table = jnp.arange(rows).at[-1].set(99), jnp.arange(3 * rows).reshape(rows, 3).at[-1].set(99)
    return steps.decode(params, state, slots, table, steps=3, kind="greedy", backend=backend)


def engine_arguments() -> tuple[Params, EngineState]:
    params = jax.eval_shape(lambda: init(SMALL, jax.random.key(0), dtype=jnp.bfloat16, stacked=True))
    return params, jax.eval_shape(lambda: init_state(SMALL, 16, 48, jnp.bfloat16))


def test_the_engine_decodes_up_to_8_rows_in_one_launch() -> None:
    def choices(rows: int) -> dict[str, Choice]:
        with record() as found:
            jax.eval_shape(functools.partial(decode, rows=rows), *engine_arguments())
        return found

    assert choices(8)["decode_step"] == Choice("ops", "needs an NVIDIA Hopper GPU, found platform 'cpu'")
    with jax.sharding.use_abstract_mesh(H200):
        for rows in (1, 2, 8):
            assert choices(rows)["decode_step"] == Choice("pallas", "kernel runs here")
            assert choices(rows).keys() == {"decode_step", "draw"}
        assert choices(16)["decode_step"] == Choice("ops", "16 rows: the one launch of a step takes up to 8 rows")


def test_the_engines_step_lowers_to_one_launch_that_changes_the_pool_in_place() -> None:
    call = jax.jit(functools.partial(decode, rows=2), donate_argnums=1)
    params, state = engine_arguments()
    with jax.sharding.use_abstract_mesh(H200):
        text = call.trace(params, state).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 1
    pool = f"tensor<{'x'.join(map(str, state.k.shape))}xbf16>"
    whole = [line for line in text.splitlines() if pool in line and "func" not in line]
    assert whole
    assert not any(word in line for line in whole for word in ("slice", "scatter", "gather", "copy", "pad"))


def test_the_engines_step_is_the_same_in_one_launch_and_op_by_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is passed to the kernel, with the reference in its place. Row 1 ends after its first token."""
    params, prompts = tiny.model(), [tiny.prompt(70), tiny.prompt(63)]
    tokens, lengths = pad(prompts)
    k, v = init_pages(tiny.CONFIG, 9, "float32")
    _, cache = jit_forward(params, tokens, PagedCache(k, v, jnp.arange(6).reshape(2, 3), jnp.zeros(2, jnp.int32)))
    state = init_state(tiny.CONFIG, 4, 9, jnp.float32)
    rows: Rows = jax.tree.map(lambda a: a[:2], state.rows)
    last, limit = jnp.asarray([7, 9]), jnp.asarray([3, 1])
    rows = dataclasses.replace(rows, token=last, length=jnp.asarray(lengths), limit=limit, done=jnp.zeros(2, bool))
    state = steps.join(dataclasses.replace(state, k=cache.k, v=cache.v), jnp.arange(2), rows)
    run = jax.jit(decode, static_argnames=("rows", "backend"))
    wanted, drawn = run(params, state, rows=3, backend="xla")
    assert (drawn.tokens != steps.NO_TOKEN).sum(0).tolist() == [3, 1, 0]

    monkeypatch.setattr("jllama.model.whole_step", faked(whole_step))
    with record() as choices, pinned(HOPPER):
        found, again = run(stack(params), state, rows=3)
    assert choices["decode_step"].impl == "pallas"
    np.testing.assert_array_equal(again.tokens, drawn.tokens)
    np.testing.assert_allclose(again.logprobs, drawn.logprobs, atol=1e-5)
    for a, b in ((found.k, wanted.k), (found.v, wanted.v)):
        np.testing.assert_allclose(a, b, atol=1e-4)
    np.testing.assert_array_equal(found.rows.length, wanted.rows.length)


@pytest.mark.gpu
@pytest.mark.timeout(240)
def test_an_engine_of_8_rows_on_gpu() -> None:
    """Every token is XLA's draw after the tokens before it, or differs from it only by rounding. The same state gives
    the same text. Prompts from the cache have other last pieces, which may round differently."""
    config = LlamaConfig(dim=512, n_layers=3, n_heads=8, n_kv_heads=2, hidden_dim=1024, vocab_size=1024)
    params = init(config, jax.random.key(0), dtype=jnp.bfloat16, stacked=True)
    prompts = [np.random.RandomState(i).randint(3, 1024, 50 + 30 * i).tolist() for i in range(5)]
    engine = Engine(params, slots=8, pages=60, max_len=512)
    run = functools.partial(engine.generate, prompts, max_new_tokens=100, stop_ids=())
    with record() as choices:
        fresh = run()
    assert choices["decode_step"] == Choice("pallas", "kernel runs here")
    engine.params = params  # the cache is forgotten
    assert [c.ids for c in run()] == [c.ids for c in fresh]
    assert engine.statistics.prefix_hits == 0
    cached = run()
    assert engine.statistics.prefix_hits == 519  # whole prompts but for the last token, or all but a short last piece
    for completions in (fresh, cached):
        for prompt, completion in zip(prompts, completions, strict=True):
            assert len(completion.ids) == 100
            assert worst_choice(params, prompt, completion.ids) < 0.1  # logits have a spread of 0.45

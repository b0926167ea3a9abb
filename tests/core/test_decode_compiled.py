"""What XLA compiles for decoding: the cache is updated in place, and compilations are few for all user settings."""

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from math import ceil, log2
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from fake_kernels import GPU, faked
from jax import lax

from jllama import decode, stream
from jllama.cache import cache_bytes, init_cache
from jllama.decode import (
    DecodeState,
    decode_chunk,
    decode_step,
    generate,
    jit_decode_chunk,
    jit_prefill,
    jit_sample_first,
    sample_first,
)
from jllama.params import Params
from jllama.sampling import History, make_sampling
from jllama.stream import CHUNK, MIN_BUCKET, MIN_CACHE, PREFILL_PIECE, Session
from pallas_kernels import OPS

# A cache of 128 MiB, so that weights and activations are negligible. It is only compiled for, not allocated.
LONG = tiny.CONFIG.replace(n_heads=4, n_kv_heads=4, head_dim=32, max_seq_len=65536)


def long_state() -> DecodeState:
    """The shapes of a state with that cache. Nothing is allocated."""

    def make() -> DecodeState:
        cache = init_cache(LONG, 1, LONG.max_seq_len, jnp.float32)
        stops = jnp.zeros((1, 4), jnp.int32)
        return sample_first(
            jnp.zeros((1, LONG.vocab_size)), cache, make_sampling(1), jnp.full(1, 99), stops, History()
        )[0]

    return jax.eval_shape(make)


def assert_in_place(compiled: Any) -> None:
    """Check that the output cache aliases the input cache, and that the temporary memory is too small for a copy of any
    of its arrays (the keys or values of one layer)."""
    memory, cache = compiled.memory_analysis(), cache_bytes(LONG, 1, LONG.max_seq_len, jnp.float32)
    assert memory.alias_size_in_bytes >= cache, "the cache is not donated"
    one_array = cache // (2 * LONG.n_layers)
    assert memory.temp_size_in_bytes < one_array // 2, "a copy of the cache"


def test_the_decode_loop_makes_no_copy_of_the_cache() -> None:
    params = tiny.model(config=LONG)
    assert_in_place(jit_decode_chunk.lower(params, long_state(), steps=4, backend="xla").compile())


def test_the_choice_of_a_platform_makes_no_copy_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where jit does not know for which device it traces, the cache goes through both ways of every op."""
    monkeypatch.setattr("pallas_kernels.arch._gpu", lambda: GPU)
    for name in ("model.attend_and_write", "model.matmul", "model.ffn"):
        monkeypatch.setattr(f"jllama.{name}", faked(OPS[name.partition(".")[2]]))
    lowered = jax.jit(decode_chunk, static_argnames="steps", donate_argnames="state").lower(
        tiny.model(config=LONG), long_state(), steps=4
    )
    assert "stablehlo.case" in lowered.as_text()
    assert_in_place(lowered.compile())


def test_the_first_draw_makes_no_copy_of_the_cache() -> None:
    state = long_state()
    rest = make_sampling(1), jnp.full(1, 99), jnp.zeros((1, 4), jnp.int32), History()
    assert_in_place(jit_sample_first.lower(jnp.zeros((1, LONG.vocab_size)), state.cache, *rest).compile())


def _freezes_finished_rows(params: Params, state: DecodeState, *, steps: int) -> Any:
    """A plausible mistake: finished rows keep their old cache."""

    def step(s: DecodeState, _: None) -> Any:
        new, drawn = decode_step(params, s, backend="xla")
        keep = functools.partial(jnp.where, s.done[:, None, None, None])
        k = tuple(keep(old, a) for old, a in zip(s.cache.k, new.cache.k, strict=True))
        return new.replace(cache=new.cache.replace(k=k)), drawn

    return lax.scan(step, state, length=steps)


def test_settings_that_are_off_cost_nothing() -> None:
    """A greedy chunk is the same program whether or not they are given, and carries no array for them."""
    off = dict(presence_penalty=0.0, frequency_penalty=0.0, min_tokens=0, logit_bias={}, bad_words=())

    def lowered(**settings: object) -> str:
        state = long_state().replace(sampling=make_sampling(1, **settings))
        assert jax.tree.leaves(state.history) == []
        return jax.jit(decode_chunk, static_argnames="steps").lower(tiny.model(config=LONG), state, steps=2).as_text()

    plain = lowered()
    assert lowered(**off) == plain
    assert lowered(logit_bias={5: 1.0}) != plain


@pytest.mark.parametrize(
    ("function", "donated", "message"),
    [(decode_chunk, (), "not donated"), (_freezes_finished_rows, ("state",), "a copy of the cache")],
)
def test_the_test_above_notices_a_copy(function: Callable[..., Any], donated: tuple[str, ...], message: str) -> None:
    jitted = jax.jit(function, static_argnames="steps", donate_argnames=donated)
    with pytest.raises(AssertionError, match=message):
        assert_in_place(jitted.lower(tiny.model(config=LONG), long_state(), steps=4).compile())


MAX_LEN = 200  # not a power of two, like a context that a user types
SMALL = tiny.CONFIG.replace(n_layers=1)
# Each is another structure of `Sampling`: the settings that any row uses. Values are arrays and cause no compilation.
STRUCTURES: dict[str, Callable[[float], dict[str, Any]]] = {
    "greedy": lambda x: {},
    "warm": lambda x: dict(temperature=0.5 + x),
    "top-p": lambda x: dict(temperature=0.5 + x, top_p=0.5 + x / 2),
}


def bound_on_prompt_shapes(max_len: int) -> int:
    """The number of lengths that prompts are padded to: the powers of two from MIN_BUCKET to the size of a piece, or
    to one that holds the context."""
    return int(log2(min(stream.bucket(max_len), PREFILL_PIECE) / MIN_BUCKET)) + 1


def bound_on_cache_sizes(max_len: int) -> int:
    """MIN_CACHE, its doublings below the context, and the context itself."""
    return max(0, ceil(log2(max_len / MIN_CACHE))) + 1


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """The name of every program that XLA compiles while the test runs, with the small ones outside jit. The library's
    jitted functions start with empty caches."""
    for piece in (jit_prefill, jit_sample_first, jit_decode_chunk, decode._jit_generate):
        piece.clear_cache()
    names: list[str] = []

    def listen(event: str, seconds: float, **details: Any) -> None:
        if event.endswith("backend_compile_duration"):
            names.append(re.sub(r"^jit[_(](.*?)\)?$", r"\1", str(details.get("fun_name", event))))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def sweep(lengths: list[int], seed: int) -> None:
    """New sessions, one per length and structure, each with other values, limits and stop tokens."""
    rng = np.random.RandomState(seed)
    for length in lengths:
        for settings in STRUCTURES.values():
            session = Session(tiny.model(config=SMALL), MAX_LEN)
            sampling = make_sampling(1, seed=seed + length, **settings(rng.uniform(0.1, 0.9)))
            stops = tuple(rng.randint(3, 96, rng.randint(0, 4)).tolist())
            for _ in session.run(tiny.prompt(length, seed), int(rng.randint(2, 2 * CHUNK)), sampling, stops):
                pass


def test_compilations_are_bounded_and_then_there_are_none(compiled: list[str]) -> None:
    sizes, shapes = bound_on_cache_sizes(MAX_LEN), bound_on_prompt_shapes(MAX_LEN)
    assert (sizes, shapes) == (2, 5)
    # The first and last length of every bucket, so that the bound is reached.
    sweep([1, 16, 17, 32, 33, 64, 65, 97, 128, 129, 199], seed=0)
    count = Counter(compiled)
    assert shapes <= count["prefill"] <= shapes * sizes
    assert count["sample_first"] == count["decode_chunk"] == len(STRUCTURES) * sizes
    done = len(compiled)
    sweep([2, 9, 30, 40, 60, 90, 180, 198], seed=1)
    assert compiled[done:] == []


def test_another_chunk_length_would_compile_anew(compiled: list[str]) -> None:
    """The counter works: another static argument costs a compilation."""
    for chunk in (4, 5):
        for _ in Session(tiny.model(config=SMALL), MAX_LEN, chunk=chunk).run([5, 6], 9):
            pass
    count = Counter(compiled)
    assert (count["prefill"], count["sample_first"], count["decode_chunk"]) == (1, 1, 2)


def test_generate_outside_jit_is_compiled_once(compiled: list[str]) -> None:
    """Other values cause no compilation: prompts, lengths, seeds, settings and stop tokens are data."""
    params = tiny.model(config=SMALL)

    def call(seed: int, lengths: list[int], stop_ids: tuple[int, ...]) -> None:
        tokens = jnp.asarray([tiny.prompt(9, seed), tiny.prompt(9, seed + 1)])
        warm = make_sampling(2, temperature=0.5 + seed, seed=seed)
        generate(params, tokens, lengths=jnp.asarray(lengths), max_new_tokens=6, sampling=warm, stop_ids=stop_ids)

    call(0, [9, 9], (2,))
    assert compiled.count("_generate") == 1
    done = len(compiled)
    call(1, [3, 7], (2, 5, 7))
    call(2, [1, 9], ())
    assert compiled[done:] == []
    generate(params, jnp.ones((1, 4), jnp.int32), max_new_tokens=6)  # another shape does compile
    assert compiled.count("_generate") == 2

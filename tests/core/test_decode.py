"""Decoding: prefill, steps, batches and streams are all the same computation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jllama import stream
from jllama.cache import init_cache
from jllama.decode import generate, jit_decode_chunk, jit_prefill, jit_sample_first, stop_table
from jllama.errors import InputError
from jllama.model import forward
from jllama.params import Params, stack, unstack
from jllama.sampling import History, make_sampling
from jllama.stream import Session, pad

LENGTHS = (3, 17, 9, 1)
ONE_LAYER = tiny.CONFIG.replace(n_layers=1)  # where the number of layers does not matter: it compiles faster
# Tolerance of logits, relative to the largest: sums in another order may differ by this.
CLOSE = {"float32": 1e-5, "bfloat16": 4e-2}

jit_forward = functools.partial(jax.jit, static_argnames="last_only")(forward)
jit_generate = functools.partial(jax.jit, static_argnames=("max_new_tokens", "stop_ids"))(generate)


def prompts() -> list[list[int]]:
    return [tiny.prompt(n) for n in LENGTHS]


def assert_close(found: jax.Array, expected: jax.Array, dtype: str = "float32") -> None:
    a, b = (np.asarray(x, np.float64) for x in (found, expected))
    assert np.abs(a - b).max() <= CLOSE[dtype] * np.abs(b).max()


def collect(session: Session, prompt: list[int], n: int, **more: object) -> list[int]:
    return [token for chunk in session.run(prompt, n, **more) for token in chunk.ids]


def alone(prompt: list[int], n: int, **settings: float) -> list[int]:
    """The text of a fresh session."""
    return collect(Session(tiny.model(), max_len=64), prompt, n, sampling=make_sampling(1, **settings))


def together(n: int, **more: object) -> list[list[int]]:
    """The texts of `prompts` as one batch."""
    tokens, lengths = pad(prompts())
    made = generate(tiny.model(), tokens, lengths=lengths, max_new_tokens=n, **{"stop_ids": (), **more})
    return [row[:length].tolist() for row, length in zip(made.tokens, made.lengths, strict=True)]


@pytest.mark.parametrize("dtype", CLOSE)
def test_prefill_of_n_tokens_equals_n_steps_and_a_forward_without_cache(dtype: str) -> None:
    params, tokens = tiny.model(dtype), jnp.asarray([tiny.prompt(12), tiny.prompt(12, seed=1)])
    whole, cache = jit_forward(params, tokens, init_cache(tiny.CONFIG, 2, 16, dtype))
    bare, none = jit_forward(params, tokens)
    assert none is None
    assert_close(bare, whole, dtype)
    stepped, rows = init_cache(tiny.CONFIG, 2, 16, dtype), []
    for t in range(12):
        logits, stepped = jit_forward(params, tokens[:, t : t + 1], stepped)
        rows.append(logits[:, 0])
    assert_close(jnp.stack(rows, axis=1), whole, dtype)
    np.testing.assert_array_equal(stepped.lengths, cache.lengths)
    for a, b in zip(stepped.k + stepped.v, cache.k + cache.v, strict=True):
        assert_close(a, b, dtype)


@pytest.mark.parametrize("dtype", CLOSE)
def test_a_ragged_batch_equals_its_rows_alone(dtype: str) -> None:
    params = tiny.model(dtype)
    tokens, lengths = pad(prompts())
    logits, _ = jit_forward(params, tokens, init_cache(tiny.CONFIG, 4, 32, dtype), lengths=lengths, last_only=True)
    made = jit_generate(params, tokens, lengths=lengths, max_new_tokens=12, stop_ids=())
    for row, prompt in enumerate(prompts()):
        single, n = pad([prompt + [0] * (17 - len(prompt))])[0], lengths[row : row + 1]
        assert_close(logits[row], jit_forward(params, single)[0][0, len(prompt) - 1], dtype)
        only = jit_generate(params, single, lengths=n, max_new_tokens=12, stop_ids=())
        np.testing.assert_array_equal(made.tokens[row], only.tokens[0])
        np.testing.assert_allclose(made.logprobs[row], only.logprobs[0], atol=10 * CLOSE[dtype])


def test_padding_and_what_an_older_sequence_left_change_nothing() -> None:
    params, (tokens, lengths) = tiny.model(), pad(prompts())
    used = init_cache(tiny.CONFIG, 4, 32, jnp.float32)
    used = used.replace(k=tuple(a + 50 for a in used.k), v=tuple(a - 50 for a in used.v))
    junk = jnp.where(jnp.arange(tokens.shape[1]) < lengths[:, None], tokens, 77)
    results = [
        jit_forward(params, t, c, lengths=lengths, last_only=True)[0]
        for t, c in ((tokens, init_cache(tiny.CONFIG, 4, 32, jnp.float32)), (junk, used))
    ]
    np.testing.assert_array_equal(*results)


def test_stacked_layers_give_the_same_logits() -> None:
    params, tokens = tiny.model(), jnp.asarray([tiny.prompt(5)])
    expected = jit_forward(params, tokens)[0]
    assert not isinstance(stack(params).layers, tuple)
    assert_close(jit_forward(stack(params), tokens)[0], expected)
    np.testing.assert_array_equal(jit_forward(unstack(stack(params)), tokens)[0], expected)


def test_generate_is_pure_under_jit_and_vmap() -> None:
    params = tiny.model(config=ONE_LAYER)
    tokens = jnp.asarray([[tiny.prompt(6, seed=s)] for s in range(3)])  # three batches of one row
    run = jax.jit(functools.partial(generate, max_new_tokens=5, stop_ids=()))
    mapped = jax.vmap(run, in_axes=(None, 0))(params, tokens)
    assert mapped.tokens.shape == (3, 1, 5)
    for i in range(3):
        np.testing.assert_array_equal(mapped.tokens[i], run(params, tokens[i]).tokens)
    sampling = make_sampling(1, temperature=1.0)
    warm = jax.vmap(lambda t: run(params, tokens[0], sampling=sampling.replace(temperature=t[None])))(jnp.arange(3.0))
    np.testing.assert_array_equal(warm.tokens[0], mapped.tokens[0])  # temperature 0
    assert not np.array_equal(warm.tokens[2], warm.tokens[0])


SETTINGS = {
    "greedy": {},
    "sampled": dict(temperature=(0.0, 0.8, 1.2, 1.0), top_k=(0, 0, 20, 0), top_p=(1.0, 0.9, 1.0, 0.8), seed=7),
    "penalty": dict(repetition_penalty=(1.0, 1.5, 1.0, 5.0)),
    "further": dict(
        presence_penalty=(1.5, 0.0, 0.0, 0.0),
        frequency_penalty=(0.0, 0.7, 0.0, 0.0),
        min_tokens=(0, 0, 9, 0),
        logit_bias=[{}, {}, {}, {11: 4.0, 12: float("-inf")}],
        bad_words=[[14], [20, 14]],
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_session_streams_what_generate_returns(name: str) -> None:
    params, sampling = tiny.model(), make_sampling(4, **SETTINGS[name])
    tokens, lengths = pad(prompts())
    made = jit_generate(params, tokens, lengths=lengths, max_new_tokens=21, sampling=sampling, stop_ids=(5, 6))
    for row, (n, prompt) in enumerate(zip(made.lengths.tolist(), prompts(), strict=True)):
        session, ids, logprobs = Session(params, max_len=64, chunk=4), [], []
        of_row = jax.tree.map(lambda a, row=row: a[row : row + 1], sampling)
        for chunk in session.run(prompt, 21, of_row, stop_ids=(5, 6)):
            ids += chunk.ids
            logprobs += chunk.logprobs
        assert ids == made.tokens[row, :n].tolist()
        assert (made.tokens[row, n:] == -1).all()
        np.testing.assert_allclose(logprobs, made.logprobs[row, :n], atol=1e-4)
        assert session.timings.new_tokens == len(ids)
        assert session.timings.prompt_tokens == len(prompt)


def test_a_prompt_that_begins_with_what_the_cache_holds_is_only_fed_its_rest() -> None:
    session, first = Session(tiny.model(), max_len=64), tiny.prompt(9)
    answer = collect(session, first, 8)
    for rest in (answer + [40, 41], answer[:3] + [50], []):  # a next turn, an edited one, the same prompt again
        prompt = first + rest
        assert collect(session, prompt, 6) == alone(prompt, 6)
        assert session.timings.prompt_tokens <= max(1, len(rest) + 1) < len(prompt)


def test_a_stream_closed_early_leaves_a_session_that_goes_on_rightly() -> None:
    session, first = Session(tiny.model(), max_len=64, chunk=4), tiny.prompt(9)
    stream_of = session.run(first, 30)
    begun = next(stream_of).ids + next(stream_of).ids
    stream_of.close()
    prompt = [*first, *begun, 33]
    assert collect(session, prompt, 6) == alone(prompt, 6)
    assert session.timings.prompt_tokens == 2  # 33, and the last one drawn, which was not in the cache


def test_the_first_token_does_not_wait_for_the_program_of_the_next_chunk() -> None:
    session, launched = Session(tiny.model(), max_len=64, chunk=4), []
    for _ in range(2):
        run = session.run(tiny.prompt(9), 8)
        next(run)
        launched.append("decode" in session.backends)
        next(run)
        assert "decode" in session.backends
    assert launched == [False, True]  # the second run finds the program, and launches before it reads


def test_the_cache_grows_with_need_and_not_to_the_context_at_once() -> None:
    session, prompt = Session(tiny.model(), max_len=200), tiny.prompt(9)
    answer = collect(session, prompt, 8)
    assert session._cache.max_len == stream.MIN_CACHE
    longer = prompt + answer + tiny.prompt(130)
    assert collect(session, longer, 4) == collect(Session(tiny.model(), max_len=200), longer, 4)
    assert session._cache.max_len == 200
    assert session.timings.prompt_tokens == 131


def test_a_long_prompt_in_pieces_equals_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, calls = tiny.prompt(50), []
    whole = alone(prompt, 8)
    monkeypatch.setattr(stream, "PREFILL_PIECE", 16)
    monkeypatch.setattr(stream, "jit_prefill", lambda *a, **k: calls.append(a[1].shape) or jit_prefill(*a, **k))
    assert alone(prompt, 8) == whole
    assert calls == [(1, 16)] * 4


def test_what_is_handed_over_is_donated() -> None:
    params, (tokens, lengths) = tiny.model(), pad(prompts())
    before, given = jnp.zeros((4, 96)), init_cache(tiny.CONFIG, 4, 64, jnp.float32)
    (logits, cache), _ = jit_prefill(params, tokens, lengths, before, given)
    limit, stops = jnp.full(4, 9), jnp.asarray(stop_table(4, ()))
    (state, _), _ = jit_sample_first(logits, cache, make_sampling(4), limit, stops, History(jnp.zeros((4, 96), bool)))
    (last, _), _ = jit_decode_chunk(params, state, steps=2)
    for gone in (given, cache, state):
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(gone))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, before, last)))


def test_stops_and_limits_hold_row_by_row() -> None:
    free = together(20)
    stop = free[1][4]
    stopped = together(20, stop_ids=(1000, stop))
    for row, ids in enumerate(free):  # the stop token is the last that comes
        assert stopped[row] == (ids[: ids.index(stop) + 1] if stop in ids else ids)
    prompt = prompts()[1]
    assert collect(Session(tiny.model(), max_len=64), prompt, 20, stop_ids=(1000, stop)) == stopped[1]
    assert collect(Session(tiny.model(), max_len=20), prompt, 20) == free[1][: 20 - len(prompt)]  # the context ends
    assert collect(Session(tiny.model(), max_len=64), prompt, 0) == []


def test_a_rows_text_depends_on_its_seed_and_settings_and_not_on_its_neighbours() -> None:
    settings = dict(temperature=(1.0, 0.0, 1.3, 0.7), top_p=(0.9, 1.0, 1.0, 1.0), seed=(3, 3, 11, 4))
    batch = together(12, sampling=make_sampling(4, **settings))
    for row, prompt in enumerate(prompts()):
        own = {name: values[row] for name, values in settings.items()}
        assert alone(prompt, 12, **own) == batch[row]
        if own["temperature"]:
            assert alone(prompt, 12, **own | {"seed": 99}) != batch[row]


def test_every_step_draws_anew() -> None:
    params = tiny.model(config=ONE_LAYER)
    flat = params.replace(
        lm_head=jnp.zeros_like(params.lm_head)
    )  # all tokens are equally likely, so only the key decides
    made = generate(
        flat, np.full((2, 1), 5), max_new_tokens=40, stop_ids=(), sampling=make_sampling(2, temperature=1.0)
    )
    rows = made.tokens.tolist()
    assert all(len(set(ids)) > 20 for ids in rows)
    assert sum(a == b for a, b in zip(*rows, strict=True)) < 5


def test_repetition_penalty_counts_the_prompt_and_what_was_drawn() -> None:
    params, prompt = tiny.model(), tiny.prompt(9)
    ids = alone(prompt, 40, repetition_penalty=1e6)
    assert len(set(prompt + ids)) == len(set(prompt)) + 40  # with such a penalty nothing comes twice
    mild, context = alone(prompt, 10, repetition_penalty=1.3), list(prompt)
    for token in mild:  # recomputed from a forward over the whole text
        tokens, lengths = pad([context])
        logits = np.asarray(jit_forward(params, tokens, lengths=lengths, last_only=True)[0][0], np.float64)
        seen = sorted(set(context))
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / 1.3, logits[seen] * 1.3)
        assert token == logits.argmax()
        context.append(token)
    assert mild != alone(prompt, 10)


@pytest.mark.parametrize("tied", [True, False])
def test_forward_differentiates_in_every_weight(tied: bool) -> None:
    params = tiny.model(config=tiny.CONFIG.replace(tie_embeddings=tied))
    tokens = jnp.asarray([tiny.prompt(12), tiny.prompt(12, seed=1)])

    @jax.jit
    def loss(params: Params) -> jax.Array:
        logits = jax.nn.log_softmax(forward(params, tokens[:, :-1])[0])
        return -jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1).mean()

    grads = jax.grad(loss)(params)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        used = grad[jnp.unique(tokens[:, :-1])] if path[0].name == "embed" else grad
        assert jnp.isfinite(grad).all(), path
        assert (used != 0).mean() > 0.9, path
    # The slope along the gradient, by finite differences.
    norm = sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads)) ** 0.5
    ahead, behind = (loss(jax.tree.map(lambda w, g, s=s: w + s * g / norm, params, grads)) for s in (1e-2, -1e-2))
    np.testing.assert_allclose((ahead - behind) / 2e-2, norm, rtol=1e-2)


def test_nan_weights_are_one_line_and_do_not_stay_in_the_session() -> None:
    params = tiny.model()
    session = Session(params.replace(norm=params.norm.at[3].set(jnp.nan)), max_len=64)
    with pytest.raises(InputError, match="model: logits are NaN: the weights hold NaN or Inf") as error:
        collect(session, tiny.prompt(5), 4)
    assert "\n" not in str(error.value)
    session.params = params
    assert collect(session, tiny.prompt(5), 4) == alone(tiny.prompt(5), 4)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], r"prompt 0: expected 1 to 63 tokens \(one less than the context\), found 0"),
        ([5] * 64, "prompt 0: expected 1 to 63 tokens .*, found 64"),
        ([5, 96], "prompt 0: expected token ids from 0 to 95, found 96"),
        ([5, -1], "prompt 0: expected token ids from 0 to 95, found -1"),
    ],
)
def test_a_prompt_that_cannot_be_fed_is_one_line(prompt: list[int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        next(Session(tiny.model(), max_len=64).run(prompt, 4))


ONES = np.ones((2, 250), np.int32)


@pytest.mark.parametrize(
    ("tokens", "n", "lengths", "message"),
    [
        (ONES[:, :3], 0, None, "max_new_tokens: expected at least 1, found 0"),
        (ONES[:, :3], 256, None, r"max_new_tokens: expected 1 to 255 \(one less than the context\), found 256"),
        (ONES, 7, None, r"prompt 0: expected 1 to 249 tokens \(the context of 256 less max_new_tokens\), found 250"),
        (ONES[:, :0], 7, None, r"prompt 0: expected 1 to 249 tokens \(.*\), found 0"),
        (ONES, 7, [3, 0], r"prompt 1: expected 1 to 249 tokens \(.*\), found 0"),
        (ONES, 7, [3, 251], "lengths: row 1: expected 1 to 250, found 251"),
        (ONES, 7, [-1, 3], "lengths: row 0: expected 1 to 250, found -1"),
        (ONES, 7, [3], r"lengths: expected 2 \(one a row\), found an array \[1\]"),
        (ONES[:, :3] * 96, 7, None, "prompt 0: expected token ids from 0 to 95, found 96"),
        (ONES[0], 7, None, r"tokens: expected integers \[batch, length\], found int32\[250\]"),
        (ONES[:, :3] * 0.5, 7, None, r"tokens: expected integers \[batch, length\], found float64\[2, 3\]"),
    ],
)
def test_generate_refuses_what_it_would_overrun(tokens: np.ndarray, n: int, lengths: list[int], message: str) -> None:
    rows = None if lengths is None else np.asarray(lengths)
    with pytest.raises(InputError, match=f"^{message}$"):
        generate(tiny.model(), tokens, max_new_tokens=n, lengths=rows)


def test_generate_fills_the_context_and_leaves_padding_alone() -> None:
    params, junk = (
        tiny.model(config=ONE_LAYER),
        np.full((1, 250), 99),
    )  # no token of the vocabulary, but not of the prompt either
    junk[0, :5] = tiny.prompt(5)
    made = generate(params, junk, max_new_tokens=3, lengths=np.asarray([5]), stop_ids=())
    plain = generate(params, junk[:, :5], max_new_tokens=3, stop_ids=())
    np.testing.assert_array_equal(made.tokens, plain.tokens)
    assert generate(params, ONES, max_new_tokens=6, stop_ids=()).lengths.tolist() == [6, 6]
    assert generate(params, ONES, max_new_tokens=1).tokens.shape == (2, 1)


def test_generate_under_jit_takes_stop_tokens_in_every_form() -> None:
    params, tokens = tiny.model(config=ONE_LAYER), jnp.asarray([tiny.prompt(6), tiny.prompt(6, seed=1)])
    free = generate(params, tokens, max_new_tokens=8, stop_ids=()).tokens
    stop = int(free[0, 3])
    expected = generate(params, tokens, max_new_tokens=8, stop_ids=(stop,))
    assert expected.lengths[0] == free[0].tolist().index(stop) + 1 < 8
    static = jax.jit(generate, static_argnames=("max_new_tokens", "backend", "stop_ids"))
    traced = jax.jit(generate, static_argnames=("max_new_tokens", "backend"))
    scanned = jax.lax.scan(
        lambda _, t: (None, generate(params, t, max_new_tokens=8, stop_ids=(stop,))), None, tokens[None]
    )
    made = [
        static(params, tokens, max_new_tokens=8, backend="xla", stop_ids=(stop,)),
        traced(params, tokens, max_new_tokens=8, stop_ids=jnp.asarray([stop])),
        traced(params, tokens, max_new_tokens=8, stop_ids=(stop,)),
        traced(params, tokens, max_new_tokens=8, stop_ids=jnp.asarray([[stop], [stop]]), lengths=jnp.asarray([6, 6])),
        scanned[1],
    ]
    for out in made:
        np.testing.assert_array_equal(out.tokens.reshape(2, 8), expected.tokens)
        np.testing.assert_array_equal(out.lengths.reshape(2), expected.lengths)
    own = traced(params, tokens, max_new_tokens=8, stop_ids=jnp.asarray([[-1], [stop]]))  # the first row's has none
    np.testing.assert_array_equal(own.tokens[0], free[0])
    with pytest.raises(InputError, match=r"stop_ids: expected \[n\] or \[2, n\] .*, found an array \[3, 1\]"):
        generate(params, tokens, max_new_tokens=8, stop_ids=jnp.zeros((3, 1), jnp.int32))


def test_generate_differentiates_under_grad_of_what_surrounds_it() -> None:
    params, tokens = tiny.model(config=ONE_LAYER), jnp.asarray([tiny.prompt(6)])

    def score(params: Params) -> jax.Array:
        out = generate(params, tokens, max_new_tokens=3, backend="xla")
        logits, _ = forward(params, jnp.maximum(out.tokens, 0), backend="xla")
        return jax.nn.log_softmax(logits).max(-1).sum()

    assert jnp.isfinite(jax.grad(score)(params).norm).all()

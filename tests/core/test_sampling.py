"""Sampling against a plain numpy sampler that sorts and defines every setting as Hugging Face does."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from np_sampler import np_sampler

from jllama.errors import InputError
from jllama.sampling import History, Sampling, adjust, make_sampling, sample, top_logprobs
from pallas_kernels.draw import pick, truncate

ROWS, VOCAB = 4, 50  # fixed, so that the properties below compile once for every set of settings
DRAWS = 16384

jit_truncate, jit_sample = jax.jit(truncate), jax.jit(sample)


def cuts(sampling: Sampling) -> dict[str, Any]:
    return {name: getattr(sampling, name) for name in ("top_k", "top_p", "min_p")}


# Settings of four rows. Each of the three cuts is on in some row and may be off in others.
rows = {
    "temperature": st.floats(0.2, 3.0),
    "top_k": st.sampled_from([0, 0, 1, 2, 7, 49, 50, 1000]),
    "top_p": st.sampled_from([1.0, 1.0, 0.05, 0.5, 0.9, 0.999]),
    "min_p": st.sampled_from([0.0, 0.0, 0.05, 0.3, 0.9]),
}
every_row = st.fixed_dictionaries({name: st.lists(s, min_size=ROWS, max_size=ROWS) for name, s in rows.items()})


@settings(max_examples=300, deadline=None, derandomize=True)
@given(given_rows=every_row, seed=st.integers(0, 2**31), spread=st.sampled_from([0.1, 1.0, 4.0, 20.0]))
def test_truncate_keeps_what_the_sorting_sampler_keeps(
    given_rows: dict[str, list[Any]], seed: int, spread: float
) -> None:
    logits = (np.random.RandomState(seed).standard_normal((ROWS, VOCAB)) * spread).astype(np.float32)
    sampling = make_sampling(ROWS, **given_rows)
    # One structure, so one compilation. A setting that no row uses is an array of its off value, which must do nothing.
    off = {"top_k": jnp.zeros(ROWS, jnp.int32), "top_p": jnp.ones(ROWS), "min_p": jnp.zeros(ROWS)}
    sampling = sampling.replace(**{name: v for name, v in off.items() if getattr(sampling, name) is None})
    warm = logits / np.float32(sampling.temperature)[:, None]
    kept = np.asarray(jit_truncate(warm, **cuts(sampling)))
    for row in range(ROWS):
        own = {name: values[row] for name, values in given_rows.items()}
        probs, close = np_sampler(logits[row], **own)
        if close > 1e-5:
            np.testing.assert_array_equal(kept[row] > -np.inf, probs > 0)
        assert kept[row, logits[row].argmax()] > -np.inf
    np.testing.assert_array_equal(kept[kept > -np.inf], warm[kept > -np.inf])


def test_equal_logits_stay_together_at_a_cut() -> None:
    logits = jnp.asarray([[3.0, 1.0, 2.0, 2.0, 2.0, 0.0]])
    for cut in (dict(top_k=2), dict(top_p=0.6)):
        kept = truncate(logits, **cuts(make_sampling(1, temperature=1.0, **cut))) > -jnp.inf
        np.testing.assert_array_equal(kept, [[True, False, True, True, True, False]])


def test_truncation_stands_extreme_logits() -> None:
    logits = jnp.asarray([[-jnp.inf, 1e30, -1e30, 0.0], [-jnp.inf, -jnp.inf, -jnp.inf, -5.0]])
    sampling = make_sampling(2, temperature=1.0, top_k=3, top_p=0.9, min_p=0.1)
    np.testing.assert_array_equal(truncate(logits, **cuts(sampling)) > -jnp.inf, [[0, 1, 0, 0], [0, 0, 0, 1]])


def chi_square(counts: np.ndarray, probs: np.ndarray) -> float:
    """How many standard deviations the statistic is above its mean. Rarely expected tokens are counted as one."""
    assert counts[probs == 0].sum() == 0, "drew what has no probability"
    expected = probs * counts.sum()
    rare = expected < 5
    cells = [(counts[~rare], expected[~rare]), (counts[rare].sum(keepdims=True), expected[rare].sum(keepdims=True))]
    seen, wanted = (np.concatenate(parts) for parts in zip(*cells, strict=True))
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    statistic, freedom = ((seen - wanted) ** 2 / wanted).sum(), len(wanted) - 1
    return (statistic - freedom) / (2 * freedom) ** 0.5


LIMIT = 5.0  # standard deviations; seeds are fixed, so this never flickers


@functools.partial(jax.jit, static_argnames="draws")
def drawn(logits: jax.Array, sampling: Any, seen: jax.Array | None, *, draws: int = DRAWS) -> jax.Array:
    """[B, V]: how often each token was drawn in ``draws`` steps."""

    def step(counts: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        token, _ = sample(logits, sampling, jnp.full(logits.shape[0], i), History(seen))
        return counts.at[jnp.arange(logits.shape[0]), token].add(1), None

    return jax.lax.scan(step, jnp.zeros(logits.shape, jnp.int32), jnp.arange(draws))[0]


DISTRIBUTIONS = {
    "temperature": dict(temperature=(0.3, 0.7, 1.0, 1.8)),
    "top-k": dict(temperature=1.0, top_k=(0, 2, 5, 20)),
    "top-p": dict(temperature=(0.5, 1.0, 1.5, 1.0), top_p=(0.9, 0.3, 0.95, 1.0)),
    "min-p": dict(temperature=1.2, min_p=(0.0, 0.02, 0.1, 0.4)),
    "penalty": dict(temperature=1.0, repetition_penalty=(1.0, 1.3, 2.0, 0.7)),
    "all": dict(temperature=0.9, top_k=(0, 10, 20, 30), top_p=0.9, min_p=0.02, repetition_penalty=1.2),
}
LOGITS = (np.random.RandomState(7).standard_normal((ROWS, VOCAB)) * 1.5).astype(np.float32)
SEEN = np.random.RandomState(8).rand(ROWS, VOCAB) < 0.3


def of_row(settings_of_rows: dict[str, Any], row: int) -> dict[str, Any]:
    return {name: value[row] if isinstance(value, tuple) else value for name, value in settings_of_rows.items()}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_draws_follow_the_distribution(name: str) -> None:
    settings_of_rows = DISTRIBUTIONS[name]
    counts = np.asarray(drawn(LOGITS, make_sampling(ROWS, seed=3, **settings_of_rows), SEEN))
    for row in range(ROWS):
        probs, _ = np_sampler(LOGITS[row], SEEN[row], **of_row(settings_of_rows, row))
        assert chi_square(counts[row], probs) < LIMIT


@pytest.mark.parametrize(
    "wrong",
    [
        dict(temperature=1.1),
        dict(temperature=0.9),
        dict(repetition_penalty=1.15),
        dict(top_p=0.97),
        dict(top_k=30),
        dict(min_p=0.01),
    ],
    ids=lambda wrong: "-".join(f"{name}={value}" for name, value in wrong.items()),
)
def test_the_statistic_notices_settings_that_are_a_little_off(wrong: dict[str, Any]) -> None:
    counts = np.asarray(drawn(LOGITS, make_sampling(ROWS, seed=3, temperature=1.0), None))
    noticed = []
    for row in range(ROWS):
        assert chi_square(counts[row], np_sampler(LOGITS[row])[0]) < LIMIT
        try:
            probs, _ = np_sampler(LOGITS[row], SEEN[row], **wrong)
            noticed.append(chi_square(counts[row], probs) > LIMIT)
        except AssertionError:
            noticed.append(True)
    assert any(noticed)


def test_draws_from_a_vocabulary_of_many_blocks() -> None:
    logits = (np.random.RandomState(9).standard_normal((ROWS, 700)) * 2).astype(np.float32)
    counts = np.asarray(drawn(logits, make_sampling(ROWS, seed=3, temperature=1.0, top_p=(1.0, 0.9, 0.5, 0.99)), None))
    for row, top_p in enumerate((1.0, 0.9, 0.5, 0.99)):
        assert chi_square(counts[row], np_sampler(logits[row], top_p=top_p)[0]) < LIMIT


@pytest.mark.parametrize("vocab", [1, 50, 128, 700, 32000])
def test_what_is_excluded_is_never_picked_whatever_the_share(vocab: int) -> None:
    random = np.random.RandomState(1)
    mass = np.exp(random.standard_normal((64, vocab)) * 8).astype(np.float32)
    mass[random.rand(64, vocab) < np.linspace(0, 0.999, 64)[:, None]] = 0
    mass[np.arange(64), random.randint(vocab, size=64)] = 1
    for share in (0.0, 1e-7, 0.5, 1 - 2.0**-23, 1.0, 1.1):
        token = np.asarray(jax.jit(pick)(mass, np.full(64, share, np.float32)))
        assert (mass[np.arange(64), token] > 0).all()
        exact = np.cumsum(mass, axis=1, dtype=np.float64) / mass.sum(axis=1, dtype=np.float64, keepdims=True)
        reached, before = (np.pad(exact, ((0, 0), (1, 0)))[np.arange(64), token + i] for i in (1, 0))
        assert (before - 1e-5 <= min(share, 1.0)).all()
        assert (reached + 1e-5 >= min(share, 1.0)).all()


def test_draws_of_one_row_and_of_neighbours_are_independent() -> None:
    same = jnp.asarray(np.tile(LOGITS[:1], (2, 1)))
    sampling = make_sampling(2, seed=5, temperature=1.5)
    steps = [np.asarray(jit_sample(same, sampling, jnp.full(2, i))[0]) for i in range(200)]
    a, b = np.stack(steps, axis=1)
    probs, _ = np_sampler(LOGITS[0], temperature=1.5)
    chance = (probs**2).sum()  # of agreeing with an independent draw
    for x, y in ((a, b), (a[1:], a[:-1])):
        assert abs((x == y).mean() - chance) < 4 * (chance / 200) ** 0.5


def test_the_same_seed_gives_the_same_draws_wherever_the_row_stands() -> None:
    logits, step = jnp.asarray(np.tile(LOGITS[:1], (3, 1))), jnp.asarray([4, 4, 5])
    tokens = [
        jit_sample(logits, make_sampling(3, seed=seeds, temperature=5.0), step)[0] for seeds in ((1, 2, 3), (2, 1, 3))
    ]
    assert tokens[0][0] == tokens[1][1]
    assert tokens[0][1] == tokens[1][0]
    assert tokens[0][2] == tokens[1][2]


@pytest.mark.parametrize("seed", [0, 5, 2**32 - 2, 2**40 + 3, 2**63 - 1, -1, 2**64 - 1, -(2**33)])
def test_all_64_bits_of_a_seed_count(seed: int) -> None:
    data = jax.random.key_data(make_sampling(3, seed=seed).key)
    rows = [(seed + i) % 2**64 for i in range(3)]
    assert data.tolist() == [[row >> 32, row % 2**32] for row in rows]
    assert (data == jax.random.key_data(make_sampling(3, seed=rows).key)).all()
    if -(2**31) <= seed < 2**32:  # what jax holds in 32 bits
        traced = jax.jit(lambda s: make_sampling(3, seed=s))(np.asarray(seed, np.int32 if seed < 2**31 else np.uint32))
        assert (data == jax.random.key_data(traced.key)).all()
    if 0 <= seed < 2**31:
        assert (data[0] == jax.random.key_data(jax.random.key(seed))).all()


def test_greedy_rows_among_sampled_rows_take_the_largest() -> None:
    sampling = make_sampling(ROWS, temperature=(0.0, 2.0, 0.0, 2.0), top_k=(0, 0, 3, 0), top_p=(1.0, 0.9, 0.5, 1.0))
    counts = np.asarray(drawn(LOGITS, sampling, None, draws=64))
    for row in (0, 2):
        assert counts[row, LOGITS[row].argmax()] == 64
    for row in (1, 3):
        assert (counts[row] > 0).sum() > 5


def test_all_greedy_rows_need_no_random_numbers_nor_cuts() -> None:
    sampling = make_sampling(2, temperature=0.0, top_k=5, top_p=0.5, min_p=0.1)
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (None,) * 4
    warm = make_sampling(2, temperature=1.0, top_p=1.0, top_k=0)
    assert (warm.top_k, warm.top_p, warm.repetition_penalty) == (None,) * 3


def test_logprobs_are_the_models_own_whatever_the_settings() -> None:
    exact = LOGITS - np.log(np.exp(LOGITS.astype(np.float64)).sum(-1, keepdims=True))
    for own in DISTRIBUTIONS.values():
        token, logprob = jit_sample(LOGITS, make_sampling(ROWS, **own), jnp.zeros(ROWS, jnp.int32), History(SEEN))
        np.testing.assert_allclose(logprob, exact[np.arange(ROWS), token], atol=1e-5)


def test_nan_logits_show_in_the_logprob() -> None:
    logits = jnp.asarray(LOGITS).at[1, 3].set(jnp.nan)
    for own in ({}, dict(temperature=1.0, top_p=0.9)):
        _, logprob = jit_sample(logits, make_sampling(ROWS, **own), jnp.zeros(ROWS, jnp.int32))
        np.testing.assert_array_equal(jnp.isnan(logprob), [False, True, False, False])


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("temperature", -0.1, "a number of at least 0"),
        ("temperature", float("nan"), "a number of at least 0"),
        ("temperature", float("inf"), "a number of at least 0"),
        ("top_k", -1, "a whole number of at least 0"),
        ("top_k", 1.5, "a whole number of at least 0"),
        ("top_k", float("inf"), "a whole number of at least 0"),
        ("top_k", 2**31, "a whole number of at least 0"),
        ("top_p", 0.0, "a number above 0 and at most 1"),
        ("top_p", 1.5, "a number above 0 and at most 1"),
        ("min_p", -0.1, "a number from 0 to below 1"),
        ("min_p", 1.0, "a number from 0 to below 1"),
        ("repetition_penalty", 0.0, "a number above 0"),
        ("presence_penalty", float("inf"), "a number"),
        ("frequency_penalty", float("nan"), "a number"),
        ("min_tokens", -1, "a whole number of at least 0"),
    ],
)
def test_an_invalid_setting_is_one_line_that_says_what_was_expected(name: str, value: float, expected: str) -> None:
    valid = 1.0 if name in ("top_p", "repetition_penalty") else 0.0
    for setting in (value, [valid, value]):
        with pytest.raises(InputError) as error:
            make_sampling(2, **{name: setting})
        assert str(error.value).startswith(f"{name}: expected {expected}")
        assert str(error.value).endswith(f"found {value:g}")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"])
def test_a_list_of_another_length_than_the_batch_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"{name}: expected one value or 3 \\(one a row\\), found 2"):
        make_sampling(3, **{name: [1, 1]})


def test_settings_and_seeds_may_be_traced() -> None:
    settings_of_rows = dict(temperature=0.9, top_k=(0, 10, 20, 30), top_p=0.9, min_p=0.02, repetition_penalty=1.2)

    inside = jax.jit(lambda given_rows: make_sampling(ROWS, **given_rows))
    plain = make_sampling(ROWS, seed=5, **settings_of_rows)
    arrays = {name: jnp.asarray(value) for name, value in settings_of_rows.items()}
    for seed in (jnp.asarray(5), jnp.arange(5, 5 + ROWS)):
        made = inside({"seed": seed, **arrays})
        np.testing.assert_array_equal(jax.random.key_data(made.key), jax.random.key_data(plain.key))
        for name in settings_of_rows:
            np.testing.assert_array_equal(getattr(made, name), getattr(plain, name))
    # Settings that are not given are not compiled in. Traced settings always are.
    alone = inside({"temperature": jnp.zeros(())})
    assert alone.temperature.tolist() == [0.0] * ROWS
    assert (alone.top_k, alone.top_p, alone.repetition_penalty) == (None,) * 3
    with pytest.raises(InputError, match=r"top_k: expected one value or 4 \(one a row\), found 3"):
        jax.eval_shape(lambda k: make_sampling(ROWS, temperature=1.0, top_k=k), jnp.zeros(3, jnp.int32))


def test_biases_and_bad_words_are_checked() -> None:
    for bad, message in (
        (dict(logit_bias={-1: 1.0}), "logit_bias: expected token ids of at least 0, found -1"),
        (dict(logit_bias={3: float("nan")}), "logit_bias: token 3: expected a number, found nan"),
        (dict(logit_bias=[{3: 1.0}]), r"logit_bias: expected one for all or 2 \(one a row\), found 1"),
        (dict(bad_words=[[]]), "bad_words: expected sequences of at least 1 token, found an empty one"),
    ):
        with pytest.raises(InputError, match=message):
            make_sampling(2, **bad)
    made = make_sampling(2, logit_bias=[{3: 1.0}, {}], bad_words=[[4], [5, 6]])
    logits = jnp.zeros((2, 10))
    recent = History(recent=jnp.asarray([[-1, 1, 5], [-1, -1, 2]]))
    found = adjust(logits, made, jnp.zeros(2, jnp.int32), recent, None)
    np.testing.assert_array_equal(found[0], [0, 0, 0, 1, -np.inf, 0, -np.inf, 0, 0, 0])
    np.testing.assert_array_equal(found[1], [0, 0, 0, 0, -np.inf, 0, 0, 0, 0, 0])


def test_concrete_arrays_are_checked_like_numbers() -> None:
    plain = make_sampling(2, temperature=(0.5, 1.0), top_k=(3, 0), seed=(1, 2))
    arrays = make_sampling(2, temperature=jnp.asarray([0.5, 1.0]), top_k=np.asarray([3, 0]), seed=np.asarray([1, 2]))
    assert jax.tree.structure(arrays) == jax.tree.structure(plain)
    np.testing.assert_array_equal(arrays.top_k, plain.top_k)
    assert make_sampling(2, top_p=jnp.ones(2)).top_p is None
    with pytest.raises(InputError, match=r"top_p: expected a number above 0 and at most 1 .*, found 2"):
        make_sampling(2, top_p=jnp.asarray([0.5, 2.0]))


def test_a_key_of_jax_takes_the_seeds_place() -> None:
    key = jax.random.key(3)
    one, four = make_sampling(1, key=key, temperature=1.0), make_sampling(4, key=key, temperature=1.0)
    data = jax.random.key_data(four.key)
    assert len(np.unique(np.asarray(data), axis=0)) == 4
    np.testing.assert_array_equal(jax.random.key_data(one.key), data[:1])  # independent of the other rows
    for same in (jax.random.PRNGKey(3), key):
        inside = jax.jit(lambda k: make_sampling(4, key=k, temperature=1.0))(same)
        np.testing.assert_array_equal(jax.random.key_data(inside.key), data)
    rows = jax.random.split(key, 4)
    np.testing.assert_array_equal(jax.random.key_data(make_sampling(4, key=rows).key), jax.random.key_data(rows))
    with pytest.raises(InputError, match=r"key: expected one value or 3 \(one a row\), found 4"):
        make_sampling(3, key=rows)
    with pytest.raises(InputError, match="seed: expected either seed or key, found both"):
        make_sampling(4, key=rows, seed=1)


@pytest.mark.gpu
def test_the_likeliest_tokens_of_a_transposed_product_on_gpu() -> None:
    """A product leaves the columns of its transpose contiguous."""
    w, x = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(32000, 64), (64, 64)]))
    ids, values = jax.jit(lambda w, x: top_logprobs((w @ x).T, 3))(w, x)
    logprobs = jax.nn.log_softmax((w @ x).T, axis=-1)
    order = np.argsort(-np.asarray(logprobs), axis=-1)[:, :3]
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_allclose(values, np.take_along_axis(np.asarray(logprobs), order, axis=-1), rtol=1e-4)

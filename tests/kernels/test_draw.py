"""The drawing kernel against its reference: interpreted, cross-lowered, and compiled on the GPU."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from h200 import H200, lower
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu
from np_sampler import np_sampler

from jllama.sampling import make_sampling, sample
from pallas_kernels import Unsupported
from pallas_kernels.draw import CASES, draw, draw_reference, log_probability, truncate
from pallas_kernels.hopper.sampling.draw import draw_rows
from pallas_kernels.hopper.sampling.split import CLUSTER, RowSplit, split_row

SETTINGS: dict[str, dict[str, Any]] = {  # of four rows
    "greedy": dict(temperature=(0.0, 0.0, 0.0, 0.0)),
    "temperature": dict(temperature=(0.0, 0.3, 1.0, 3.0)),
    "top-k": dict(temperature=(0.8, 0.8, 0.0, 0.8), top_k=(0, 1, 7, 100)),
    "top-p": dict(temperature=(0.8, 0.8, 0.8, 0.0), top_p=(1.0, 0.9, 0.02, 0.5)),
    "nearly-all": dict(temperature=(1.0, 1.0, 1.0, 1.0), top_p=(0.999999, 0.9999999, 0.99, 1e-9)),
    "min-p": dict(temperature=(0.8, 0.8, 0.8, 1.5), min_p=(0.0, 0.1, 0.9, 0.001)),
    "all": dict(
        temperature=(0.8, 1.2, 0.0, 3.0),
        top_k=(0, 40, 5, 10**6),
        top_p=(0.9, 0.7, 0.5, 1.0),
        min_p=(0.0, 0.02, 0.5, 0.0),
    ),
}
ROWS = 4
NEAR, CLOSE = 1e-5, 3e-6  # of the total mass: rounding of sums, which may put a cut on either side of a token
jit_reference = jax.jit(draw_reference)


def arguments(settings: str, vocab: int, *, seed: int = 0, spread: float = 2.0) -> tuple[Any, ...]:
    """Logits, u and the settings as arrays."""
    random = np.random.RandomState(seed)
    logits = jnp.asarray(random.standard_normal((ROWS, vocab)) * spread, jnp.float32)
    u = jnp.asarray(random.rand(ROWS), jnp.float32)
    types = dict(top_k=jnp.int32)
    given = {n: jnp.asarray(rows, types.get(n, jnp.float32)) for n, rows in SETTINGS[settings].items()}
    return logits, u, given


def assert_drawn(found: tuple[Any, Any], logits: jax.Array, u: jax.Array, given: dict[str, Any]) -> None:
    wanted = jit_reference(logits, u, **given)
    np.testing.assert_array_equal(found[0], wanted[0])
    np.testing.assert_allclose(found[1], wanted[1], atol=1e-5)


jit_draw_rows = jax.jit(draw_rows, static_argnames=("interpret", "split"))


def interpreted(*args: Any, races: bool = False, **given: Any) -> Any:
    found = jax.block_until_ready(jit_draw_rows(*args, **given, interpret=plgpu.InterpretGPUParams(detect_races=races)))
    assert not races or not interpret_pallas_call.get_races().races_found
    return found


@pytest.mark.parametrize("settings", SETTINGS)
def test_draw_interpreted(settings: str) -> None:
    logits, u, given = arguments(settings, 1280)  # two warpgroups, an odd number of tokens per thread
    assert_drawn(interpreted(logits, u, **given, races=True), logits, u, given)


@pytest.mark.parametrize("settings", ["greedy", "all"])
@pytest.mark.parametrize(
    ("vocab", "split"),
    [
        (1280, RowSplit(1, 5, blocks=2)),
        (1920, RowSplit(2, 2, blocks=4)),  # the last part repeats a line
        (896, RowSplit(2, 4)),  # so it does in one block
    ],
)
def test_draw_from_several_blocks_interpreted(settings: str, vocab: int, split: RowSplit) -> None:
    logits, u, given = arguments(settings, vocab)
    u = u.at[0].set(0.0).at[3].set(1 - 2.0**-23)  # the ends of the vocabulary
    found = interpreted(logits, u, **given, split=split, races=True)
    wanted = jit_reference(logits, u, **given)
    assert_near(np.asarray(found[0]), np.asarray(logits), np.asarray(u), given)
    np.testing.assert_array_equal(found[0][:3], wanted[0][:3])
    np.testing.assert_allclose(found[1], log_probability(logits, found[0]), atol=1e-5)


def test_several_blocks_stand_logits_that_are_not_numbers() -> None:
    logits, u, given = arguments("all", 640)
    logits = logits.at[0, 7].set(jnp.nan).at[1, 639].set(jnp.inf).at[2].set(-jnp.inf)
    token, logprob = interpreted(logits, u, **given, split=RowSplit(1, 3, blocks=2))
    assert ((token >= 0) & (token < 640)).all()
    np.testing.assert_array_equal(jnp.isnan(logprob), [True, True, True, False])


@pytest.mark.parametrize("settings", ["top-p", "all"])
def test_equal_logits_stay_together(settings: str) -> None:
    logits, u, given = arguments(settings, 512)
    logits = jnp.round(logits * 2) / 2
    assert_drawn(interpreted(logits, u, **given), logits, u, given)


def test_draw_stands_extreme_logits() -> None:
    rows = np.full((ROWS, 512), -np.inf, np.float32)
    rows[0, 300] = 1e30
    rows[1, 511] = -5.0
    rows[2, :] = -1e30
    rows[3, :] = np.linspace(0, 400, 512)  # masses below the smallest float
    logits, (_, u, given) = jnp.asarray(rows), arguments("all", 512)
    found = interpreted(logits, u, **given)
    assert_drawn(found, logits, u, given)
    not_numbers = logits.at[0, 7].set(jnp.nan).at[1, 9].set(jnp.inf)
    token, logprob = interpreted(not_numbers, u, **given)
    assert ((token >= 0) & (token < 512)).all()
    np.testing.assert_array_equal(jnp.isnan(logprob), [True, True, False, False])
    assert token[2] == found[0][2]
    assert token[3] == found[0][3]


@pytest.mark.parametrize("u", [0.0, 1e-7, 0.5, 1 - 2.0**-23, 1.0])
def test_what_is_excluded_is_never_drawn_whatever_u_is(u: float) -> None:
    logits, _, given = arguments("all", 512, seed=3, spread=6.0)
    token, _ = interpreted(logits, jnp.full(ROWS, u), **given)
    temperature = jnp.maximum(given.pop("temperature"), 1e-6)
    kept = truncate(logits / temperature[:, None], **given)
    assert (kept > -jnp.inf).sum() < kept.size / 2
    assert (kept[jnp.arange(ROWS), token] > -jnp.inf).all()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("settings", ["temperature", "top-k", "top-p", "min-p", "all"])  # others are the same program
def test_draw_lowers(case: str, settings: str) -> None:
    rows, vocab = CASES[case]["rows"], CASES[case]["vocab"]
    given = {name: jax.ShapeDtypeStruct((rows,), a.dtype) for name, a in arguments(settings, 128)[2].items()}
    shapes = jax.ShapeDtypeStruct((rows, vocab), jnp.float32), jax.ShapeDtypeStruct((rows,), jnp.float32)
    lower(lambda logits, u, given: draw_rows(logits, u, **given), *shapes, given)


def test_which_vocabularies_fit() -> None:
    assert split_row(32000) == RowSplit(5, 50)
    assert split_row(512) == RowSplit(1, 4)
    assert split_row(32128) == RowSplit(4, 63)  # 251 lines, a prime number
    assert split_row(49_152) == RowSplit(1, 49, CLUSTER)
    assert split_row(128_256) == RowSplit(2, 63, CLUSTER)
    assert split_row(262_144) == RowSplit(5, 52, CLUSTER)
    assert [split_row(vocab) for vocab in (0, 96, 32001, 262_144 + 128)] == [None] * 4
    for lines in range(1, 262_144 // 128 + 1):
        split = split_row(lines * 128)
        assert split is not None
        assert 0 <= split.repeated(lines * 128) < split.numbers <= min(lines, 63)
        assert split.numbers % 8  # JAX 0.11.2 does not lower those
        assert lines > 62 * 5 or split.blocks == 1
    for backend in ("auto", "pallas"):
        choice = draw.choose(backend, jnp.zeros((1, 96)), jnp.zeros(1), temperature=jnp.ones(1))
        assert (choice.impl, choice.why[:34]) == ("xla", "a vocabulary of 96: the kernel hol")
        choice = draw.choose(backend, jnp.zeros((1, 400_000)), jnp.zeros(1), temperature=jnp.ones(1))
        assert choice.why.endswith("in lines of 128 tokens, 262144 at most; XLA draws from any")
        choice = draw.choose(backend, jnp.zeros((1, 512)), None, temperature=None)
        assert (choice.impl, choice.why[:6]) == ("xla", "greedy")
    on_h200 = jax.sharding.use_abstract_mesh(H200)
    with on_h200, pytest.raises(Unsupported, match="draw: logits must be float32, found bfloat16"):
        draw(jnp.zeros((1, 512), jnp.bfloat16), jnp.zeros(1), temperature=jnp.ones(1), backend="pallas")


@pytest.mark.parametrize("vocab", [49_152, 128_256, 262_144])
def test_the_reference_draws_from_large_vocabularies(vocab: int) -> None:
    """In a large vocabulary, sums of rounded masses still find the token that a float64 sampler draws."""
    logits, u, given = arguments("all", vocab, spread=3.0)
    u = u.at[3].set(1 - 2.0**-23)  # the end of the vocabulary
    token, logprob = draw(logits, u, **given)
    assert_near(np.asarray(token), np.asarray(logits), np.asarray(u), given)
    exact = np.asarray(logits, np.float64)
    total = np.log(np.exp(exact).sum(1))
    np.testing.assert_allclose(logprob, exact[np.arange(ROWS), np.asarray(token)] - total, atol=1e-4)


# Compiled, on a Hopper GPU


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [512, 1280, 32000])
@pytest.mark.parametrize("settings", SETTINGS)
def test_draw_on_gpu(settings: str, vocab: int) -> None:
    kernel = jax.jit(lambda logits, u, given: draw(logits, u, **given, backend="pallas"))
    for seed in range(20):
        for spread in (0.1, 2.0, 8.0):
            logits, u, given = arguments(settings, vocab, seed=seed, spread=spread)
            found = kernel(logits, u, given)
            again = kernel(logits, u, given)
            np.testing.assert_array_equal(found[0], again[0])
            np.testing.assert_array_equal(found[1], again[1])
            assert_near(np.asarray(found[0]), np.asarray(logits), np.asarray(u), given)
            np.testing.assert_allclose(found[1], log_probability(logits, found[0]), atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [32_128, 49_152, 128_256, 262_144])
@pytest.mark.parametrize("settings", ["greedy", "nearly-all", "all"])
def test_draw_from_large_vocabularies_on_gpu(settings: str, vocab: int) -> None:
    kernel = jax.jit(lambda logits, u, given: draw(logits, u, **given, backend="pallas"))
    for seed, spread in enumerate((0.1, 3.0)):
        logits, u, given = arguments(settings, vocab, seed=seed, spread=spread)
        u = u.at[0].set(0.0).at[3].set(1 - 2.0**-23)  # the ends of the vocabulary
        many = jax.tree.map(lambda a: jnp.tile(a, (16,) + (1,) * (a.ndim - 1)), (logits, u, given))  # 64 rows
        token, logprob = kernel(*many)
        assert_near(np.asarray(token[:ROWS]), np.asarray(logits), np.asarray(u), given)
        np.testing.assert_allclose(logprob[:ROWS], log_probability(logits, token[:ROWS]), atol=1e-4)
        np.testing.assert_array_equal(token.reshape(16, ROWS), np.broadcast_to(token[:ROWS], (16, ROWS)))


def assert_near(token: np.ndarray, logits: np.ndarray, u: np.ndarray, given: dict[str, Any]) -> None:
    """Every token is one that a float64 sampler may draw if u is off by the rounding of float32 sums."""
    for row, drawn in enumerate(token):
        own = {name: values[row].item() for name, values in given.items()}
        if own["temperature"] == 0:
            assert drawn == logits[row].argmax()
            continue
        probs, close = np_sampler(logits[row], **own)
        # Top-p sums rounded values, so the last token may be the one on the cut or the one before it.
        near = NEAR + (probs[probs > 0].min() if own.get("top_p", 1) < 1 and close < CLOSE else 0)
        reached = probs[: drawn + 1].sum()
        assert reached - probs[drawn] - near <= u[row] <= reached + near


@pytest.mark.gpu
def test_sampled_tokens_on_gpu_are_those_of_xla() -> None:
    sampling = make_sampling(8, seed=1, temperature=0.8, top_p=0.9)
    logits = jax.random.normal(jax.random.key(0), (8, 32000)) * 2
    draw_with = jax.jit(sample, static_argnames="backend")

    def tokens(backend: str) -> np.ndarray:
        return np.stack([draw_with(logits, sampling, jnp.full(8, i), backend=backend)[0] for i in range(100)])

    assert (tokens("xla") == tokens("pallas")).mean() > 0.99

"""`rollout`: more prompts than rows, in one pure function, gives what `generate` gives row by row."""

import functools
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from reference_engine import assert_same

from jllama import Request, SamplingSettings
from jllama.decode import generate
from jllama.engine.rollout import rollout
from jllama.errors import InputError
from jllama.sampling import make_sampling
from jllama.stream import pad

LENGTHS = (3, 64, 9, 65, 1, 100, 66)
HOW = dict(temperature=(1.0, 0.0) * 7, top_p=0.9, seed=3)

jit_rollout = functools.partial(jax.jit, static_argnames=("slots", "max_new_tokens", "n", "stop_ids"))(rollout)
jit_generate = functools.partial(jax.jit, static_argnames=("max_new_tokens", "stop_ids"))(generate)


def prompts() -> list[list[int]]:
    return [tiny.prompt(n) for n in LENGTHS]


@pytest.mark.parametrize("slots", [3, 50])
def test_rollout_gives_what_generate_gives_row_by_row(slots: int) -> None:
    sampling, stop_ids = make_sampling(14, **HOW), tuple(range(5, 12))
    tokens, lengths = pad(prompts())
    out = jit_rollout(tiny.model(), tokens, lengths, sampling, slots=slots, max_new_tokens=70, n=2, stop_ids=stop_ids)
    made = jit_generate(
        tiny.model(), np.repeat(tokens, 2, 0), lengths=np.repeat(lengths, 2), sampling=sampling,
        max_new_tokens=70, stop_ids=stop_ids,
    )  # fmt: skip
    np.testing.assert_array_equal(out.tokens, made.tokens)
    np.testing.assert_array_equal(out.lengths, made.lengths)
    np.testing.assert_allclose(out.logprobs, jnp.where(made.tokens < 0, 0, made.logprobs), atol=1e-4)
    assert len(set(out.lengths.tolist())) > 3  # rows end at different times
    assert max(out.lengths.tolist()) == 70


def test_penalties_count_prompt_and_text_of_each_request_whoever_had_its_row_before() -> None:
    penalty = (1.0, 1.5, 1.2, 2.0, 1.3, 1.1, 1.7)
    tokens, lengths = pad(prompts())
    sampling = make_sampling(7, repetition_penalty=penalty)
    sampling = sampling.replace(
        presence_penalty=jnp.linspace(0, 1, 7),
        frequency_penalty=jnp.linspace(1, 0, 7),
        bad_words=jnp.tile(jnp.asarray([[[-1, 20], [14, 20], [30, 31]]]), (7, 1, 1)),
    )
    out = jit_rollout(tiny.model(), tokens, lengths, sampling, slots=2, max_new_tokens=20, stop_ids=())
    for i, prompt in enumerate(prompts()):
        settings = SamplingSettings(
            repetition_penalty=penalty[i],
            presence_penalty=float(sampling.presence_penalty[i]),
            frequency_penalty=float(sampling.frequency_penalty[i]),
            bad_words=((20,), (14, 20), (30, 31)),
        )
        assert_same(tiny.model(), Request(prompt, 20, settings, ()), out.tokens[i].tolist(), out.logprobs[i])


def test_the_prompts_are_fed_in_groups_where_they_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, lengths = pad(prompts())
    how = dict(max_new_tokens=5, slots=4, stop_ids=())
    whole = rollout(tiny.model(), tokens, lengths, **how)
    monkeypatch.setattr("jllama.engine.rollout.FED_AT_ONCE", 3 * tokens.shape[1])
    np.testing.assert_array_equal(rollout(tiny.model(), tokens, lengths, **how).tokens, whole.tokens)


def test_its_loop_stops_when_all_texts_have_ended() -> None:
    tokens, lengths = pad([[5], [6]])
    free = rollout(tiny.model(), tokens, lengths, slots=2, max_new_tokens=6, stop_ids=())
    stops = tuple(set(free.tokens[:, 1].tolist()))
    out = rollout(tiny.model(), tokens, lengths, slots=2, max_new_tokens=6, stop_ids=stops)
    assert (out.lengths <= 2).all()
    assert (out.tokens[:, 2:] == -1).all()


def test_what_cannot_be_meant_is_one_line() -> None:
    tokens, lengths = pad([[5], [6]])
    with pytest.raises(InputError, match="sampling: expected 6 rows"):
        rollout(tiny.model(), tokens, lengths, make_sampling(2), slots=1, max_new_tokens=2, n=3)
    with pytest.raises(InputError, match="rollout: expected max_new_tokens, slots and n of 1 at least"):
        rollout(tiny.model(), tokens, lengths, slots=0, max_new_tokens=2)


def test_the_example_trains_the_demo_and_its_reward_rises(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parents[2] / "examples" / "grpo.py"
    runpy.run_path(str(path), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    rewards = [float(line.split()[-1]) for line in lines if line.startswith("step")]
    assert len(rewards) == 12
    assert np.mean(rewards[-4:]) > np.mean(rewards[:2]) + 0.15

"""Settings of `generate` and of launches, and many requests at once, on the tiny model of `test_engine`."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny
from reference_engine import assert_same

from jllama import Engine, Request, SamplingSettings
from jllama.decode import generate
from jllama.engine.tuning import sizes, tuning_for
from jllama.errors import InputError
from jllama.sampling import make_sampling

CPU = tuning_for(jax.devices("cpu")[0])


def test_generate_takes_the_same_settings() -> None:
    rows = dict(
        temperature=(0.0, 0.0, 0.9, 0.0), seed=(0, 0, 3, 0), presence_penalty=(1.5, 0.0, 0.4, 0.0),
        frequency_penalty=(0.0, 0.7, 0.3, 0.0), repetition_penalty=(1.0, 1.0, 1.1, 1.7), min_tokens=(6, 0, 3, 0),
        logit_bias=({}, {11: 4.0, 12: float("-inf")}, {7: 2.0}, {}),
    )  # fmt: skip
    words, stops, prompt = ((14,), (20, 14), (63, 20, 9)), tuple(range(60, 66)), tiny.prompt(30)
    out = generate(
        tiny.model(),
        np.asarray([prompt] * 4),
        max_new_tokens=24,
        sampling=make_sampling(4, bad_words=words, **rows),
        stop_ids=stops,
        top_logprobs=2,
    )
    assert out.top is not None
    for i, n in enumerate(out.lengths.tolist()):
        settings_ = SamplingSettings(bad_words=words, **{name: values[i] for name, values in rows.items()})
        request, ids = Request(prompt, 24, settings_, stops), out.tokens[i, :n].tolist()
        assert_same(tiny.model(), request, ids, out.logprobs[i, :n].tolist())
        likeliest, values = (np.asarray(a[i, :n]) for a in out.top)
        found = (likeliest == np.asarray(ids)[:, None]) * values
        np.testing.assert_allclose(found.sum(1), np.where(found.any(1), out.logprobs[i, :n], 0), atol=1e-5)
        assert (values[:, 0] >= values[:, 1]).all()


def test_sizes_of_launches_depend_on_the_device() -> None:
    gpu = tuning_for(SimpleNamespace(platform="gpu"))
    assert (CPU.piece, gpu.piece) == (32, 128)
    assert sizes(gpu.rows, 64) == [1, 8, 64]
    assert sizes(gpu.rows, 600) == [1, 8, 64, 128, 256, 512, 600]
    assert sizes(CPU.rows, 4) == [1, 4]
    assert sizes(CPU.rows, 1) == [1]
    e = Engine(tiny.model(), slots=2, pages=4, tuning=replace(CPU, piece=8, steps=(1, 2, 3)), budget=16)
    request = Request(tiny.prompt(20), 9, stop_ids=())
    found = e.generate([request.prompt], max_new_tokens=9, stop_ids=())[0]
    assert_same(tiny.model(), request, found.ids, found.logprobs)


def test_what_one_request_breaks_aborts_the_others() -> None:
    e = Engine(tiny.model(), slots=4, pages=16, max_len=256, budget=2 * CPU.piece)
    with pytest.raises(InputError, match="prompt 1: request: expected at most 256 tokens"):
        e.submit_all([Request([5], 4), Request([5], 256)])
    assert not e.busy
    handles = e.submit_all([Request([5], 40, stop_ids=()) for _ in range(2)])
    turns = e.follow(handles)
    next(turns)
    turns.close()
    assert [h.completion.finish_reason for h in handles] == ["abort"] * 2
    assert e._scheduler.pools[0].free == 16

"""Every setting of a body reaches the engine's requests. Pure: nothing is drawn."""

from dataclasses import fields
from typing import Any

import pytest
from serving import demo, messages

from jllama.engine.request import SamplingSettings
from jllama.serve.model import Model
from jllama.serve.parameters import Run, chat_run, completion_run
from jllama.serve.schema import ChatBody, CompletionBody

SETTINGS: dict[str, Any] = dict(
    temperature=0.7,
    top_k=5,
    top_p=0.9,
    min_p=0.05,
    seed=2**40,
    repetition_penalty=1.1,
    presence_penalty=0.5,
    frequency_penalty=-0.5,
    min_tokens=2,
)
OTHERS: dict[str, Any] = dict(n=3, stop=["a", "b"], stop_token_ids=[7, 9], logit_bias={"5": 1.5}, cache_salt="mine")


@pytest.fixture(scope="module")
def model() -> Model:
    return Model.of(demo(), 512)


def run_of(model: Model, chat: bool, **more: Any) -> Run:
    body = SETTINGS | OTHERS | more
    if chat:
        body |= dict(messages=messages("Hello"), logprobs=True, top_logprobs=3, max_completion_tokens=11)
        return chat_run(ChatBody.model_validate(body), model, "tenant")
    body |= dict(prompt=[1, 5], logprobs=3, max_tokens=11)
    return completion_run(CompletionBody.model_validate(body), model, "tenant")


@pytest.mark.parametrize("chat", [False, True])
def test_every_setting_of_a_body_reaches_the_engine(model: Model, chat: bool) -> None:
    run, none = run_of(model, chat), SamplingSettings()
    assert (run.n, run.stop[:2], run.logprobs, len(run.requests)) == (3, ("a", "b"), 3, 3)
    for i, request in enumerate(run.requests):
        expected = SamplingSettings(**SETTINGS | dict(seed=2**40 + i, logit_bias={5: 1.5}, top_logprobs=3))
        assert request.sampling == expected
        assert request.max_new_tokens == 11
        assert {7, 9, *model.config.eos_ids} <= set(request.stop_ids or ())
        assert request.salt == model.salt("tenant", "mine") != model.salt("tenant", None)
        unknown = {f.name for f in fields(none) if getattr(expected, f.name) == getattr(none, f.name)}
        assert unknown == {"bad_words"}  # refused: see the table
    assert set(run_of(model, chat, ignore_eos=True).requests[0].stop_ids or ()) == {7, 9}

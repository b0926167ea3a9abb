"""``/v1/completions`` and ``/v1/chat/completions`` as a client sees them: the model's text, in OpenAI's shapes."""

import math
from typing import Any

import numpy as np
import pytest
from serving import Live, demo, messages

PROMPT = "Once upon a time"


def text_of(prompt: str, count: int) -> str:
    return demo().generate(prompt, max_new_tokens=count).text


def test_a_completion_is_what_the_model_says_alone(live: Live) -> None:
    answer = live.complete(PROMPT, max_tokens=24)
    assert set(answer) == {"id", "object", "created", "model", "system_fingerprint", "choices", "usage"}
    assert (answer["object"], answer["model"]) == ("text_completion", "demo")
    assert answer["id"].startswith("cmpl-")
    (choice,) = answer["choices"]
    assert choice == {"index": 0, "text": text_of(PROMPT, 24), "logprobs": None, "finish_reason": "length"}
    count = len(demo().tokenizer.encode(PROMPT))
    assert answer["usage"] == {"prompt_tokens": count, "completion_tokens": 24, "total_tokens": count + 24}


def test_several_prompts_texts_and_ids(live: Live) -> None:
    encode = demo().tokenizer.encode
    texts = [choice["text"] for choice in live.complete(["The cat", "One day"])["choices"]]
    assert texts == [text_of("The cat", 8), text_of("One day", 8)]
    by_ids = live.complete([encode("The cat"), encode("One day")])
    assert [choice["text"] for choice in by_ids["choices"]] == texts
    assert live.complete(encode("The cat"))["choices"][0]["text"] == texts[0]


def test_samples_are_drawn_from_seeds_that_follow_each_other(live: Live) -> None:
    how: dict[str, Any] = dict(temperature=1.0, max_tokens=12)
    several = live.complete(PROMPT, n=3, seed=40, **how)
    assert [choice["index"] for choice in several["choices"]] == [0, 1, 2]
    assert several["usage"]["completion_tokens"] == 36
    alone = [live.complete(PROMPT, seed=40 + i, **how)["choices"][0]["text"] for i in range(3)]
    assert [choice["text"] for choice in several["choices"]] == alone
    assert len(set(alone)) == 3
    assert alone[1] == demo().generate(PROMPT, max_new_tokens=12, temperature=1.0, seed=41).text
    for seed in (-1, 40 + 2**33):  # all 64 bits count
        text = live.complete(PROMPT, seed=seed, **how)["choices"][0]["text"]
        assert text not in alone
        assert text == demo().generate(PROMPT, max_new_tokens=12, temperature=1.0, seed=seed).text
    assert len({live.complete(PROMPT, **how)["choices"][0]["text"] for _ in range(3)}) > 1  # no seed: a new one each


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_tells_what_a_whole_answer_tells(live: Live, path: str) -> None:
    body: dict[str, Any] = dict(temperature=1.0, seed=5, n=2, max_tokens=20, stop=[" a"])
    chat = path.endswith("chat/completions")
    body |= dict(messages=messages("Tell me"), logprobs=True) if chat else dict(prompt=PROMPT, logprobs=0)
    whole = live.post(path, body).json()
    chunks = list(live.events(path, body | {"stream_options": {"include_usage": True}}))
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk" if chat else "text_completion"}
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    for row, choice in enumerate(whole["choices"]):
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == row]
        texts = [part["delta"].get("content", "") if chat else part["text"] for part in parts]
        assert "".join(texts) == (choice["message"]["content"] if chat else choice["text"])
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + [choice["finish_reason"]]
        name = "content" if chat else "token_logprobs"
        told = [entry for part in parts if part["logprobs"] for entry in part["logprobs"][name]]
        assert told == choice["logprobs"][name]
        if chat:
            assert parts[0]["delta"] == {"role": "assistant", "content": ""}
    assert "usage" not in next(live.events(path, body))


def test_usage_can_come_with_every_chunk(live: Live) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = dict(prompt=PROMPT, temperature=0, max_tokens=20, stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in live.events("/v1/completions", body)]
    assert counts == sorted(counts)
    assert counts[-1] == 20


@pytest.mark.parametrize("streams", [False, True])
def test_stop_strings_end_a_text_wherever_tokens_end(live: Live, streams: bool) -> None:
    text = text_of(PROMPT, 40)
    for at in (3, 7, 12, 20):
        stop = text[at : at + 5]  # some begin and end inside of tokens
        body = dict(prompt=PROMPT, temperature=0, max_tokens=40, stop=["never", stop])
        if streams:
            parts = [part for chunk in live.events("/v1/completions", body) for part in chunk["choices"]]
        else:
            parts = live.post("/v1/completions", body).json()["choices"]
        assert "".join(part["text"] for part in parts) == text[: text.find(stop)]
        assert parts[-1]["finish_reason"] == "stop"


def test_stop_tokens_are_counted_and_not_shown(live: Live) -> None:
    ids = demo().generate(PROMPT, max_new_tokens=8).ids
    answer = live.complete(PROMPT, stop_token_ids=[ids[5]], logprobs=0)
    (choice,) = answer["choices"]
    first = ids.index(ids[5])
    assert choice["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == first + 1
    assert len(choice["logprobs"]["tokens"]) == first
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    later = live.complete(PROMPT, stop_token_ids=[ids[5]], min_tokens=first + 2)
    assert later["usage"]["completion_tokens"] > first + 1


def test_the_end_of_a_text_is_a_stop_token_unless_it_is_ignored(live: Live) -> None:
    eos = demo().params.config.eos_ids[0]
    ended = live.complete(PROMPT, logit_bias={str(eos): 100})
    assert ended["choices"][0]["finish_reason"] == "stop"
    assert ended["choices"][0]["text"] == ""
    assert ended["usage"]["completion_tokens"] == 1
    on = live.complete(PROMPT, logit_bias={str(eos): 100}, ignore_eos=True)
    assert on["choices"][0]["finish_reason"] == "length"
    assert on["usage"]["completion_tokens"] == 8


def test_log_probabilities_of_a_completion(live: Live) -> None:
    answer = live.complete(PROMPT, logprobs=3, temperature=1.0, seed=2)
    (choice,) = answer["choices"]
    found = choice["logprobs"]
    assert "".join(found["tokens"]) == choice["text"]
    assert found["text_offset"] == [sum(map(len, found["tokens"][:i])) for i in range(8)]
    for token, logprob, top in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
        assert top[token] == logprob
        assert 3 <= len(top) <= 4
        assert max(top.values()) >= logprob
    made = demo().generate(PROMPT, max_new_tokens=8, temperature=1.0, seed=2)
    np.testing.assert_allclose(found["token_logprobs"], made.logprobs, atol=1e-4)


def test_log_probabilities_of_an_answer(live: Live) -> None:
    answer = live.chat("Tell me a story", logprobs=True, top_logprobs=2, max_tokens=6)
    (choice,) = answer["choices"]
    content = choice["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == choice["message"]["content"]
    for entry in content:
        assert bytes(entry["bytes"]).decode(errors="replace") == entry["token"]
        assert entry["top_logprobs"][0] == {name: entry[name] for name in ("token", "logprob", "bytes")}  # greedy
        assert entry["top_logprobs"][0]["logprob"] >= entry["top_logprobs"][1]["logprob"]


def test_echo_scores_the_prompt(live: Live) -> None:
    prompt = "Once upon a time, there was"
    ids = demo().tokenizer.encode(prompt)
    (choice,) = live.complete(prompt, echo=True, logprobs=1, max_tokens=2)["choices"]
    found = choice["logprobs"]
    assert choice["text"] == prompt + text_of(prompt, 2)
    assert len(found["tokens"]) == len(ids) + 2
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    np.testing.assert_allclose(found["token_logprobs"][1 : len(ids)], demo().score(prompt).logprobs, atol=1e-3)
    for i in range(1, len(ids) + 2):  # what lm-eval asks: is the token the likeliest?
        best = max(found["top_logprobs"][i].values())
        assert best >= found["token_logprobs"][i]
    assert found["text_offset"][len(ids)] == len(prompt)
    scored = live.complete(prompt, echo=True, logprobs=0, max_tokens=0)
    assert scored["choices"][0]["text"] == prompt
    assert scored["choices"][0]["finish_reason"] == "length"
    assert scored["usage"]["completion_tokens"] == 0
    np.testing.assert_allclose(scored["choices"][0]["logprobs"]["token_logprobs"][1:], found["token_logprobs"][1:-2])
    assert live.complete([prompt, "The"], echo=True, n=2, max_tokens=1, temperature=1)["choices"][3]["text"].startswith(
        "The"
    )


def test_a_prompt_of_nothing_is_the_beginning_of_a_text(live: Live) -> None:
    assert live.complete("")["choices"][0]["text"] == text_of("", 8)


def test_penalties_and_biases_are_honoured(live: Live) -> None:
    plain = live.complete(PROMPT, max_tokens=24)["choices"][0]["text"]
    for setting in ({"presence_penalty": 2.0}, {"frequency_penalty": 2.0}, {"repetition_penalty": 1.8}):
        assert live.complete(PROMPT, max_tokens=24, **setting)["choices"][0]["text"] != plain
    ids = demo().generate(PROMPT, max_new_tokens=1).ids
    banned = live.complete(PROMPT, logit_bias={str(ids[0]): -100}, logprobs=0, max_tokens=1)
    assert banned["choices"][0]["text"] != plain[: len(banned["choices"][0]["text"])]


def test_a_chat_is_what_the_model_answers(live: Live) -> None:
    turns = messages("Who are you?", "A cat.", "And your name?")
    answer = live.chat("Who are you?", "A cat.", "And your name?", max_completion_tokens=16)
    expected = demo().chat(turns, max_new_tokens=16)
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected.text, "refusal": None}
    assert choice["logprobs"] is None
    assert answer["object"] == "chat.completion"
    assert answer["usage"]["prompt_tokens"] == len(expected.prompt_ids)
    parts = [{"type": "text", "text": "Who are "}, {"type": "text", "text": "you?"}]
    same = live.post("/v1/chat/completions", {
        "messages": [{"role": "user", "content": parts}, *turns[1:]], "temperature": 0, "max_tokens": 16,
        "tools": [], "response_format": {"type": "text"}, "store": False, "user": "u", "service_tier": "auto",
    }).json()  # fmt: skip
    assert same["choices"] == answer["choices"]


def test_an_answer_without_a_limit_goes_on_to_the_end_of_the_context(live: Live) -> None:
    answer = live.chat("Tell me a story", ignore_eos=True, logit_bias={"13": -100})
    assert answer["choices"][0]["finish_reason"] in ("length", "stop")
    if answer["choices"][0]["finish_reason"] == "length":
        assert answer["usage"]["total_tokens"] == demo().max_len


def test_tokens_of_texts_and_texts_of_tokens(live: Live) -> None:
    made = live.post("/tokenize", {"prompt": PROMPT, "return_token_strs": True}).json()
    ids = demo().tokenizer.encode(PROMPT)
    assert (made["tokens"], made["count"], made["max_model_len"]) == (ids, len(ids), demo().max_len)
    assert "".join(made["token_strs"][1:]).strip() == PROMPT
    bare = live.post("/tokenize", {"prompt": PROMPT, "add_special_tokens": False}).json()["tokens"]
    assert bare == ids[1:]
    talk = live.post("/tokenize", {"messages": messages("Hello")}).json()["tokens"]
    assert talk == demo().prompt_ids(messages("Hello"))
    assert live.post("/detokenize", {"tokens": ids}).json() == {"prompt": PROMPT}


def test_prompts_are_shared_within_a_tenant_and_a_salt_only(live: Live) -> None:
    prompt = " ".join(["the cat and the dog"] * 40)

    def hits(**body: Any) -> int:
        before = live.service.engine.statistics.prefix_hits
        live.complete(prompt, max_tokens=1, **body)
        return live.service.engine.statistics.prefix_hits - before

    hits()
    assert hits() > 64
    assert hits(cache_salt="mine") == 0
    assert hits(cache_salt="mine") > 64


def test_no_answer_holds_a_number_that_json_has_not(live: Live) -> None:
    (choice,) = live.complete(PROMPT, logprobs=20, max_tokens=2)["choices"]
    assert all(math.isfinite(v) for top in choice["logprobs"]["top_logprobs"] for v in top.values())

"""`LM`: text in, text out, on the embedded model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jllama
from jllama import LM, InputError
from jllama.text.templates import PlainChat

PROMPTS = ["Once upon a time,", "Tom", "One day, a girl named Lily went to the"]


@functools.cache
def demo() -> LM:
    return LM.load(jllama.DEMO)


def test_several_prompts_give_what_each_gives_alone_whatever_the_batch() -> None:
    warm = dict(max_new_tokens=12, temperature=0.9, top_p=0.95)
    together = demo().generate(PROMPTS, seed=3, **warm)
    pairs = demo().generate(PROMPTS, seed=3, slots=2, **warm)
    alone = [demo().generate(text, seed=3 + i, **warm) for i, text in enumerate(PROMPTS)]
    assert [c.ids for c in together] == [c.ids for c in pairs] == [c.ids for c in alone]
    for completion in together:
        assert completion.finish_reason == "length"
        assert len(completion.ids) == len(completion.logprobs) == 12
        assert completion.text
    assert demo().generate([], max_new_tokens=3) == []


def test_a_stream_is_the_text_of_generate_and_two_may_run_at_once() -> None:
    texts = [demo().generate(text, max_new_tokens=40).text for text in PROMPTS[:2]]
    streams = [demo().stream(text, max_new_tokens=40) for text in PROMPTS[:2]]
    found = ["", ""]
    for pieces in zip(*streams, strict=False):
        found = [a + b for a, b in zip(found, pieces, strict=True)]
    found = [a + "".join(rest) for a, rest in zip(found, streams, strict=True)]
    assert found[1] == texts[1]
    assert texts[0].startswith(found[0])
    assert len(found[0]) > 20  # zip takes one piece more of the first, when the second has ended


def test_stops_end_a_text_before_them() -> None:
    whole = demo().generate(PROMPTS[0], max_new_tokens=40).text
    stop = whole.split()[6]
    for given in (stop, [stop, "never said"]):
        got = demo().generate(PROMPTS[0], max_new_tokens=40, stop=given)
        assert (got.text, got.finish_reason) == (whole[: whole.index(stop)], "stop")
    for empty in ("", [stop, ""]):
        with pytest.raises(InputError, match="stop: expected a text, found an empty one"):
            demo().generate(PROMPTS[0], stop=empty)


def test_a_conversation_is_metas_format_and_only_its_new_turns_are_fed() -> None:
    lm = LM.load(jllama.DEMO, chat_template="llama-2")
    talk = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    ids = lm.prompt_ids(talk)
    assert lm.tokenizer.decode(ids) == "[INST] <<SYS>>\nbe kind\n<</SYS>>\n\nhello [/INST]"
    first = lm.chat(talk, max_new_tokens=6)
    assert first.prompt_ids == ids
    assert "".join(lm.stream(talk, max_new_tokens=6)) == first.text
    longer = [*talk, {"role": "assistant", "content": first.text.strip()}, {"role": "user", "content": "and then?"}]
    second = lm.chat(longer, max_new_tokens=6)
    assert 0 < lm.timings.prompt_tokens < len(second.prompt_ids) - len(ids) // 2
    assert second.ids == LM.load(jllama.DEMO, chat_template="llama-2").chat(longer, max_new_tokens=6).ids


def test_an_answer_ends_where_the_other_speaker_would_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base model's chat is plain text, and the reply ends where the next turn would begin."""
    talk = [{"role": "user", "content": "Tell me of Tom."}]
    assert demo().tokenizer.decode(demo().prompt_ids(talk)) == "User: Tell me of Tom.\nAssistant:"
    free = demo().chat(talk, max_new_tokens=30)
    word = free.text.split()[4]
    monkeypatch.setattr(demo(), "chat_format", PlainChat(stop=(word,)))
    for text in (demo().chat(talk, max_new_tokens=30).text, "".join(demo().stream(talk, max_new_tokens=30))):
        assert text == free.text[: free.text.index(word)]
    ids = demo().generate("User: Tell me of Tom.\nAssistant:", max_new_tokens=30)
    assert ids.text == free.text  # a completion that is not a chat does not end there


@pytest.mark.parametrize("messages", [[], [{"role": "nobody", "content": "x"}]])
def test_messages_that_are_none_are_refused(messages: list[dict[str, str]]) -> None:
    with pytest.raises(InputError, match=r"^messages: "):
        demo().prompt_ids(messages)


def test_scores_are_the_forwards_own_also_one_by_one() -> None:
    texts = ["The cat sat on the mat.", "Mat the on.", "A", "One day, a girl named Lily went to the park with her mom."]
    together = demo().score(texts)
    rows = [demo().tokenizer.encode(text) for text in texts]
    padded = np.asarray([ids + [0] * (max(map(len, rows)) - len(ids)) for ids in rows])
    logprobs = jax.nn.log_softmax(jax.jit(jllama.forward)(demo().params, padded)[0])  # [texts, tokens, V]
    for ids, row, score, alone in zip(rows, np.asarray(logprobs), together, map(demo().score, texts), strict=True):
        expected = [row[i, token] for i, token in enumerate(ids[1:])]
        assert score.ids == alone.ids == ids[1:]
        np.testing.assert_allclose(score.logprobs, expected, atol=1e-4)
        np.testing.assert_allclose(alone.logprobs, expected, atol=1e-4)
        assert score.total == sum(score.logprobs)
    with pytest.raises(InputError, match=r"prompt 1: expected 1 to 512 tokens \(the context\), found 6"):
        demo().score(["a", "word " * 300])


def test_weights_may_be_replaced_and_the_old_cache_is_of_no_use() -> None:
    mine = LM(demo().params, demo().tokenizer, demo().max_len)
    before = mine.generate(PROMPTS[0], max_new_tokens=8).ids
    mine.params = jax.tree.map(lambda w: w * 0.5, demo().params)
    changed = mine.generate(PROMPTS[0], max_new_tokens=8).ids
    assert mine.timings.prompt_tokens == len(mine.tokenizer.encode(PROMPTS[0]))
    mine.params = demo().params
    assert mine.generate(PROMPTS[0], max_new_tokens=8).ids == before != changed


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.bfloat16, jnp.dtype("bfloat16"), np.float16, float])
def test_load_takes_a_dtype_as_jax_does(dtype: object) -> None:
    if dtype is float:
        with pytest.raises(InputError, match="dtype: expected one of float32, bfloat16, float16, found 'float64'"):
            LM.load(jllama.DEMO, dtype=dtype)
    else:
        assert LM.load(jllama.DEMO, dtype=dtype).params.dtype == jnp.dtype(dtype)


def test_load_quantises_and_sets_the_context() -> None:
    small = LM.load(jllama.DEMO, quant="int8", max_len=64)
    assert isinstance(small.params.layers[0].wqkv, jllama.QuantizedTensor)
    with pytest.raises(InputError, match="prompt 0: expected 1 to 63 tokens"):
        small.generate("word " * 100)
    with pytest.raises(InputError, match=r"max_len: expected 2 to 512 \(the model's context\), found 1000"):
        LM.load(jllama.DEMO, max_len=1000)
    with pytest.raises(InputError, match="no/such/model"):
        LM.load("no/such/model")


def test_bad_options_are_one_line() -> None:
    with pytest.raises(InputError, match="max_new_tokens: expected at least 1, found 0"):
        demo().generate("a", max_new_tokens=0)
    with pytest.raises(InputError, match="slots: expected at least 1, found 0"):
        demo().generate(["a"], slots=0)
    with pytest.raises(TypeError, match="temprature"):
        demo().generate("a", temprature=1.0)


def test_a_pool_is_as_large_as_the_requests_of_a_call_and_is_kept() -> None:
    lm = LM(demo().params, demo().tokenizer, demo().max_len)
    lm.generate(PROMPTS, max_new_tokens=4)
    first = lm._idle_engine
    assert first is not None
    assert first.statistics.pages == 16
    assert lm.timings.new_tokens == 12
    assert lm.timings.prompt_tokens == sum(len(lm.tokenizer.encode(text)) for text in PROMPTS)
    assert lm.backends.keys() == {"prefill", "decode"}
    lm.generate(PROMPTS, max_new_tokens=4)
    assert lm._idle_engine is first
    pieces = lm.complete([jllama.Completion(lm.tokenizer.encode(text)) for text in PROMPTS], max_new_tokens=40)
    next(pieces)
    assert lm._idle_engine is None  # another run would have its own
    pieces.close()
    assert lm._idle_engine is first
    assert not first.busy


def test_top_log_probabilities_of_one_prompt_and_of_several() -> None:
    several = demo().generate(PROMPTS, max_new_tokens=4, top_logprobs=3)
    for text, completion in zip(PROMPTS, several, strict=True):
        assert demo().generate(text, max_new_tokens=4, top_logprobs=3).ids == completion.ids
        for token, logprob, top in zip(completion.ids, completion.logprobs, completion.top_logprobs, strict=True):
            assert len(top) == 3
            np.testing.assert_allclose(top[token], logprob, atol=1e-4)

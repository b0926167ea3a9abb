"""``tokenizer.json`` files and GGUF's words for the same: what is written to a GGUF file gives equal ids."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from smollm2 import needs_smollm2
from strings import strings

from convert.__main__ import main
from convert.to_gguf import carried
from jllama.errors import InputError
from jllama.formats import open_source
from jllama.formats.bpe import PRE_TOKENIZERS, BpeVocabulary
from jllama.formats.gguf_file import read_gguf
from jllama.formats.native import directory, save
from jllama.formats.tokenizer_json import _PUBLISHED, from_tokenizer_json
from jllama.formats.vocabulary import NORMAL, UNUSED
from jllama.text.templates import chat_for, chat_prompt_ids
from jllama.text.tokenizer import from_vocabulary, tokenizer_for

tokenizers = pytest.importorskip("tokenizers")

TEXTS = [
    "the hat, the cats; that's 1234 hats!",
    "  two  spaces\n\nand lines\t",
    "Ünïcode 🙂 ½",
    "<|end|>the<note>hat",
    "",
]
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
CUTS: dict[str, dict[str, Any]] = {
    "gpt-2": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    },
}
for _pattern, _name in _PUBLISHED.items():
    _split = {"type": "Split", "pattern": {"Regex": _pattern}, "behavior": "Isolated", "invert": False}
    _bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    CUTS[_name] = {"type": "Sequence", "pretokenizers": [_split, _bytes]}


def tiny_bpe() -> dict[str, Any]:
    """A small trained one, as the library writes it."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(["the hat and the cat that sat; 12 34 hats and cats"] * 9, trainer)
    model.add_tokens(["<note>"])
    return json.loads(model.to_str())


def checkpoint(path: Path, values: dict[str, Any], size: int = 304) -> Path:
    """A model with that tokenizer, whose embedding has rows to spare."""
    config = checkpoints.CONFIG.replace(vocab_size=size, bos_id=0, eos_ids=(1, 5, 7))
    save(directory(dataclasses.replace(checkpoints.source(config, tokenizer="none"), tokenizer=None)), path)
    (path / "tokenizer.json").write_text(json.dumps(values))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.mark.parametrize("pre", CUTS)
def test_to_gguf_and_back_ids_template_and_ends_are_the_same(
    pre: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = tiny_bpe()
    values["pre_tokenizer"] = CUTS[pre]
    values["model"]["ignore_merges"] = PRE_TOKENIZERS[pre].ignore_merges
    first = checkpoint(tmp_path / "first", values)
    assert main([str(first), str(tmp_path / "m.gguf")]) == 0
    assert capsys.readouterr().out.endswith("with its tokenizer\n")
    assert main([str(tmp_path / "m.gguf"), str(tmp_path / "again"), "--to", "hf", "-q"]) == 0
    assert main([str(tmp_path / "again"), str(tmp_path / "n.gguf"), "-q"]) == 0
    source = open_source(first)
    tokenizer, messages = tokenizer_for(source), [{"role": "user", "content": "the <|end|> hat"}]
    chat = chat_prompt_ids(messages, tokenizer, chat_for(source))
    assert read_gguf(tmp_path / "m.gguf").fields["tokenizer.ggml.pre"] == pre
    for name in ("m.gguf", "again", "n.gguf"):
        other = open_source(tmp_path / name)
        found = tokenizer_for(other)
        for text in TEXTS:
            for special in (False, True):
                ids = tokenizer.encode(text, special=special)
                assert found.encode(text, special=special) == ids
                assert found.decode(ids) == tokenizer.decode(ids)
        assert set(other.config.eos_ids) == {1, 5, 7}
        assert chat_prompt_ids(messages, found, chat_for(other)) == chat
    one, other = (open_source(tmp_path / name).tokenizer for name in ("m.gguf", "n.gguf"))
    assert isinstance(one, BpeVocabulary)
    assert isinstance(other, BpeVocabulary)
    assert one.types[-1] == UNUSED
    # A tokenizer.json has no word for an unused token.
    as_read = dataclasses.replace(one, where="", types=tuple(NORMAL if t == UNUSED else t for t in one.types))
    assert dataclasses.replace(other, where="") == as_read


@pytest.mark.parametrize(
    ("processor", "note", "begins"),
    [(True, None, True), (False, None, False), (True, False, False), (False, True, True)],
)
def test_whether_a_text_begins_with_bos(processor: bool, note: bool | None, begins: bool, tmp_path: Path) -> None:
    values = tiny_bpe()
    if processor:
        begin = {"<|begin|>": {"id": "<|begin|>", "ids": [0], "tokens": ["<|begin|>"]}}
        single = [{"SpecialToken": {"id": "<|begin|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        template = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": begin}
        values["post_processor"] = {"type": "Sequence", "processors": [{"type": "ByteLevel", **OFF}, template]}
    path = checkpoint(tmp_path / "m", values)
    if note is not None:
        names = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
        (path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": note, **names}))
    source = open_source(path)
    vocabulary, _ = carried(source)
    assert isinstance(vocabulary, BpeVocabulary)
    assert vocabulary.add_bos is begins
    assert from_vocabulary(vocabulary).encode("the hat") == tokenizer_for(source).encode("the hat")


OFF = {"add_prefix_space": False, "trim_offsets": False, "use_regex": True}
Change = Callable[[dict[str, Any]], Any]
OTHERS: list[tuple[Change, str]] = [
    (lambda v: v.update(normalizer={"type": "NFC"}), "normalizer: expected none, found 'NFC'"),
    (lambda v: v["model"].update(dropout=0.1), "model: dropout: expected None, found"),
    (
        lambda v: v["model"].update(ignore_merges=True),
        "ignore_merges: not as the pre-tokenizer gpt-2 has it, found True",
    ),
    (lambda v: v["added_tokens"][0].update(lstrip=True), "expected no single_word, lstrip or rstrip, found one"),
    (lambda v: v["pre_tokenizer"].update(add_prefix_space=True), "pre_tokenizer: expected that of default, gpt-2"),
    (lambda v: v.update(pre_tokenizer={"type": "Whitespace"}), "pre_tokenizer: expected that of default, gpt-2"),
]


@pytest.mark.parametrize(("change", "message"), OTHERS, ids=[m for _, m in OTHERS])
def test_what_gguf_has_no_words_for_is_left_out_and_said(
    change: Change, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = tiny_bpe()
    change(values)
    path = checkpoint(tmp_path / "m", values)
    assert main([str(path), str(tmp_path / "m.gguf")]) == 0
    out = capsys.readouterr().out
    assert "without a tokenizer (" in out
    assert message in out
    assert open_source(tmp_path / "m.gguf").tokenizer is None


HOSTILE: list[tuple[Change, str]] = [
    (lambda v: v.pop("model"), "expected a tokenizer of the tokenizers library"),
    (lambda v: v.update(pre_tokenizer=None), "expected a tokenizer of the tokenizers library"),
    (lambda v: v["model"]["merges"].append(["a", "b", "c"]), "merges: expected two tokens"),
    (lambda v: v["model"]["merges"].append("ab"), "merges: expected two tokens"),
    (lambda v: v["model"]["vocab"].update(z9=1 << 40), "expected token ids below vocab_size 304, found others"),
    (lambda v: v["model"]["vocab"].update(z9="1"), "expected token ids below vocab_size 304, found others"),
    (lambda v: v["added_tokens"][0].update(content=3), "expected texts of tokens, found something else"),
    (lambda v: v.update(added_tokens=[1]), "expected a tokenizer of the tokenizers library"),
    (lambda v: v.update(post_processor=[1]), "expected a tokenizer of the tokenizers library"),
]


@pytest.mark.parametrize("change", [change for change, _ in HOSTILE], ids=range(len(HOSTILE)))
def test_a_damaged_file_is_one_line(change: Change, tmp_path: Path) -> None:
    values = tiny_bpe()
    change(values)
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    message = next(text for other, text in HOSTILE if other is change)
    with pytest.raises(InputError, match=message) as error:
        from_tokenizer_json(tmp_path / "tokenizer.json", checkpoints.CONFIG.replace(vocab_size=304))
    assert "\n" not in str(error.value)


@needs_smollm2
def test_smollm2_to_hf_to_gguf_gives_equal_ids(tmp_path: Path) -> None:
    source = open_source("smollm2")
    # The tokenizer is what is tested: of the weights, a tiny model with as many tokens will do.
    config = checkpoints.CONFIG.replace(
        vocab_size=source.config.vocab_size, bos_id=source.config.bos_id, eos_ids=source.config.eos_ids
    )
    small = dataclasses.replace(checkpoints.source(config, tokenizer=source.tokenizer), metadata=source.metadata)
    save(directory(small), tmp_path / "hf")
    assert main([str(tmp_path / "hf"), str(tmp_path / "m.gguf"), "-q"]) == 0
    again = open_source(tmp_path / "m.gguf")
    assert isinstance(source.tokenizer, BpeVocabulary)
    assert isinstance(again.tokenizer, BpeVocabulary)
    for field in ("tokens", "merges", "pre", "bos_id", "eos_id"):
        assert getattr(again.tokenizer, field) == getattr(source.tokenizer, field), field
    one, other = tokenizer_for(source), tokenizer_for(again)
    text = "<|endoftext|>".join(strings())
    for special in (False, True):
        assert one.encode(text, special=special) == other.encode(text, special=special)
    messages = [{"role": "user", "content": "It's 9 o'clock 🙂"}]
    assert chat_prompt_ids(messages, one, chat_for(source)) == chat_prompt_ids(messages, other, chat_for(again))

"""Text to ids and back, and text as it comes out of a stream of ids."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from jllama.config import read_json
from jllama.errors import InputError
from jllama.formats.bpe import BpeVocabulary
from jllama.formats.files import MappedFile, first_of, label
from jllama.formats.gguf_file import read_gguf
from jllama.formats.gguf_vocabulary import vocabulary_in
from jllama.formats.hf import TOKENIZERS
from jllama.formats.hub import resolve
from jllama.formats.source import Source
from jllama.formats.vocabulary import Vocabulary, from_llama2c
from jllama.text.backends import JsonTokenizer, SentencePieceTokenizer
from jllama.text.control import ControlTokens

_MAX_TOKENIZER_BYTES = 64 << 20


class Tokenizer(Protocol):
    """What the rest of the library asks of a tokenizer."""

    n_ids: int
    bos_id: int
    eos_id: int
    adds_bos: bool
    control: ControlTokens

    def encode(self, text: str, *, bos: bool = True, special: bool = False) -> list[int]:
        """The ids of a text, with the beginning-of-sequence id in front where the model wants one (``adds_bos``) unless
        told otherwise. ``special``: the names of control tokens stand for these tokens; else they are text as any."""
        ...

    def encode_rendered(self, text: str, letters: Mapping[int, str] | None = None) -> list[int]:
        """The ids of a text that a template wrote: no bos but what it names. ``letters``, as `str.translate` takes
        them, are put in once the control tokens have been found."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of ids; control ids give nothing."""
        ...


def load_tokenizer(
    path: str | Path,
    vocab_size: int | None = None,
    *,
    bos_id: int | None = None,
    eos_id: int | None = None,
    links: bool = False,
) -> Tokenizer:
    """Load a tokenizer file (``.model``, llama2.c's ``.bin``, ``.json`` or a ``.gguf``) or that of a directory, and
    check that it goes with a model of ``vocab_size``. ``bos_id`` and ``eos_id`` are for a ``.json``, which does not
    name them; by default they are what the config files beside it say. ``links``: as `open_source` has it."""
    path = resolve(path)
    if path.is_dir():
        file = first_of(path, TOKENIZERS, links=links)
        if file is None:
            raise InputError(f"{path}: expected a tokenizer ({', '.join(TOKENIZERS)}), found none")
        path = file
    if not path.is_file():
        raise InputError(f"{path}: no such tokenizer file")
    if path.suffix == ".gguf":
        return _of_gguf(path, vocab_size)
    if path.suffix == ".bin":
        return from_vocabulary(from_llama2c(path), vocab_size)
    file = MappedFile(path)
    if file.size > _MAX_TOKENIZER_BYTES:
        raise InputError(f"{path}: expected a tokenizer of at most {_MAX_TOKENIZER_BYTES} bytes, found {file.size}")
    content, notes = file.bytes(0, file.size), tokenizer_config(path.parent, links=links)
    adds_bos = notes.get("add_bos_token")
    if path.suffix != ".json":
        adds_bos = adds_bos is not False
        return _fitting(SentencePieceTokenizer(content, str(path), adds_bos=adds_bos), str(path), vocab_size)
    ids = [i if i is not None else _special(path, j, notes) for j, i in enumerate((bos_id, eos_id))]
    adds_bos = adds_bos if isinstance(adds_bos, bool) else None
    return _fitting(JsonTokenizer(content, str(path), *ids, adds_bos=adds_bos), str(path), vocab_size)


def tokenizer_config(directory: Path, name: str = "tokenizer_config.json", *, links: bool = False) -> dict[str, Any]:
    """What ``tokenizer_config.json`` or its like says; empty where there is none."""
    path = first_of(directory, (name,), links=links)
    return {} if path is None else read_json(path)


def special_text(value: Any) -> str | None:
    """A special token of a config file, which is written as a text or as an object."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _special(path: Path, which: int, notes: dict[str, Any]) -> int:
    """The id of the first (0) or the last (1) token of a text: the one that the config beside a tokenizer.json names,
    or that has one of the usual names."""
    named = special_text(notes.get(("bos_token", "eos_token")[which]))
    usual = (("<s>", "<|begin_of_text|>"), ("</s>", "<|end_of_text|>"))[which]
    names = usual if named is None else (named,)
    try:
        added = json.loads(path.read_bytes()).get("added_tokens", [])
        return next(token["id"] for token in added if token["content"] in names)
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError, StopIteration):
        raise InputError(f"{path}: added_tokens: expected {' or '.join(names)}, found neither") from None


def _of_gguf(path: Path, vocab_size: int | None) -> Tokenizer:
    file = read_gguf(path)
    tokens = file.fields.get("tokenizer.ggml.tokens")
    vocabulary = vocabulary_in(file, len(tokens) if isinstance(tokens, tuple) else 0)
    if vocabulary is None:
        raise InputError(f"{path}: {_kind_of(file.fields)}")
    return from_vocabulary(vocabulary, vocab_size)


def _kind_of(fields: Mapping[str, Any]) -> str:
    """Why a GGUF file's metadata give no tokenizer."""
    kind = fields.get("tokenizer.ggml.model", "none")
    if kind in ("none", "no_vocab"):
        return "carries no tokenizer"
    return f"tokenizer.ggml.model: expected 'llama' or 'gpt2', found {label(kind)!r}"


def from_vocabulary(vocabulary: Vocabulary | BpeVocabulary, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of a vocabulary that has no file of its own."""
    where = vocabulary.where
    if isinstance(vocabulary, BpeVocabulary):
        tokenizer = JsonTokenizer(vocabulary.tokenizer_json(), where, vocabulary.bos_id, vocabulary.eos_id)
    else:
        tokenizer = SentencePieceTokenizer(vocabulary.model_bytes(), where, adds_bos=vocabulary.add_bos)
    return _fitting(tokenizer, where, vocab_size)


def tokenizer_for(source: Source, path: str | Path | None = None) -> Tokenizer:
    """The tokenizer of an opened checkpoint: ``path`` if given, or else what the checkpoint itself carries."""
    config, own = source.config, source.tokenizer
    if path is None and own is None:
        reason = _kind_of(source.metadata) if source.form == "gguf" else "carries no tokenizer"
        raise InputError(f"{source.path}: {reason}: name one with --tokenizer FILE")
    if path is None and isinstance(own, Vocabulary | BpeVocabulary):
        return from_vocabulary(own, config.vocab_size)
    ids = {"bos_id": config.bos_id, "eos_id": config.eos_ids[0]}
    return load_tokenizer(str(own if path is None else path), config.vocab_size, **ids, links=source.links)


def with_tokenizer(source: Source, path: Path | None) -> Source:
    """The checkpoint with ``path``, if given, as its tokenizer; checked, whichever it is, to go with the model."""
    if path is not None:
        source = dataclasses.replace(source, tokenizer=path)
    if source.tokenizer is not None:
        tokenizer_for(source)
    return source


def _fitting(tokenizer: Tokenizer, where: str, vocab_size: int | None) -> Tokenizer:
    """The tokenizer itself, once its size is known to go with the model's; a padded embedding has rows to spare."""
    if vocab_size is not None and not tokenizer.n_ids <= vocab_size <= tokenizer.n_ids + 256:
        raise InputError(
            f"{where}: expected a tokenizer for the model's vocab_size {vocab_size}, found {tokenizer.n_ids} pieces"
        )
    return tokenizer


class TextStream:
    """Turns ids that arrive one after another into text, holding back what the next id may still change: the bytes
    of an unfinished character, and the beginning of a stop string."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], stop: tuple[str, ...] = ()) -> None:
        self._tokenizer = tokenizer
        # A few ids of context, because the first piece of a decoded text loses its leading space.
        self._ids = list(prompt[-8:])
        self._read = len(self._ids)
        self._begin = 0
        self._stop = stop
        self._held = ""
        self.stopped = False

    def push(self, ids: list[int]) -> str:
        """The text that these ids settle. Once a stop string has appeared (`stopped`), nothing more comes."""
        out = ""
        for token in ids:
            if self.stopped:
                break
            self._ids.append(token)
            out += self._release(self._settled())
        return out

    def finish(self) -> str:
        """What was held back."""
        if self.stopped:
            return ""
        rest = self._tail()
        self._read = len(self._ids)
        return self._release(rest) + self._flush()

    def _flush(self) -> str:
        held, self._held = ("" if self.stopped else self._held), ""
        return held

    def _tail(self) -> str:
        before = self._tokenizer.decode(self._ids[self._begin : self._read])
        return self._tokenizer.decode(self._ids[self._begin :])[len(before) :]

    def _settled(self) -> str:
        text = self._tail()
        if text.endswith("\ufffd"):  # bytes of a character whose rest has not come
            return ""
        self._begin, self._read = self._read, len(self._ids)
        return text

    def _release(self, text: str) -> str:
        self._held += text
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            out, self._held = self._held[: min(found)], ""
            return out
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        out, self._held = (
            self._held[: len(self._held) - keep],
            self._held[len(self._held) - keep :],
        )
        return out


def _overlap(text: str, stop: str) -> int:
    """How long an end of ``text`` is a beginning of ``stop``."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])),
        0,
    )

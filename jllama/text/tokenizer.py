"""Loads tokenizers, and decodes streams of ids to text."""

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
    """The interface of a tokenizer."""

    n_ids: int
    bos_id: int
    eos_id: int
    adds_bos: bool
    control: ControlTokens

    def encode(self, text: str, *, bos: bool = True, special: bool = False) -> list[int]:
        """Encode a text. If ``bos`` and the tokenizer's ``adds_bos`` are both set, the ids start with the
        beginning-of-sequence id. With ``special``, names of control tokens in the text become these tokens; otherwise
        they are ordinary text."""
        ...

    def encode_rendered(self, text: str, letters: Mapping[int, str] | None = None) -> list[int]:
        """Encode the output of a chat template. No beginning-of-sequence id is added except those that the text names.
        ``letters``, in the form of `str.translate`, are replaced after the control tokens have been found."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of ids. Control tokens have no text."""
        ...

    def token_bytes(self) -> list[bytes]:
        """The bytes that each token stands for within a text. Those of control tokens are their names; those of tokens
        that stand for nothing are empty."""
        ...


def load_tokenizer(
    path: str | Path,
    vocab_size: int | None = None,
    *,
    bos_id: int | None = None,
    eos_id: int | None = None,
    links: bool = False,
) -> Tokenizer:
    """Load a tokenizer from a file (``.model``, llama2.c's ``.bin``, ``.json`` or ``.gguf``) or a directory.

    If ``vocab_size`` is given, the size of the tokenizer must fit a model with this vocabulary. ``bos_id`` and
    ``eos_id`` are used only for a ``.json``, which does not contain them; by default they come from the config files
    beside it. ``links`` is as in `open_source`.
    """
    path = resolve(path)
    if path.is_dir():
        file = first_of(path, TOKENIZERS, links=links)
        if file is None:
            raise InputError(f"{path}: expected a tokenizer ({', '.join(TOKENIZERS)}), found none")
        path = file
    if not path.is_file():
        raise InputError(f"{path}: no such tokenizer file")
    if path.suffix == ".gguf":
        return _from_gguf(path, vocab_size)
    if path.suffix == ".bin":
        return from_vocabulary(from_llama2c(path), vocab_size)
    file = MappedFile(path)
    if file.size > _MAX_TOKENIZER_BYTES:
        raise InputError(f"{path}: expected a tokenizer of at most {_MAX_TOKENIZER_BYTES} bytes, found {file.size}")
    content, settings = file.bytes(0, file.size), tokenizer_config(path.parent, links=links)
    adds_bos = settings.get("add_bos_token")
    if path.suffix != ".json":
        adds_bos = adds_bos is not False
        return _check_size(SentencePieceTokenizer(content, str(path), adds_bos=adds_bos), str(path), vocab_size)
    ids = [i if i is not None else _special_id(path, j, settings) for j, i in enumerate((bos_id, eos_id))]
    adds_bos = adds_bos if isinstance(adds_bos, bool) else None
    return _check_size(JsonTokenizer(content, str(path), *ids, adds_bos=adds_bos), str(path), vocab_size)


def tokenizer_config(directory: Path, name: str = "tokenizer_config.json", *, links: bool = False) -> dict[str, Any]:
    """The content of ``tokenizer_config.json``, or of another file ``name``; empty if there is no such file."""
    path = first_of(directory, (name,), links=links)
    return {} if path is None else read_json(path)


def special_text(value: Any) -> str | None:
    """The text of a special token in a config file, where it is a string or an object; None if it is neither."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _special_id(path: Path, which: int, settings: dict[str, Any]) -> int:
    """The beginning-of-sequence id (``which`` 0) or end-of-sequence id (1) for a tokenizer.json. The token is the one
    that the config beside the file names, or else one with a usual name."""
    named = special_text(settings.get(("bos_token", "eos_token")[which]))
    usual = (("<s>", "<|begin_of_text|>"), ("</s>", "<|end_of_text|>"))[which]
    names = usual if named is None else (named,)
    try:
        added = json.loads(path.read_bytes()).get("added_tokens", [])
        return next(token["id"] for token in added if token["content"] in names)
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError, StopIteration):
        raise InputError(f"{path}: added_tokens: expected {' or '.join(names)}, found neither") from None


def _from_gguf(path: Path, vocab_size: int | None) -> Tokenizer:
    file = read_gguf(path)
    tokens = file.fields.get("tokenizer.ggml.tokens")
    vocabulary = vocabulary_in(file, len(tokens) if isinstance(tokens, tuple) else 0)
    if vocabulary is None:
        raise InputError(f"{path}: {_no_tokenizer_reason(file.fields)}")
    return from_vocabulary(vocabulary, vocab_size)


def _no_tokenizer_reason(fields: Mapping[str, Any]) -> str:
    """Why the metadata of a GGUF file contain no tokenizer that can be used."""
    kind = fields.get("tokenizer.ggml.model", "none")
    if kind in ("none", "no_vocab"):
        return "carries no tokenizer"
    return f"tokenizer.ggml.model: expected 'llama' or 'gpt2', found {label(kind)!r}"


def from_vocabulary(vocabulary: Vocabulary | BpeVocabulary, vocab_size: int | None = None) -> Tokenizer:
    """Create a tokenizer from a vocabulary."""
    where = vocabulary.where
    if isinstance(vocabulary, BpeVocabulary):
        tokenizer = JsonTokenizer(vocabulary.tokenizer_json(), where, vocabulary.bos_id, vocabulary.eos_id)
    else:
        tokenizer = SentencePieceTokenizer(vocabulary.model_bytes(), where, adds_bos=vocabulary.add_bos)
    return _check_size(tokenizer, where, vocab_size)


def tokenizer_for(source: Source, path: str | Path | None = None) -> Tokenizer:
    """The tokenizer for an opened checkpoint: from ``path`` if given, else from the checkpoint itself."""
    config, own = source.config, source.tokenizer
    if path is None and own is None:
        reason = _no_tokenizer_reason(source.metadata) if source.form == "gguf" else "carries no tokenizer"
        raise InputError(f"{source.path}: {reason}: name one with --tokenizer FILE")
    if path is None and isinstance(own, Vocabulary | BpeVocabulary):
        return from_vocabulary(own, config.vocab_size)
    ids = {"bos_id": config.bos_id, "eos_id": config.eos_ids[0]}
    return load_tokenizer(str(own if path is None else path), config.vocab_size, **ids, links=source.links)


def with_tokenizer(source: Source, path: Path | None) -> Source:
    """The checkpoint with its tokenizer replaced by ``path`` if given. The tokenizer is checked to fit the model."""
    if path is not None:
        source = dataclasses.replace(source, tokenizer=path)
    if source.tokenizer is not None:
        tokenizer_for(source)
    return source


def _check_size(tokenizer: Tokenizer, where: str, vocab_size: int | None) -> Tokenizer:
    """Return the tokenizer, or raise `InputError` if its size does not fit the model's. The embedding may be padded
    with up to 256 rows."""
    if vocab_size is not None and not tokenizer.n_ids <= vocab_size <= tokenizer.n_ids + 256:
        raise InputError(
            f"{where}: expected a tokenizer for the model's vocab_size {vocab_size}, found {tokenizer.n_ids} pieces"
        )
    return tokenizer


INCOMPLETE = "\ufffd"  # what a decoder writes for a part of a character


class TextStream:
    """Decodes ids that arrive one after another. Text that a later id may still change is held back: the bytes of an
    incomplete character, and the beginning of a stop string."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], stop: tuple[str, ...] = ()) -> None:
        self._tokenizer = tokenizer
        # The decoder drops the leading space of its first piece. So a few ids of the prompt are kept as context.
        self._ids = list(prompt[-8:])
        self._context_start = 0  # decoding starts at this id
        self._settled_end = len(self._ids)  # the text of the ids before this one has been released or held
        self._stop = stop
        self._held = ""
        self.settled = 0  # characters that no later id changes: those released, and those held for a stop string
        self.stopped = False

    def push(self, ids: list[int]) -> str:
        """Add ids, and return the text that can no longer change. After a stop string (`stopped`), it is empty."""
        if len(ids) > 1 and not self._stop:  # decoding them together is cheaper than one by one
            self._ids += ids
            if not (text := self._tail()).endswith(INCOMPLETE):
                return self._release(self._settle(text))
            del self._ids[-len(ids) :]  # the last one ends within a character, but those before it can be released
        out = ""
        for token in ids:
            if self.stopped:
                break
            self._ids.append(token)
            out += self._release(self._settled())
        return out

    def finish(self) -> str:
        """Return the text that was held back."""
        if self.stopped:
            return ""
        rest = self._tail()
        self._settled_end = len(self._ids)
        return self._release(rest) + self._flush()

    def _flush(self) -> str:
        held, self._held = ("" if self.stopped else self._held), ""
        return held

    def _tail(self) -> str:
        """The text of the ids that are not settled yet."""
        before = self._tokenizer.decode(self._ids[self._context_start : self._settled_end])
        return self._tokenizer.decode(self._ids[self._context_start :])[len(before) :]

    def _settled(self) -> str:
        text = self._tail()
        return "" if text.endswith(INCOMPLETE) else self._settle(text)

    def _settle(self, text: str) -> str:
        """Take all ids for settled; ``text`` is the new part of theirs."""
        self._context_start, self._settled_end = self._settled_end, len(self._ids)
        return text

    def _release(self, text: str) -> str:
        """Add settled text, and return what cannot be the beginning of a stop string."""
        self._held += text
        self.settled += len(text)
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
    """The length of the longest suffix of ``text`` that is a proper prefix of ``stop``."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])),
        0,
    )

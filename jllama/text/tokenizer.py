"""Text to ids and back, and text as it comes out of a stream of ids."""

import dataclasses
import json
from pathlib import Path
from typing import Protocol

from jllama.errors import InputError
from jllama.formats.files import MappedFile
from jllama.formats.source import Source
from jllama.formats.vocabulary import Vocabulary, from_llama2c

_MAX_TOKENIZER_BYTES = 64 << 20


class Tokenizer(Protocol):
    """What the rest of the library asks of a tokenizer."""

    n_ids: int
    bos_id: int
    eos_id: int

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """The ids of a text, with the beginning-of-sequence id in front unless told otherwise."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of ids; control ids give nothing."""
        ...


class SentencePieceTokenizer:
    """A sentencepiece model, as Llama-2 has it; ``where`` names its origin for error messages."""

    def __init__(self, model: bytes, where: str) -> None:
        from sentencepiece import SentencePieceProcessor  # only here: a caller with ids needs no tokenizer

        try:
            self._model = SentencePieceProcessor(model_proto=model)
            self.n_ids: int = self._model.vocab_size()
            self._model.id_to_piece(list(range(self.n_ids)))  # raises on text that is not UTF-8
        except (RuntimeError, UnicodeDecodeError):
            raise InputError(f"{where}: expected a sentencepiece model, found something else") from None
        self.bos_id: int = self._model.bos_id()
        self.eos_id: int = self._model.eos_id()

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        ids = self._model.encode(text)
        return [self.bos_id, *ids] if bos else ids

    def decode(self, ids: list[int]) -> str:
        # Models pad their vocabulary: an id past the tokenizer's has no text.
        return self._model.decode([i for i in ids if 0 <= i < self.n_ids])


class JsonTokenizer:
    """A ``tokenizer.json``, as Llama 3 and others have it. Which ids begin and end a text, the model's config says."""

    def __init__(self, text: bytes, where: str, bos_id: int, eos_id: int) -> None:
        try:
            from tokenizers import Tokenizer as Backend
        except ImportError:
            raise InputError(f"{where}: needs the tokenizers package (pip install 'jllama[convert]')") from None
        try:
            self._model = Backend.from_str(text.decode())
        except BaseException as error:
            # The library raises the bare class, and panics in Rust are not even exceptions to Python.
            if type(error).__name__ not in ("Exception", "PanicException", "UnicodeDecodeError"):
                raise
            raise InputError(f"{where}: expected a tokenizer of the tokenizers library, found something else") from None
        self.n_ids: int = self._model.get_vocab_size(with_added_tokens=True)
        self.bos_id, self.eos_id = bos_id, eos_id

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        ids = self._model.encode(text, add_special_tokens=False).ids
        return [self.bos_id, *ids] if bos else ids

    def decode(self, ids: list[int]) -> str:
        return self._model.decode([i for i in ids if 0 <= i < self.n_ids], skip_special_tokens=True)


def load_tokenizer(
    path: str | Path, vocab_size: int | None = None, *, bos_id: int | None = None, eos_id: int | None = None
) -> Tokenizer:
    """Load a tokenizer file (``.model``, llama2.c's ``.bin`` or ``.json``), and check that it goes with a model of
    ``vocab_size``. ``bos_id`` and ``eos_id`` are for a ``.json``, which does not name them."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such tokenizer file")
    file = MappedFile(path)
    if file.size > _MAX_TOKENIZER_BYTES:
        raise InputError(f"{path}: expected a tokenizer of at most {_MAX_TOKENIZER_BYTES} bytes, found {file.size}")
    if path.suffix == ".json":
        ids = [i if i is not None else _special(path, j) for j, i in enumerate((bos_id, eos_id))]
        return _fitting(JsonTokenizer(file.bytes(0, file.size), str(path), *ids), str(path), vocab_size)
    if path.suffix == ".bin":
        return from_vocabulary(from_llama2c(path), vocab_size)
    return _fitting(SentencePieceTokenizer(file.bytes(0, file.size), str(path)), str(path), vocab_size)


def _special(path: Path, which: int) -> int:
    """The id of the usual names of the first (0) or the last (1) token of a text, in a tokenizer.json."""
    names = (("<s>", "<|begin_of_text|>"), ("</s>", "<|end_of_text|>"))[which]
    try:
        added = json.loads(path.read_bytes()).get("added_tokens", [])
        return next(token["id"] for token in added if token["content"] in names)
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError, StopIteration):
        raise InputError(f"{path}: added_tokens: expected one of {' and '.join(names)}, found neither") from None


def from_vocabulary(vocabulary: Vocabulary, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of a vocabulary that has no file of its own."""
    tokenizer = SentencePieceTokenizer(vocabulary.model_bytes(), vocabulary.where)
    return _fitting(tokenizer, vocabulary.where, vocab_size)


def tokenizer_for(source: Source, path: str | Path | None = None) -> Tokenizer:
    """The tokenizer of an opened checkpoint: ``path`` if given, or else what the checkpoint itself carries."""
    config, own = source.config, source.tokenizer
    if path is None and own is None:
        raise InputError(f"{source.path}: carries no tokenizer: name one with --tokenizer FILE")
    if path is None and isinstance(own, Vocabulary):
        return from_vocabulary(own, config.vocab_size)
    chosen = Path(str(own if path is None else path))
    return load_tokenizer(chosen, config.vocab_size, bos_id=config.bos_id, eos_id=config.eos_ids[0])


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

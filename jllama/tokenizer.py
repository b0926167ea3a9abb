"""Text to ids and back, and text as it comes out of a stream of ids."""

from pathlib import Path
from typing import Protocol

from jllama.errors import InputError

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
    """A sentencepiece model, as Llama-2 has it."""

    def __init__(self, path: Path) -> None:
        from sentencepiece import (
            SentencePieceProcessor,
        )  # only here: a caller with ids needs no tokenizer

        try:
            if (size := path.stat().st_size) > _MAX_TOKENIZER_BYTES:
                raise InputError(
                    f"{path}: expected a tokenizer of at most {_MAX_TOKENIZER_BYTES} bytes, found {size}"
                )
            self._model = SentencePieceProcessor(model_proto=path.read_bytes())
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from None
        except RuntimeError:
            raise InputError(
                f"{path}: expected a sentencepiece model, found something else"
            ) from None
        self.n_ids: int = self._model.vocab_size()
        self.bos_id: int = self._model.bos_id()
        self.eos_id: int = self._model.eos_id()

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        ids = self._model.encode(text)
        return [self.bos_id, *ids] if bos else ids

    def decode(self, ids: list[int]) -> str:
        # Models pad their vocabulary: an id past the tokenizer's has no text.
        return self._model.decode([i for i in ids if 0 <= i < self.n_ids])


def load_tokenizer(path: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """Load a tokenizer file, and check that it goes with a model of ``vocab_size``."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such tokenizer file")
    tokenizer = SentencePieceTokenizer(path)
    if (
        vocab_size is not None
        and not tokenizer.n_ids <= vocab_size <= tokenizer.n_ids + 256
    ):
        raise InputError(
            f"{path}: expected a tokenizer for the model's vocab_size {vocab_size}, found {tokenizer.n_ids} pieces"
        )
    return tokenizer


class TextStream:
    """Turns ids that arrive one after another into text, holding back what the next id may still change: the bytes
    of an unfinished character, and the beginning of a stop string."""

    def __init__(
        self, tokenizer: Tokenizer, prompt: list[int], stop: tuple[str, ...] = ()
    ) -> None:
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
        (
            n
            for n in range(min(len(text), len(stop) - 1), 0, -1)
            if text.endswith(stop[:n])
        ),
        0,
    )

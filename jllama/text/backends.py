"""Tokenizers on top of two libraries: sentencepiece, and Hugging Face's tokenizers (byte-level BPE and others)."""

import json
import re
from collections.abc import Mapping
from typing import Any

from jllama.errors import InputError
from jllama.text.control import ControlToken, ControlTokens, looks_like_control


class _Tokenizer:
    """The common part of both: the beginning-of-sequence id and the control tokens."""

    n_ids: int
    bos_id: int
    eos_id: int
    adds_bos: bool
    control: ControlTokens

    def encode(self, text: str, *, bos: bool = True, special: bool = False) -> list[int]:
        ids = [self.bos_id] if bos and self.adds_bos else []
        return ids + (self.encode_rendered(text) if special else self._ordinary(text, True))

    def encode_rendered(self, text: str, letters: Mapping[int, str] | None = None) -> list[int]:
        ids: list[int] = []
        for n, piece in enumerate(self.control.split(text)):
            if isinstance(piece, int):
                ids.append(piece)
            else:
                ids += self._ordinary(piece.translate(letters or {}), n == 0)
        return ids

    def _ordinary(self, text: str, start: bool) -> list[int]:
        """Encode a text as ordinary text: names of control tokens in it do not become these tokens."""
        ids = self._ids(text, start)
        if self.control.ids.isdisjoint(ids) or not self.control.named_in(text):
            return ids
        pieces = self.control.broken(text)
        return [i for n, piece in enumerate(pieces) for i in self._ids(piece, start and n == 0)]

    def _ids(self, text: str, start: bool) -> list[int]:
        raise NotImplementedError


class SentencePieceTokenizer(_Tokenizer):
    """A sentencepiece model, as of Llama-2. ``where`` is its origin, for error messages."""

    def __init__(self, model: bytes, where: str, *, adds_bos: bool = True) -> None:
        from sentencepiece import SentencePieceProcessor  # imported here, because callers that have ids do not need it

        try:
            self._model = SentencePieceProcessor(model_proto=model)
            self.n_ids = self._model.vocab_size()
            pieces = self._model.id_to_piece(list(range(self.n_ids)))  # raises on text that is not UTF-8
        except (RuntimeError, UnicodeDecodeError):
            raise InputError(f"{where}: expected a sentencepiece model, found something else") from None
        self.bos_id = self._model.bos_id()
        self.eos_id = self._model.eos_id()
        self.adds_bos = adds_bos and self.bos_id >= 0
        self.control = ControlTokens(
            ControlToken(piece, i)
            for i, piece in enumerate(pieces)
            if self._model.is_control(i) or looks_like_control(piece)
        )

    def _ids(self, text: str, start: bool) -> list[int]:
        return self._model.encode(text)

    def decode(self, ids: list[int]) -> str:
        # A model may pad its vocabulary. Ids that the tokenizer does not have give no text.
        return self._model.decode([i for i in ids if 0 <= i < self.n_ids and i not in self.control.ids])

    def token_bytes(self) -> list[bytes]:
        pieces = self._model.id_to_piece(list(range(self.n_ids)))
        empty = (self._model.is_unknown, self._model.is_unused)
        return [
            b"" if any(test(i) for test in empty) else piece_bytes(piece, self._model.is_byte(i))
            for i, piece in enumerate(pieces)
        ]


class JsonTokenizer(_Tokenizer):
    """A ``tokenizer.json``, as of Llama 3 and others. ``bos_id`` and ``eos_id`` come from the model's config. If
    ``adds_bos`` is None, the file decides whether a text starts with ``bos_id``."""

    def __init__(self, text: bytes, where: str, bos_id: int, eos_id: int, *, adds_bos: bool | None = None) -> None:
        try:
            from tokenizers import Tokenizer as Backend
        except ImportError:
            raise InputError(f"{where}: needs the tokenizers package (pip install 'jllama[convert]')") from None
        try:
            values = json.loads(text)
            self.control = ControlTokens(_control_tokens(values["added_tokens"] or []))
            self._byte_level = '"ByteLevel"' in json.dumps(values.get("decoder"))
            self._model = Backend.from_str(json.dumps(values, ensure_ascii=False))
            # Names of control tokens in a text are tokenised as ordinary text. `encode_rendered` finds them itself.
            self._model.encode_special_tokens = True
            self._first_only = _prefix_at_start_only(values.get("pre_tokenizer"))
            begin = self._model.encode("", add_special_tokens=True).ids
        except BaseException as error:
            # The library raises `Exception` itself, and a panic in Rust is a `BaseException`.
            wrong = (ValueError, RecursionError, KeyError, TypeError, AttributeError)
            if not isinstance(error, wrong) and type(error).__name__ not in ("Exception", "PanicException"):
                raise
            raise InputError(f"{where}: expected a tokenizer of the tokenizers library, found something else") from None
        self.n_ids = self._model.get_vocab_size(with_added_tokens=True)
        self.bos_id, self.eos_id = bos_id, eos_id
        self.adds_bos = begin[:1] == [bos_id] if adds_bos is None else adds_bos
        self._n_mark_ids = len(self._model.encode(_MARK, add_special_tokens=False).ids)

    def _ids(self, text: str, start: bool) -> list[int]:
        if start or not self._first_only:
            return self._model.encode(text, add_special_tokens=False).ids
        # The file adds a space before the first word of a text. This text is not the first, so a mark goes before it.
        return self._model.encode(_MARK + text, add_special_tokens=False).ids[self._n_mark_ids :]

    def decode(self, ids: list[int]) -> str:
        return self._model.decode([i for i in ids if 0 <= i < self.n_ids], skip_special_tokens=True)

    def token_bytes(self) -> list[bytes]:
        added = {i: token.content.encode() for i, token in self._model.get_added_tokens_decoder().items()}
        return [added[i] if i in added else self._bytes_of(self._model.id_to_token(i) or "") for i in range(self.n_ids)]

    def _bytes_of(self, token: str) -> bytes:
        if self._byte_level:
            letters = [_BYTE_OF_LETTER.get(letter, -1) for letter in token]
            return token.encode() if -1 in letters else bytes(letters)
        return piece_bytes(token, _BYTE_PIECE.fullmatch(token) is not None)


_BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")


def piece_bytes(piece: str, byte: bool) -> bytes:
    """The bytes of a sentencepiece; ``byte``: of one that stands for a single byte, as ``<0x0A>``."""
    return bytes([int(piece[3:5], 16)]) if byte else piece.replace("\u2581", " ").encode()


def _letters_of_bytes() -> dict[str, int]:
    """The letters that GPT-2's byte-level tokens are written in: printable bytes are themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


_BYTE_OF_LETTER = _letters_of_bytes()
_MARK = "\x01"  # not part of any word, so no merge joins it with the text after it


def _control_tokens(added: list[dict[str, Any]]) -> list[ControlToken]:
    """The control tokens among the added tokens of a file. Tokens that only look like control tokens are marked as
    special in ``added``."""
    tokens = []
    for token in added:
        token["special"] = bool(token["special"]) or looks_like_control(token["content"])
        if token["special"]:
            tokens.append(ControlToken(token["content"], token["id"], bool(token["lstrip"]), bool(token["rstrip"])))
    return tokens


def _prefix_at_start_only(pre_tokenizer: Any) -> bool:
    """Whether the pre-tokenizer adds a space mark before the first word of a whole text only."""
    if not isinstance(pre_tokenizer, dict):
        return False
    if pre_tokenizer.get("type") == "Sequence":
        return any(_prefix_at_start_only(part) for part in pre_tokenizer.get("pretokenizers", []))
    return pre_tokenizer.get("type") == "Metaspace" and pre_tokenizer.get("prepend_scheme") == "first"

"""Sentencepiece vocabularies from GGUF metadata, ``tokenizer.model`` and llama2.c's ``tokenizer.bin``.

A `Vocabulary` is converted from and to the protocol buffer of a ``tokenizer.model`` and the bytes of a
``tokenizer.bin``. So the sentencepiece library does the tokenisation, whatever file the vocabulary came from.
"""

import dataclasses
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jllama.errors import InputError
from jllama.formats.files import MappedFile

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

MAX_PIECES = 1 << 20
MAX_PIECE_BYTES = 1 << 12
_BPE = 2


@dataclass(frozen=True)
class Vocabulary:
    """Pieces with their scores and types. A space in a piece is U+2581, as in sentencepiece."""

    where: str  # file and field, for error messages
    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    types: tuple[int, ...]
    bos_id: int = 1
    eos_id: int = 2
    unk_id: int = 0
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = False
    add_bos: bool = True  # whether a text begins with bos_id

    def model_bytes(self) -> bytes:
        """The content of an equivalent ``tokenizer.model``."""
        pieces = zip(self.pieces, self.scores, self.types, strict=True)
        out = [_message(1, _piece(*piece)) for piece in pieces]
        specials = (self.unk_id, self.bos_id, self.eos_id)
        names = [self._name(i) for i in specials]
        trainer = [
            _varint(3, _BPE),
            _varint(4, len(self.pieces)),
            _varint(35, int(sum(t == BYTE for t in self.types) == 256)),
            *(_varint(40 + i, token) for i, token in enumerate(specials)),
            *(_message(45 + i, name.encode()) for i, name in enumerate(names)),
        ]
        normalizer = [
            _message(1, b"identity"),
            _varint(3, int(self.add_dummy_prefix)),
            _varint(4, int(self.remove_extra_whitespaces)),
            _varint(5, 1),
        ]
        return b"".join([*out, _message(2, b"".join(trainer)), _message(3, b"".join(normalizer))])

    def _name(self, token: int) -> str:
        if not 0 <= token < len(self.pieces):
            raise InputError(f"{self.where}: special id: expected one below {len(self.pieces)}, found {token}")
        return self.pieces[token]


def _piece(text: str, score: float, kind: int) -> bytes:
    return _message(1, text.encode()) + b"\x15" + struct.pack("<f", score) + _varint(3, kind)


def _number(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _varint(field: int, value: int) -> bytes:
    return _number(field << 3) + _number(value)


def _message(field: int, payload: bytes) -> bytes:
    return _number(field << 3 | 2) + _number(len(payload)) + payload


def from_model(path: Path) -> Vocabulary:
    """Read a ``tokenizer.model``."""
    file = MappedFile(path)
    where = f"{path}: sentencepiece model"
    pieces: list[tuple[str, float, int]] = []
    flags = {"add_dummy_prefix": True, "remove_extra_whitespaces": True}  # sentencepiece's defaults
    specials = {"unk": 0, "bos": 1, "eos": 2}
    try:
        for field, value in _fields(file.bytes(0, file.size)):
            if field == 1 and isinstance(value, bytes):
                parts = dict(_fields(value))
                score = struct.unpack("<f", parts.get(2, bytes(4)))[0]
                pieces.append((parts[1].decode(), score, parts.get(3, NORMAL)))
                if len(pieces) > MAX_PIECES:
                    raise InputError(f"{where}: expected at most {MAX_PIECES} pieces, found more")
            elif field == 2 and isinstance(value, bytes):
                parts = dict(_fields(value))
                specials = {name: int(parts.get(40 + i, i)) for i, name in enumerate(specials)}
            elif field == 3 and isinstance(value, bytes):
                parts = dict(_fields(value))
                flags = {name: bool(parts.get(3 + i, 1)) for i, name in enumerate(flags)}
    except (IndexError, KeyError, TypeError, AttributeError, struct.error, UnicodeDecodeError):
        raise InputError(f"{where}: expected pieces with text, score and type, found something else") from None
    if not pieces:
        raise InputError(f"{where}: expected pieces, found none")
    # The id of an absent special token is -1, which the file stores as the largest unsigned number.
    ids = {f"{name}_id": i if i < len(pieces) else -1 for name, i in specials.items()}
    texts, scores, types = zip(*pieces, strict=True)
    return Vocabulary(where, texts, scores, types, **ids, **flags)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Numbers and raw values of the fields of one protocol-buffer message."""
    at = 0
    while at < len(data):
        key, at = _read_number(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _read_number(data, at)
        else:
            length, at = _read_number(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            if at + length > len(data):
                raise IndexError
            value, at = data[at : at + length], at + length
        yield key >> 3, value


def _read_number(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise IndexError


def from_llama2c(path: Path) -> Vocabulary:
    """Read llama2.c's ``tokenizer.bin``: the maximum length, then the score, length and bytes of every piece."""
    file = MappedFile(path)
    data, at = file.bytes(0, file.size), 4
    pieces, scores = [], []
    while at < len(data):
        where = f"{path}: piece {len(pieces)}"
        if at + 8 > len(data):
            raise InputError(f"{where}: expected 8 bytes of score and length, found {len(data) - at} (cut off?)")
        score, length = struct.unpack_from("<fI", data, at)
        if length > min(MAX_PIECE_BYTES, len(data) - at - 8):
            raise InputError(f"{where}: length: expected at most {len(data) - at - 8} bytes, found {length}")
        try:
            text = data[at + 8 : at + 8 + length].decode()
        except UnicodeDecodeError:
            raise InputError(f"{where}: expected UTF-8 text, found other bytes") from None
        pieces.append(text.replace(" ", "\u2581"))
        scores.append(score)
        at += 8 + length
        if len(pieces) > MAX_PIECES:
            raise InputError(f"{path}: expected at most {MAX_PIECES} pieces, found more")
    if len(pieces) < 3:
        raise InputError(f"{path}: expected a llama2.c tokenizer of at least 3 pieces, found {len(pieces)}")
    types = [UNKNOWN, CONTROL, CONTROL, *(_type(piece) for piece in pieces[3:])]
    pieces[1:3] = ["<s>", "</s>"]  # the file has line feeds around these two
    return Vocabulary(f"{path}: pieces", tuple(pieces), tuple(scores), tuple(types))


def _type(piece: str) -> int:
    return BYTE if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">") else NORMAL


def to_llama2c(vocabulary: Vocabulary) -> bytes:
    """The content of an equivalent ``tokenizer.bin``."""
    marked = {vocabulary.bos_id: "\n<s>\n", vocabulary.eos_id: "\n</s>\n"}
    texts = [marked.get(i, piece).replace("\u2581", " ").encode() for i, piece in enumerate(vocabulary.pieces)]
    out = [struct.pack("<I", max(len(text) for text in texts))]
    out += [struct.pack("<fI", s, len(t)) + t for t, s in zip(texts, vocabulary.scores, strict=True)]
    return b"".join(out)


def vocabulary_of(tokenizer: Any) -> Vocabulary | None:
    """The sentencepiece vocabulary of a source's tokenizer; None if the tokenizer is of another kind (byte-level
    BPE)."""
    if isinstance(tokenizer, Vocabulary):
        return tokenizer
    if not isinstance(tokenizer, Path) or tokenizer.suffix == ".json":
        return None
    return from_llama2c(tokenizer) if tokenizer.suffix == ".bin" else from_model(tokenizer)


def padded(vocabulary: Vocabulary, size: int) -> Vocabulary:
    """The vocabulary with unused pieces added, so that it has as many pieces as an embedding of ``size`` rows."""
    spare = range(len(vocabulary.pieces), size)
    if len(vocabulary.pieces) > size:
        raise InputError(
            f"{vocabulary.where}: expected at most vocab_size {size} pieces, found {len(vocabulary.pieces)}"
        )
    return dataclasses.replace(
        vocabulary,
        pieces=(*vocabulary.pieces, *(f"<unused{i}>" for i in spare)),
        scores=(*vocabulary.scores, *(-1e9 for _ in spare)),
        types=(*vocabulary.types, *(UNUSED for _ in spare)),
    )

"""Reads the metadata and the tensor offsets of GGUF files, versions 2 and 3. Every length is checked against the file.

The gguf package is not used for this, because it trusts the lengths in a header.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jllama.errors import InputError
from jllama.formats.files import MappedFile, label

MAGIC = b"GGUF"
MAX_TENSORS = 50_000
MAX_FIELDS = 10_000
MAX_STRING = 1 << 20
MAX_ARRAY = 1 << 22
_STRING, _ARRAY = 8, 9
# Type number -> format for `struct`.
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
# ggml's type number -> name, elements per block, bytes per block.
BLOCKS: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
}
# Long arrays that are read. All others are skipped.
WANTED = tuple(f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type", "merges"))


@dataclass(frozen=True)
class GgufTensor:
    """The position of a tensor in the file. ``shape`` is in numpy's order: the last axis varies fastest."""

    shape: tuple[int, ...]
    kind: str
    begin: int

    @property
    def block(self) -> int:
        """Elements of one block."""
        return _block(self.kind)[0]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return _block(self.kind)[1]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row along the last axis."""
        return self.shape[-1] // self.block * self.block_bytes


@dataclass(frozen=True)
class GgufFile:
    """A mapped file with its metadata."""

    file: MappedFile
    fields: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


def _block(kind: str) -> tuple[int, int]:
    return next((elements, size) for name, elements, size in BLOCKS.values() if name == kind)


class _Reader:
    def __init__(self, file: MappedFile) -> None:
        self.file, self.path, self.at, self.what = file, file.path, 0, "header"
        self._window, self._begin = b"", 0

    def fail(self, expected: str, found: Any) -> InputError:
        return InputError(f"{self.path}: {label(self.what)}: expected {expected}, found {label(found)}")

    def need(self, count: int) -> None:
        if count > self.file.size - self.at:
            raise self.fail(f"{count} more bytes", f"{self.file.size - self.at} (cut off?)")

    def take(self, count: int) -> bytes:
        self.need(count)
        offset = self.at - self._begin
        if not 0 <= offset <= len(self._window) - count:  # small reads are served from a buffered window
            self._window, self._begin, offset = self.file.bytes(self.at, max(count, 1 << 16)), self.at, 0
        self.at += count
        return self._window[offset : offset + count]

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def count(self, limit: int, name: str) -> int:
        value = self.number("<Q")
        if value > limit:
            raise self.fail(f"at most {limit} {name}", value)
        return value

    def string(self) -> str:
        raw = self.take(self.count(MAX_STRING, "bytes of text"))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.fail("UTF-8 text", "other bytes") from None

    def skip_string(self) -> None:
        length = self.count(MAX_STRING, "bytes of text")
        self.need(length)
        self.at += length

    def value(self, name: str) -> Any:
        kind = self.number("<I")
        if kind == _ARRAY:
            return self.array(wanted=name in WANTED)
        return self.scalar(kind)

    def scalar(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind not in SCALARS:
            raise self.fail("a type from 0 to 12", kind)
        if kind == 7:
            return self.number("<B") != 0
        return self.number(SCALARS[kind])

    def array(self, wanted: bool) -> tuple[Any, ...] | None:
        kind, length = self.number("<I"), self.count(MAX_ARRAY, "elements")
        if kind == _STRING:
            if wanted or length <= 64:
                return tuple(self.string() for _ in range(length))
            for _ in range(length):
                self.skip_string()
            return None
        if kind not in SCALARS:
            raise self.fail("an array of numbers or texts", f"type {kind}")
        layout = SCALARS[kind]
        nbytes = length * struct.calcsize(layout)
        self.need(nbytes)
        if wanted or length <= 4096:
            return struct.unpack(f"<{length}{layout[1]}", self.take(nbytes))
        self.at += nbytes
        return None


def read_gguf(path: Path) -> GgufFile:
    """Map a file and read its metadata."""
    reader = _Reader(MappedFile(path))
    if reader.take(4) != MAGIC:
        raise InputError(f"{path}: expected a GGUF file, found something else")
    version = reader.number("<I")
    if version not in (2, 3):
        found = "one for big-endian machines" if version & 0xFFFF == 0 and version else version
        raise InputError(f"{path}: version: expected 2 or 3, found {found}")
    n_tensors, n_fields = reader.count(MAX_TENSORS, "tensors"), reader.count(MAX_FIELDS, "fields")
    fields: dict[str, Any] = {}
    for i in range(n_fields):
        reader.what = f"field {i}"
        name = reader.what = reader.string()
        if name in fields:
            raise reader.fail("it once", "it twice")
        fields[name] = reader.value(name)
    tensors = [_tensor_info(reader, i) for i in range(n_tensors)]
    align = fields.get("general.alignment", 32)
    if type(align) is not int or not 1 <= align <= 1 << 20 or align & (align - 1):
        raise InputError(f"{path}: general.alignment: expected a power of two up to {1 << 20}, found {label(align)}")
    start = -(-reader.at // align) * align
    return GgufFile(reader.file, fields, _placed(reader.file, tensors, start))


def _tensor_info(reader: _Reader, index: int) -> tuple[str, tuple[int, ...], str, int]:
    reader.what = f"tensor {index}"
    name = reader.what = reader.string()
    rank = reader.number("<I")
    if not 1 <= rank <= 4:
        raise reader.fail("1 to 4 dimensions", rank)
    shape = tuple(reversed([reader.number("<Q") for _ in range(rank)]))
    number, offset = reader.number("<I"), reader.number("<Q")
    if number not in BLOCKS:
        raise reader.fail(f"type: one of {', '.join(kind for kind, _, _ in BLOCKS.values())}", f"type {number}")
    kind, elements, _ = BLOCKS[number]
    if 0 in shape or shape[-1] % elements:
        raise reader.fail(f"shape: positive, rows of whole blocks of {elements}", list(shape))
    return name, shape, kind, offset


def _placed(file: MappedFile, infos: list[tuple[str, tuple[int, ...], str, int]], start: int) -> dict[str, GgufTensor]:
    tensors: dict[str, GgufTensor] = {}
    end, last, room = start, "the header", file.size - start
    for name, shape, kind, offset in sorted(infos, key=lambda info: info[3]):
        where, tensor = f"{file.path}: {label(name)}", GgufTensor(shape, kind, start + offset)
        nbytes = math.prod(shape[:-1]) * tensor.row_bytes
        if name in tensors:
            raise InputError(f"{where}: expected it once, found it twice")
        if nbytes > room - offset:
            raise InputError(
                f"{where}: shape {label(list(shape))}: expected at most {room - offset} bytes, found {nbytes}"
            )
        if tensor.begin < end:
            raise InputError(f"{where}: offset {offset}: overlaps {label(last)}")
        tensors[name] = tensor
        end, last = tensor.begin + nbytes, name
    return tensors

"""Memory-mapped safetensors files: a tensor takes no memory until it is used.

The safetensors package is not used, because it cannot read bfloat16 into numpy and can only write tensors that are all
in memory. A file is 8 bytes of header length, a JSON header (name -> dtype, shape, data_offsets), and the data.
"""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jllama.errors import InputError
from jllama.formats.files import MappedFile, label

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

MAX_HEADER = 8 << 20  # parsed JSON takes up to 30 times its size; the header of Llama-2-70B has 90 kB
MAX_TENSORS = 50_000  # Llama-2-70B has 723


@dataclass(frozen=True)
class Entry:
    """The dtype, shape and offset of one tensor in its file."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int  # from the start of the file

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """A mapped file. ``entries`` describes its tensors; `array` returns a read-only view of one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = MappedFile(path)
        header, start = _read_header(self._file)
        self.entries: Mapping[str, Entry] = _entries(header, start, self._file)

    def array(self, name: str) -> np.ndarray:
        """The tensor as a view of the file."""
        entry = self.entries[name]
        return self._file.view(entry.dtype, entry.shape, entry.begin)


def _read_header(file: MappedFile) -> tuple[dict[str, Any], int]:
    path, room = file.path, file.size - 8
    if room < 0:
        raise InputError(f"{path}: expected a safetensors file, found {file.size} bytes (cut off?)")
    (length,) = struct.unpack("<Q", file.bytes(0, 8))
    if length > min(MAX_HEADER, room):
        raise InputError(f"{path}: header length: expected at most {min(MAX_HEADER, room)} bytes, found {length}")
    try:
        header = json.loads(file.bytes(8, length))
    except (ValueError, RecursionError):
        raise InputError(f"{path}: header: expected JSON, found something else (not a safetensors file?)") from None
    if not isinstance(header, dict):
        raise InputError(f"{path}: header: expected a JSON object, found {type(header).__name__}")
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise InputError(f"{path}: header: expected at most {MAX_TENSORS} tensors, found {len(header)}")
    return header, 8 + length


def _entries(header: dict[str, Any], start: int, file: MappedFile) -> dict[str, Entry]:
    entries = {name: _entry(name, fields, start, file) for name, fields in header.items()}
    end, last = start, "the header"
    for entry in sorted(entries.values(), key=lambda e: (e.begin, e.nbytes)):
        if entry.begin < end:
            raise InputError(f"{file.path}: {label(entry.name)}: data_offsets overlap those of {label(last)}")
        end, last = entry.begin + entry.nbytes, entry.name
    return entries


def _entry(name: str, fields: Any, start: int, file: MappedFile) -> Entry:
    where, room = f"{file.path}: {label(name)}", file.size - start
    if not isinstance(fields, dict):
        raise InputError(f"{where}: expected an object with dtype, shape and data_offsets, found {label(fields)}")
    kind = fields.get("dtype")
    if not isinstance(kind, str) or kind not in DTYPES:
        raise InputError(f"{where}: dtype: expected one of {', '.join(DTYPES)}, found {label(kind)}")
    shape, offsets = _naturals(fields.get("shape")), _naturals(fields.get("data_offsets"))
    if shape is None or len(shape) > 8 or 0 in shape:
        found = label(fields.get("shape"))
        raise InputError(f"{where}: shape: expected up to 8 positive integers, found {found}")
    if offsets is None or len(offsets) != 2 or not offsets[0] <= offsets[1] <= room:
        found = label(fields.get("data_offsets"))
        raise InputError(f"{where}: data_offsets: expected two within the file's {room} bytes, found {found}")
    entry = Entry(name, DTYPES[kind], tuple(shape), start + offsets[0])
    if offsets[1] - offsets[0] != entry.nbytes:
        found = offsets[1] - offsets[0]
        raise InputError(f"{where}: data_offsets: expected {entry.nbytes} bytes for its shape, found {found}")
    return entry


def _naturals(value: Any) -> list[int] | None:
    ok = isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)
    return value if ok else None


def layout(tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> tuple[bytes, dict[str, Entry]]:
    """The header bytes of a file with ``tensors`` (name -> dtype and shape), and the entry of each tensor."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the data to 8 bytes
    start = 8 + len(text)
    entries = {n: Entry(n, *tensors[n], start + header[n]["data_offsets"][0]) for n in tensors}
    return struct.pack("<Q", len(text)) + text, entries

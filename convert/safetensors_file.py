"""Safetensors files, mapped instead of loaded: a tensor costs no memory until it is used.

Written here because the safetensors package reads no bfloat16 into numpy and writes only what is all in memory.
The file: 8 bytes of header length, a JSON header (name -> dtype, shape, data_offsets), then the data.
"""

import json
import math
import mmap
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jllama.errors import InputError

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

MAX_HEADER = 100 << 20  # the limit that the safetensors package has, too
MAX_TENSORS = 50_000  # Llama-2-70B has 723


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in its file."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int  # from the start of the file
    nbytes: int


class SafetensorsFile:
    """A mapped file: ``entries`` say what it holds, `array` gives a read-only view of one tensor."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                header, start = _read_header(file, size, path)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from None
        self.entries: Mapping[str, Entry] = _entries(header, start, size, path)

    def array(self, name: str) -> np.ndarray:
        """The tensor as a view of the file."""
        entry = self.entries[name]
        flat = np.frombuffer(
            self._map, entry.dtype, math.prod(entry.shape), entry.begin
        )
        return flat.reshape(entry.shape)


def _read_header(file: Any, size: int, path: Path) -> tuple[dict[str, Any], int]:
    if size < 8:
        raise InputError(
            f"{path}: expected a safetensors file, found {size} bytes (cut off?)"
        )
    (length,) = struct.unpack("<Q", file.read(8))
    if length > min(MAX_HEADER, size - 8):
        raise InputError(
            f"{path}: header length: expected at most {min(MAX_HEADER, size - 8)} bytes, found {length}"
        )
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError):
        raise InputError(
            f"{path}: header: expected JSON, found something else (not a safetensors file?)"
        ) from None
    if not isinstance(header, dict):
        raise InputError(
            f"{path}: header: expected a JSON object, found {type(header).__name__}"
        )
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise InputError(
            f"{path}: header: expected at most {MAX_TENSORS} tensors, found {len(header)}"
        )
    return header, 8 + length


def _entries(
    header: dict[str, Any], start: int, size: int, path: Path
) -> dict[str, Entry]:
    entries = {
        name: _entry(name, fields, start, size, path) for name, fields in header.items()
    }
    end, last = start, "the header"
    for entry in sorted(entries.values(), key=lambda e: (e.begin, e.nbytes)):
        if entry.begin < end:
            raise InputError(
                f"{path}: {_label(entry.name)}: data_offsets overlap those of {_label(last)}"
            )
        end, last = entry.begin + entry.nbytes, entry.name
    return entries


def _entry(name: str, fields: Any, start: int, size: int, path: Path) -> Entry:
    where = f"{path}: {_label(name)}"
    if not isinstance(fields, dict):
        raise InputError(
            f"{where}: expected an object with dtype, shape and data_offsets, found {_label(fields)}"
        )
    kind = fields.get("dtype")
    if not isinstance(kind, str) or kind not in DTYPES:
        raise InputError(
            f"{where}: dtype: expected one of {', '.join(DTYPES)}, found {_label(kind)}"
        )
    shape, offsets = fields.get("shape"), fields.get("data_offsets")
    if not _naturals(shape) or len(shape) > 8 or any(n == 0 for n in shape):
        raise InputError(
            f"{where}: shape: expected up to 8 positive integers, found {_label(shape)}"
        )
    if (
        not _naturals(offsets)
        or len(offsets) != 2
        or not offsets[0] <= offsets[1] <= size - start
    ):
        raise InputError(
            f"{where}: data_offsets: expected two within the file's {size - start}, found {_label(offsets)}"
        )
    nbytes = math.prod(shape) * DTYPES[kind].itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise InputError(
            f"{where}: data_offsets: expected {nbytes} bytes for its shape, found {offsets[1] - offsets[0]}"
        )
    return Entry(name, DTYPES[kind], tuple(shape), start + offsets[0], nbytes)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _label(value: Any) -> str:
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def write(
    path: Path,
    tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    data: Iterable[np.ndarray],
) -> None:
    """Write ``tensors`` (name -> dtype and shape), whose arrays ``data`` yields in the same order, one at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + nbytes],
        }
        offset += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for (name, (dtype, shape)), array in zip(tensors.items(), data, strict=True):
            assert array.dtype == dtype and array.shape == shape, name
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())

"""Reads torch's ``.pth`` and ``.bin`` files without torch. Such a file is a zip archive with a pickle and raw storages.

The zip directory is parsed here, too. Only what torch writes is supported (uncompressed entries, zip64). Every number
is checked against the size of the file before it is used.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from jllama.errors import InputError
from jllama.formats.files import MappedFile, label
from jllama.formats.pickled import TensorRef, tensors_of

MAX_FILES = 100_000
MAX_PICKLE = 8 << 20
_END, _END64, _LOCATOR64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"


@dataclass(frozen=True)
class Member:
    """The offset and size of a file in the archive."""

    begin: int
    size: int


@dataclass(frozen=True)
class PthEntry:
    """The dtype, shape and offset of one tensor."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int


class PthFile:
    """A mapped torch file. ``entries`` describes its tensors; `array` returns a read-only view of one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = MappedFile(path)
        members = _members(self._file)
        pickles = [name for name in members if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise InputError(f"{path}: expected one data.pkl in torch's zip, found {len(pickles)}")
        root = pickles[0].removesuffix("data.pkl")
        order = members.get(f"{root}byteorder")
        if order is not None and self._file.bytes(order.begin, min(order.size, 16)).strip() != b"little":
            raise InputError(f"{path}: byteorder: expected little, found another")
        pickle = members[pickles[0]]
        if pickle.size > MAX_PICKLE:
            raise InputError(f"{path}: data.pkl: expected at most {MAX_PICKLE} bytes, found {pickle.size}")
        refs = tensors_of(self._file.bytes(pickle.begin, pickle.size), f"{path}: data.pkl")
        self.entries: Mapping[str, PthEntry] = {
            name: _entry(f"{path}: {label(name)}", ref, members, root) for name, ref in refs.items()
        }

    def array(self, name: str) -> np.ndarray:
        """The tensor as a view of the file."""
        entry = self.entries[name]
        return self._file.view(entry.dtype, entry.shape, entry.begin)


def _entry(where: str, ref: TensorRef, members: Mapping[str, Member], root: str) -> PthEntry:
    dtype = np.dtype(ml_dtypes.bfloat16 if ref.storage.dtype == "bfloat16" else ref.storage.dtype)
    member = members.get(f"{root}data/{ref.storage.key}")
    if member is None:
        raise InputError(f"{where}: storage {label(ref.storage.key)}: missing in the zip")
    if member.size != ref.storage.size * dtype.itemsize:
        expected = ref.storage.size * dtype.itemsize
        raise InputError(f"{where}: storage {ref.storage.key}: expected {expected} bytes, found {member.size}")
    if any(n == 0 for n in ref.shape):
        raise InputError(f"{where}: shape: expected positive integers, found {label(list(ref.shape))}")
    room = ref.storage.size - ref.offset
    if math.prod(ref.shape) > room:
        raise InputError(f"{where}: shape: expected at most {room} elements, found {label(list(ref.shape))}")
    rows = tuple(math.prod(ref.shape[i + 1 :]) for i in range(len(ref.shape)))
    wrong = [i for i, n in enumerate(ref.shape) if n > 1 and ref.strides[i : i + 1] != rows[i : i + 1]]
    if wrong:
        raise InputError(f"{where}: strides: expected {label(list(rows))}, found {label(list(ref.strides))}")
    return PthEntry(dtype, ref.shape, member.begin + ref.offset * dtype.itemsize)


def _members(file: MappedFile) -> dict[str, Member]:
    """Name -> position of every file in the archive. Files that overlap are refused."""
    path, (count, size, begin) = file.path, _directory(file)
    if count > MAX_FILES:
        raise InputError(f"{path}: zip directory: expected at most {MAX_FILES} files, found {count}")
    if begin + size > file.size:
        raise InputError(f"{path}: zip directory: expected within {file.size} bytes, found [{begin}, {begin + size}]")
    data, at, members = file.bytes(begin, size), 0, {}
    for _ in range(count):
        if data[at : at + 4] != b"PK\x01\x02" or at + 46 > len(data):
            raise InputError(f"{path}: zip directory: expected an entry at byte {begin + at}, found something else")
        flags, method = struct.unpack_from("<HH", data, at + 8)
        stored, full, n_name, n_extra, n_comment = struct.unpack_from("<IIHHH", data, at + 20)
        (offset,) = struct.unpack_from("<I", data, at + 42)
        name = data[at + 46 : at + 46 + n_name].decode(errors="replace")
        extra = data[at + 46 + n_name : at + 46 + n_name + n_extra]
        full, stored, offset = _zip64(extra, full, stored, offset)
        if method != 0 or flags & 1 or full != stored:
            raise InputError(f"{path}: {label(name)}: expected a stored file, found a compressed or encrypted one")
        if name in members:
            raise InputError(f"{path}: {label(name)}: expected it once in the zip, found it twice")
        members[name] = _member(file, name, offset, full)
        at += 46 + n_name + n_extra + n_comment
    _apart(members, path)
    return members


def _member(file: MappedFile, name: str, offset: int, size: int) -> Member:
    head = file.bytes(offset, 30) if offset + 30 <= file.size else b""
    if head[:4] != b"PK\x03\x04":
        raise InputError(f"{file.path}: {label(name)}: expected a file header at byte {offset}, found something else")
    begin = offset + 30 + sum(struct.unpack_from("<HH", head, 26))
    if begin + size > file.size:
        raise InputError(f"{file.path}: {label(name)}: expected {size} bytes, found {file.size - begin} (cut off?)")
    return Member(begin, size)


def _zip64(extra: bytes, *values: int) -> list[int]:
    """The values with those that do not fit into 32 bits replaced. The extra field holds only such values, in order."""
    at, long = 0, []
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            body = extra[at + 4 : at + 4 + length]
            long = list(struct.unpack(f"<{len(body) // 8}Q", body[: len(body) // 8 * 8]))
        at += 4 + length
    return [long.pop(0) if value == 0xFFFFFFFF and long else value for value in values]


def _directory(file: MappedFile) -> tuple[int, int, int]:
    """The number of files in the archive, and the size and offset of its directory."""
    tail_begin = max(0, file.size - 65557)
    tail = file.bytes(tail_begin, file.size - tail_begin)
    at = tail.rfind(_END)
    if at < 0 or at + 22 > len(tail):
        raise InputError(f"{file.path}: expected torch's zip format, found no zip directory (cut off, or older?)")
    count, size, begin = struct.unpack_from("<HII", tail, at + 10)
    locator = at - 20
    if 0xFFFF not in (count,) and 0xFFFFFFFF not in (size, begin):
        return count, size, begin
    if locator < 0 or tail[locator : locator + 4] != _LOCATOR64:
        raise InputError(f"{file.path}: zip directory: expected a zip64 locator, found none")
    (where,) = struct.unpack_from("<Q", tail, locator + 8)
    head = file.bytes(where, 56) if where + 56 <= file.size else b""
    if head[:4] != _END64:
        raise InputError(f"{file.path}: zip directory: expected a zip64 record at byte {where}, found something else")
    count, size, begin = struct.unpack_from("<QQQ", head, 32)
    return count, size, begin


def _apart(members: Mapping[str, Member], path: Path) -> None:
    end, last = 0, ""
    for name, member in sorted(members.items(), key=lambda item: (item[1].begin, item[1].size)):
        if member.size and member.begin < end:
            raise InputError(f"{path}: {label(name)}: overlaps {label(last)}")
        if member.size:
            end, last = member.begin + member.size, name

"""Access to untrusted files. Only regular files are opened. They are memory-mapped, and accesses are checked against
their size."""

import math
import mmap
import os
import stat
from pathlib import Path

import numpy as np

from jllama.errors import InputError


class MappedFile:
    """A memory-mapped file. Pages are read when they are used. The map stays open while a view of it exists."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # O_NONBLOCK, because to open a pipe with the name of a checkpoint could block forever.
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            try:
                status = os.fstat(handle)
                if not stat.S_ISREG(status.st_mode):
                    raise InputError(f"{path}: expected a file, found something else")
                self.size = status.st_size
                if self.size == 0:
                    raise InputError(f"{path}: expected a file with content, found 0 bytes (cut off?)")
                self._map = mmap.mmap(handle, 0, access=mmap.ACCESS_READ)
            finally:
                os.close(handle)
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from None

    def bytes(self, begin: int, length: int) -> bytes:
        """A copy of ``length`` bytes from ``begin``, or fewer if the file ends before."""
        return self._map[begin : begin + length]

    def view(self, dtype: np.dtype, shape: tuple[int, ...], begin: int) -> np.ndarray:
        """A read-only array that is a view of the file."""
        assert begin + math.prod(shape) * dtype.itemsize <= self.size, self.path
        return np.frombuffer(self._map, dtype, math.prod(shape), begin).reshape(shape)


def inside(directory: Path, name: str, where: Path, *, links: bool = False) -> Path:
    """The path of the file ``name`` in ``directory``. The name may come from an untrusted file ``where``, so it is
    refused if it points elsewhere. With ``links``, it may be a symbolic link that points outside the directory."""
    if "/" in name or "\\" in name or "\0" in name or name in ("", ".", "..") or len(name) > 255:
        raise InputError(f"{where}: file name: expected one inside the directory, found {name[:80]!r}")
    path = directory / name
    if not links and path.is_symlink() and not _stays(path, directory.resolve()):
        found = label(os.readlink(path))
        raise InputError(f"{path}: link: expected one inside the directory, found {found!r} (or say --follow-links)")
    return path


def _stays(link: Path, directory: Path) -> bool:
    """Whether a link points to a file in its directory, or to the blobs of Hugging Face's download cache."""
    try:
        target = link.resolve()
    except (OSError, RuntimeError):
        return False
    blobs = directory.parent.parent / "blobs"
    return target.parent == directory or (directory.parent.name == "snapshots" and target.parent == blobs)


def first_of(directory: Path, names: tuple[str, ...], *, links: bool = False) -> Path | None:
    """The first of ``names`` that exists in the directory; None if none does. A link that points outside is refused
    unless ``links`` is set."""
    found = (inside(directory, name, directory, links=links) for name in names if (directory / name).exists())
    return next(found, None)


def label(value: object, limit: int = 80) -> str:
    """An untrusted value as short and printable text, for an error message."""
    text = value if isinstance(value, str) and value.isprintable() else ascii(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."

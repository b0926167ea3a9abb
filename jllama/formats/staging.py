"""Atomic output: it is written to a working directory beside its destination and renamed at the end.

A running process holds a lock on its working directory. The lock of a killed process is released by the kernel. So the
next run with the same destination can tell that the directory was left behind. It removes the directory, but first
restores an old result that the killed run had moved aside.
"""

import contextlib
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from jllama.errors import InputError
from jllama.formats.replaceable import Form, check_place, real_path

_MARGIN = 1 << 20  # bytes for directories and small files besides the tensors
_ASIDE = "replaced"  # name in the working directory of the old result, between the two renames


@contextlib.contextmanager
def staged(dst: Path, nbytes: int, form: Form, *, reads: Sequence[Path] = (), force: bool = False) -> Iterator[Path]:
    """Yield a path to write a file or a directory of about ``nbytes`` to. On success it is renamed to ``dst``.

    ``reads`` and ``force``: see `check_place`.
    """
    # Only the parent is resolved. If ``dst`` itself is a link, it stays one, and `check_place` refuses it.
    dst = real_path(dst.parent) / dst.name if dst.name not in ("", "..") else real_path(dst)
    _sweep(dst)
    check_place(dst, form, reads=reads, force=force)
    if not dst.parent.is_dir():
        raise InputError(f"{dst.parent}: no such directory, expected one to write {dst.name} into")
    free = shutil.disk_usage(dst.parent).free
    if nbytes + _MARGIN > free:
        raise InputError(f"{dst}: needs {nbytes / 1e9:.3f} GB, the disk has {free / 1e9:.3f} GB free")
    try:
        work = Path(tempfile.mkdtemp(prefix=_prefix(dst), dir=dst.parent))
    except OSError as error:
        raise InputError(f"{dst}: cannot be written: {error.strerror}") from None
    lock = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield work / dst.name
        check_place(dst, form, reads=reads, force=force)  # again: another run may have finished first
        _commit(work / dst.name, dst, work / _ASIDE)
    except OSError as error:
        raise InputError(f"{dst}: cannot be written: {error.strerror}") from None
    finally:
        _discard(work, dst)
        os.close(lock)


def _prefix(dst: Path) -> str:
    return f".{dst.name[:100]}.partial-"


def _sweep(dst: Path) -> None:
    """Remove the working directories that killed runs left behind."""
    for left in dst.parent.glob(f"{glob.escape(_prefix(dst))}*"):
        if left.is_symlink() or not left.is_dir():
            continue
        lock = os.open(left, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _discard(left, dst)
        except BlockingIOError:
            pass  # another run holds the lock and is still writing
        finally:
            os.close(lock)


def _commit(new: Path, dst: Path, aside: Path) -> None:
    """Rename the complete ``new`` to ``dst``. If the second rename fails, `_discard` undoes the first."""
    if new.is_dir():
        _sync(new)
        if dst.exists():
            os.rename(dst, aside)  # a directory cannot be renamed over another
    os.replace(new, dst)
    _sync(dst.parent)


def _discard(work: Path, dst: Path) -> None:
    """Remove a working directory. If it holds the old result and ``dst`` does not exist, the old result is restored."""
    aside = work / _ASIDE
    if aside.exists() and not os.path.lexists(dst):
        os.rename(aside, dst)
    shutil.rmtree(work, ignore_errors=True)


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

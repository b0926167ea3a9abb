"""Output that is complete or absent: written beside its place under another name, and renamed at the end.

What a killed process leaves behind has a lock that the kernel has released: the next run to the same place removes it.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jllama.errors import InputError

_MARGIN = 1 << 20  # what directories and small files take beside the tensors


@contextlib.contextmanager
def staged(dst: Path, nbytes: int, *, force: bool = False) -> Iterator[Path]:
    """A path to write a file or a directory of about ``nbytes`` to, which becomes ``dst`` if all goes well."""
    dst = Path(os.path.abspath(dst))
    check_replaceable(dst, force)
    if not dst.parent.is_dir():
        raise InputError(f"{dst.parent}: no such directory, expected one to write {dst.name} into")
    _sweep(dst)
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
        check_replaceable(dst, force)  # another run may have been faster
        _commit(work / dst.name, dst, work / "replaced")
    except OSError as error:
        raise InputError(f"{dst}: cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os.close(lock)


def _prefix(dst: Path) -> str:
    return f".{dst.name[:100]}.partial-"


def check_replaceable(dst: Path, force: bool) -> None:
    """Refuse a place that is taken; with ``force`` only one that holds something else than a checkpoint."""
    if not os.path.lexists(dst):
        return
    if not force:
        raise InputError(f"{dst}: exists already (--force replaces it)")
    if dst.is_dir() and not dst.is_symlink():
        entries = list(dst.iterdir())
        checkpoint = any(entry.name in ("config.json", "params.json", "model.bin") for entry in entries)
        if any(entry.is_dir() for entry in entries) or (entries and not checkpoint):
            raise InputError(f"{dst}: --force replaces checkpoints only, and this directory holds other things")


def _sweep(dst: Path) -> None:
    """Remove what killed runs left behind."""
    for left in dst.parent.glob(f"{glob_escape(_prefix(dst))}*"):
        if left.is_symlink() or not left.is_dir():
            continue
        lock = os.open(left, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
        except BlockingIOError:
            pass  # another run is at work there
        finally:
            os.close(lock)


def glob_escape(text: str) -> str:
    """A name as a pattern that matches it alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in text)


def _commit(new: Path, dst: Path, aside: Path) -> None:
    if new.is_dir() and os.path.lexists(dst):
        os.rename(dst, aside)
    try:
        os.replace(new, dst)
    except BaseException:
        if os.path.lexists(aside) and not os.path.lexists(dst):
            os.rename(aside, dst)
        raise
    parent = os.open(dst.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)

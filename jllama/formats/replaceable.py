"""Decides whether an output may be written to a path. ``--force`` replaces only a checkpoint that jllama wrote, and
only one of the same form as the new output.

A directory in the Hugging Face layout and a GGUF file name the program that wrote them (`WRITER`, `GGUF_WRITER`). A
llama2.c file has no such field. It may be replaced if it is a complete model of that format.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from jllama.config import read_json
from jllama.errors import InputError
from jllama.formats.files import label
from jllama.formats.gguf_file import read_gguf
from jllama.formats.hf import EXTRAS, TOKENIZERS
from jllama.formats.llama2c import MODEL_NAME, open_llama2c

WRITER = ("written_by", "jllama")  # an entry of config.json
GGUF_WRITER = ("jllama.written_by", "jllama")  # a field of a GGUF file


@dataclass(frozen=True)
class Form:
    """A form of output. ``stranger`` says why a path is not a checkpoint of this form written by jllama; None if it
    is."""

    name: str
    is_directory: bool
    stranger: Callable[[Path], str | None]


def _not_our_hf(path: Path) -> str | None:
    weights = r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|config\.json"
    found = _other_entry(path, weights, *TOKENIZERS, *EXTRAS)
    if found is None and any(path.iterdir()) and read_json(path / "config.json").get(WRITER[0]) != WRITER[1]:
        return "a checkpoint that another program wrote"
    return found


def _not_our_llama2c_directory(path: Path) -> str | None:
    found = _other_entry(path, re.escape(MODEL_NAME), "tokenizer.bin")
    return _not_llama2c(path) if found is None and any(path.iterdir()) else found


def _not_llama2c(path: Path) -> str | None:
    open_llama2c(path)
    return None


def _not_our_gguf(path: Path) -> str | None:
    ours = read_gguf(path).fields.get(GGUF_WRITER[0]) == GGUF_WRITER[1]
    return None if ours else "a GGUF file that another program wrote"


def _other_entry(path: Path, pattern: str, *names: str) -> str | None:
    """Describe the first entry of a directory that does not belong to the form; None if all do."""
    for entry in sorted(path.iterdir()):
        known = entry.name in names or re.fullmatch(pattern, entry.name)
        if not known or entry.is_symlink() or not entry.is_file():
            return f"{label(entry.name)} in it"
    return None


HF = Form("a Hugging Face or native directory", True, _not_our_hf)
LLAMA2C_DIRECTORY = Form("a llama2.c directory", True, _not_our_llama2c_directory)
LLAMA2C = Form("a llama2.c file", False, _not_llama2c)
GGUF = Form("a GGUF file", False, _not_our_gguf)


def check_place(dst: Path, form: Form, *, reads: Iterable[Path] = (), force: bool = False) -> str | None:
    """Raise `InputError` if the output may not be written to ``dst``. Returns a description of what it will replace, or
    None if nothing is there.

    ``reads`` are the paths that the output is read from. They must not overlap with ``dst``, even with ``force``.
    """
    for path in reads:
        _check_apart(dst, path)
    if not os.path.lexists(dst):
        return None
    if not force:
        raise InputError(f"{dst}: exists already (--force replaces it)")
    found = _found_instead(dst, form)
    if found is not None:
        raise InputError(f"{dst}: --force replaces {form.name} that jllama wrote, found {found}")
    files = [dst, *dst.iterdir()] if dst.is_dir() else [dst]
    return f"{form.name} of {sum(file.stat().st_size for file in files if file.is_file()) / 1e6:.1f} MB"


def _found_instead(dst: Path, form: Form) -> str | None:
    if dst.is_symlink():
        return "a link"
    if form.is_directory != dst.is_dir():
        return "a directory" if dst.is_dir() else "a file"
    if not form.is_directory and not dst.is_file():
        return "something else"
    try:
        return form.stranger(dst)
    except OSError as error:
        return f"what cannot be read ({error.strerror})"
    except InputError:  # its text is about a broken checkpoint, but this may be no checkpoint at all
        return "something else"


def _check_apart(dst: Path, src: Path) -> None:
    """Raise `InputError` if ``dst`` is ``src``, is inside it or contains it, or if the target of a link in ``src`` is
    in ``dst``."""
    place = real_path(dst)
    if _same(place, src):
        raise InputError(f"{dst}: expected another place than SRC, found the same")
    if any(_same(parent, src) for parent in place.parents):
        raise InputError(f"{dst}: expected a place outside of SRC, found one inside")
    for path in _with_entries(src):
        if any(_same(place, part) for part in (real_path(path), *real_path(path).parents)):
            raise InputError(f"{dst}: expected a place apart from SRC, found one that holds {label(path.name)} of it")


def real_path(path: Path) -> Path:
    """The path with links resolved. `Path.resolve` is not used, because it raises on circular links."""
    return Path(os.path.realpath(path))


def _with_entries(src: Path) -> Iterator[Path]:
    yield src
    if src.is_dir():
        yield from src.iterdir()


def _same(a: Path, b: Path) -> bool:
    """Whether two paths are the same file or directory, also through links, other mounts or hard links."""
    try:
        return a == real_path(b) or a.samefile(b)
    except OSError:
        return False

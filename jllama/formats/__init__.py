"""Checkpoints of every kind, read into one form: `open_source` recognises what a path holds."""

from collections.abc import Callable
from pathlib import Path

from jllama.errors import InputError
from jllama.formats import gguf, hf, llama2c, meta
from jllama.formats.hub import resolve
from jllama.formats.source import Source, checked

# Tried in this order: each says for itself whether a path is of its kind.
FORMATS: tuple[tuple[Callable[[Path], bool], Callable[..., Source]], ...] = (
    (hf.recognise, hf.open_hf),
    (meta.recognise, meta.open_meta),
    (gguf.recognise, gguf.open_gguf),
    (llama2c.recognise, llama2c.open_llama2c),
)


def open_source(path: str | Path, *, links: bool = False) -> Source:
    """Open the checkpoint at ``path``, or of that name (see `jllama.formats.hub.resolve`): its files are mapped and
    checked, no tensor is read yet. ``links``: symbolic links of a directory may lead out of it."""
    path = resolve(path)
    try:
        if not path.exists():
            raise InputError(f"{path}: no such file or directory")
        for recognise, opened in FORMATS:
            if recognise(path):
                return checked(opened(path, links=links))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    raise InputError(
        f"{path}: expected a Hugging Face, Meta or llama2.c directory, a .gguf or a llama2.c .bin, found none of them"
    )

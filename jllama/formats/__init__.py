"""Readers of checkpoints. `open_source` recognises the format of a path and returns a `Source`."""

from collections.abc import Callable
from pathlib import Path

from jllama.errors import InputError
from jllama.formats import gguf, hf, llama2c, meta
from jllama.formats.hub import resolve
from jllama.formats.source import Source, checked

# Tried in this order. Each pair is a test whether a path has the format, and the reader.
FORMATS: tuple[tuple[Callable[[Path], bool], Callable[..., Source]], ...] = (
    (hf.recognise, hf.open_hf),
    (meta.recognise, meta.open_meta),
    (gguf.recognise, gguf.open_gguf),
    (llama2c.recognise, llama2c.open_llama2c),
)


def open_source(path: str | Path, *, links: bool = False) -> Source:
    """Open a checkpoint by its path or name (see `jllama.formats.hub.resolve`). Its files are mapped and their headers
    checked; no tensor is read yet. ``links`` allows symbolic links in a directory to point outside it."""
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

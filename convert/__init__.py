"""Checkpoints of every kind, read into one form: `open_source` recognises what a path holds."""

from pathlib import Path

from convert import hf
from convert.source import Source, checked
from jllama.errors import InputError


def open_source(path: str | Path) -> Source:
    """Open the checkpoint at ``path``: its files are mapped and checked, no tensor is read yet."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or directory")
    if hf.recognise(path):
        return checked(hf.open_hf(path))
    raise InputError(
        f"{path}: expected a directory with config.json and safetensors, found nothing of the kind"
    )

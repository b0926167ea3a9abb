"""Which model is run: a checkpoint, the embedded one, or random weights of a preset's shape."""

import argparse
import os
from pathlib import Path

from bench.record import ROOT
from bench.reference import Reference
from bench.workloads import DRAWN

PREPARE_S = 600  # writing a large model's random weights


def cache_folder(given: str | None) -> Path:
    """Where random weights are kept, and what the reference has compiled."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(given) if given else user / "jllama" / "bench").resolve()


def model(settings: argparse.Namespace, reference: Reference, preset: str | None, dtype: str) -> tuple[str, str]:
    """The name and the place of the model, its random weights written where they are not there yet."""
    if settings.model:
        return Path(settings.model).resolve().name, str(Path(settings.model).resolve())
    demo = ROOT / "jllama" / "demo"
    if preset is None and (demo / "config.json").exists():
        return "demo", str(demo)
    preset = preset or "stories260k"
    if settings.in_memory:
        return preset, f"{DRAWN}{preset}"
    stored = dtype if dtype in ("f32", "bf16", "f16") else "bf16"
    folder = cache_folder(settings.cache_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = str(folder / f"{preset}-{stored}-seed42")
    return preset, reference.ask("prepare", PREPARE_S, preset=preset, dtype=stored, path=path)["path"]

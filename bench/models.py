"""The model of a run: a checkpoint, the embedded model, or random weights of a preset's shape."""

import argparse
import os
from pathlib import Path

from bench.record import ROOT
from bench.reference import Reference
from bench.workloads import DRAWN

PREPARE_S = 600  # limit for writing a large model's random weights


def cache_folder(given: str | None) -> Path:
    """The folder for random weights and for what the reference compiles."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(given) if given else user / "jllama" / "bench").resolve()


def model(settings: argparse.Namespace, reference: Reference, preset: str | None, dtype: str) -> tuple[str, str]:
    """The model's name and path. Random weights are written first if they are missing."""
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

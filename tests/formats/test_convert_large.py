"""A checkpoint of 4 GB: the memory and time of its conversion, compared with a plain copy of the same bytes.

It runs only if JLLAMA_LARGE names a folder with 15 GB of free space. Results go to bench/results/convert.jsonl.
"""

import math
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest

from bench.record import RESULTS, append, package_versions, start_run
from jllama.config import LlamaConfig
from jllama.formats import open_source
from jllama.formats.layout import expected_shapes
from jllama.formats.meta import BY_COLUMNS, LAYER, MODEL
from jllama.formats.native import directory, save
from jllama.formats.source import DTYPES, Source, Tensor

ROOT = Path(__file__).parents[2]
LARGE = os.environ.get("JLLAMA_LARGE")
pytestmark = [
    pytest.mark.skipif(LARGE is None, reason="takes minutes and 15 GB of disk (set JLLAMA_LARGE to a folder)"),
    pytest.mark.timeout(3600),
]
CONFIG = LlamaConfig(dim=2560, n_layers=24, n_heads=20, n_kv_heads=20, hidden_dim=6912, vocab_size=32000)
ALLOWED = 600e6
SHARDS = 4
REPEATS = 3


def noise() -> np.ndarray:
    """64 MB of plausible bfloat16 weights, from which all tensors are taken."""
    return (np.random.RandomState(0).randn(32 << 20) * 0.02).astype(np.float32).astype(DTYPES["bfloat16"])


def large() -> Source:
    """4 GB of tensors that take 64 MB of memory."""
    values = noise()

    def tensor(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
        width = math.prod(shape[1:])

        def rows(begin: int, end: int) -> np.ndarray:
            at = (begin * 977 + seed * 7919) % (values.size // 2)
            return values[at : at + (end - begin) * width].reshape(end - begin, *shape[1:])

        return Tensor(shape, "bfloat16", name, rows)

    shapes = expected_shapes(CONFIG)
    tensors = {name: tensor(name, shape, i) for i, (name, shape) in enumerate(shapes.items())}
    return Source(Path("large"), "hf", CONFIG, tensors, None)


def write_meta(path: Path) -> None:
    """A checkpoint of the same size in Meta's format, written shard by shard and tensor by tensor."""
    path.mkdir()
    values = noise()
    for i in range(SHARDS):
        shapes = {}
        for ours, shape in expected_shapes(CONFIG).items():
            prefix, _, field = ours.rpartition(".")
            axis = None if len(shape) == 1 else 1 if field in (*BY_COLUMNS, "embed") else 0
            name = f"{prefix}.{LAYER[field]}.weight" if prefix else f"{MODEL[field]}.weight"
            shapes[name] = tuple(n // SHARDS if k == axis else n for k, n in enumerate(shape))
        items = [
            checkpoints.text(name) + checkpoints.pickled_tensor(str(k), "bfloat16", shape, math.prod(shape))
            for k, (name, shape) in enumerate(shapes.items())
        ]
        with zipfile.ZipFile(path / f"consolidated.{i:02}.pth", "w", zipfile.ZIP_STORED) as archive:
            archive.writestr("archive/data.pkl", b"\x80\x02}(" + b"".join(items) + b"u.")
            for k, shape in enumerate(shapes.values()):
                archive.writestr(f"archive/data/{k}", values[k : k + math.prod(shape)].tobytes())
    text = f'{{"dim": {CONFIG.dim}, "n_layers": {CONFIG.n_layers}, "n_heads": {CONFIG.n_heads}, "vocab_size": -1}}'
    (path / "params.json").write_text(text)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    path = Path(str(LARGE)) / "jllama-large"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def models(folder: Path) -> dict[str, Path]:
    save(directory(large(), max_shard_bytes=1_000_000_000), folder / "hf")
    write_meta(folder / "meta")
    return {"hf": folder / "hf", "meta": folder / "meta"}


@dataclass(frozen=True)
class Measured:
    seconds: float
    peak: int  # bytes of anonymous memory


def measured(*command: str) -> Measured:
    """Run a process to its end, watching its anonymous memory."""
    began, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        time.sleep(0.005)
    assert process.returncode == 0
    return Measured(time.perf_counter() - began, peak)


def anonymous(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def forget(path: Path) -> None:
    """Drop the files from the page cache, so that every contender reads them from the disk."""
    for file in path.iterdir():
        with open(file, "rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copied(source: Path, to: Path) -> Measured:
    """A plain copy, on the disk when it ends, as a conversion is."""
    script = f"cp -r '{source}' '{to}' && sync '{to}'/*"
    return measured("sh", "-c", script)


def record(case: str, impl: str, metric: str, samples: list[float], **more: Any) -> None:
    value = sorted(samples)[len(samples) // 2]
    fields = dict(suite="load", case=case, impl=impl, model="random-2b", dtype="bf16", batch=0, seq=0, context=0)
    run = start_run("cpu", package_versions(["jax", "numpy"]), {})
    fields |= dict(metric=metric, value=value, samples=samples, floor=None) | more
    append(RESULTS / "convert.jsonl", [run.record(**fields)])


def convert(*args: object) -> tuple[str, ...]:
    return (sys.executable, "-m", "convert", *map(str, args), "-q")


CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "convert-hf-to-native": ("hf", ()),
    "convert-hf-to-gguf": ("hf", ("--to", "gguf")),
    "convert-meta-to-hf": ("meta", ("--to", "hf")),
}


@pytest.mark.parametrize("case", CASES)
def test_memory_and_time_beside_a_plain_copy(case: str, models: dict[str, Path], folder: Path) -> None:
    name, flags = CASES[case]
    source, out = models[name], folder / "out"
    size = sum(file.stat().st_size for file in source.iterdir())
    assert size > 4e9
    interpreter = measured(sys.executable, "-c", "import time; time.sleep(0.2)").peak
    runs: dict[str, list[Measured]] = {"jllama": [], "cp": []}
    contenders: dict[str, Callable[[], Measured]] = {
        "cp": lambda: copied(source, out),
        "jllama": lambda: measured(*convert(source, out, *flags)),
    }
    for _ in range(REPEATS):
        for impl, contender in contenders.items():
            forget(source)
            runs[impl].append(contender())
            shutil.rmtree(out) if out.is_dir() else out.unlink()
    peaks = [float(run.peak - interpreter) for run in runs["jllama"]]
    seconds = {impl: [run.seconds for run in samples] for impl, samples in runs.items()}
    for impl, samples in seconds.items():
        record(case, impl, "s", samples, bytes=size)
    record(case, "jllama", "bytes_peak", peaks, bytes=size, floor=ALLOWED)
    assert max(peaks) < ALLOWED
    assert sorted(seconds["jllama"])[1] < 2 * sorted(seconds["cp"])[1]


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_memory_of_quantising(quant: str, models: dict[str, Path], folder: Path) -> None:
    command = (sys.executable, "-m", "convert.quantize", models["hf"], folder / "q", "--format", quant, "-q")
    run = measured(*map(str, command))
    shutil.rmtree(folder / "q")
    record(f"quantize-{quant}", "jllama", "s", [run.seconds])
    record(f"quantize-{quant}", "jllama", "bytes_peak", [float(run.peak)], floor=ALLOWED)
    assert run.peak < ALLOWED


@pytest.mark.parametrize("name", ["hf", "meta"])
def test_memory_of_loading(name: str, models: dict[str, Path]) -> None:
    """On a CPU the weights themselves are anonymous memory: what is beside them counts."""
    script = (
        f"import jax, jllama; jax.block_until_ready(jllama.load({str(models[name])!r}, dtype='bfloat16', max_len=64))"
    )
    run = measured(sys.executable, "-c", script)
    weights = 2 * open_source(models[name]).config.n_params
    record(f"load-{name}", "jllama", "bytes_peak", [float(run.peak - weights)], floor=ALLOWED)
    assert run.peak - weights < ALLOWED

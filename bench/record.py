"""Records: one JSON object a line, only appended. Every figure names its run and its commit."""

import dataclasses
import datetime
import json
import os
import platform
import secrets
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jllama

ROOT = Path(__file__).parents[1]  # the folder of our packages: a checkout, or site-packages
CHECKOUT = (ROOT / "pyproject.toml").is_file()
# Where records go. Without a checkout that is the current folder, never site-packages.
RESULTS = ROOT / "bench" / "results" if CHECKOUT else Path("bench-results")

# The keys that every record has. More keys are welcome.
KEYS: dict[str, type | tuple[type, ...]] = {
    "suite": str,
    "case": str,
    "impl": str,
    "model": str,
    "dtype": str,
    "batch": int,
    "seq": int,
    "context": int,
    "metric": str,
    "value": (int, float, type(None)),  # the median; None where ``why`` says why there is none
    "samples": list,
    "floor": (int, float, type(None)),
    "device": str,
    "versions": dict,
    "commit": str,
    "dirty": bool,
    "when": str,
    "run": str,
}
SUITES = ("ops", "compare", "load", "traffic", "mesh")
METRICS = ("tokens_per_s", "ms", "s", "tflops", "tb_per_s", "bytes_peak", "ppl", "busy_share")
HIGHER_IS_BETTER = ("tokens_per_s", "tflops", "tb_per_s", "busy_share")

Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """The fields that all records of one side-by-side run share."""

    run: str
    when: str
    commit: str
    dirty: bool
    device: str
    versions: dict[str, str]
    ceilings: dict[str, float]
    clocks: dict[str, float]
    load_average: list[float]
    cpu_cores: int

    def record(self, **fields: Any) -> Record:
        """A record of this run. Raises ValueError if a key is missing or of the wrong type."""
        record = {**fields, **dataclasses.asdict(self)}
        check(record)
        return record


def start_run(device: str, versions: Mapping[str, str], ceilings: Mapping[str, float], name: str | None = None) -> Run:
    """Start a run: read the commit, the clocks and the machine's load, and choose an id, if it is not ``name``."""
    now = datetime.datetime.now(datetime.UTC)
    commit, dirty = _commit()
    return Run(
        # Several commands on one machine, one after the other, may use one run id.
        run=name or os.environ.get("JLLAMA_RUN") or f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}",
        when=now.isoformat(timespec="seconds"),
        commit=commit,
        dirty=dirty,
        device=device,
        versions={"python": platform.python_version(), **versions},
        ceilings=dict(ceilings),
        clocks=_clocks(),
        load_average=[round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else [],
        cpu_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
    )


def check(record: Mapping[str, Any]) -> None:
    """Raise ValueError unless ``record`` has every key of `KEYS` with a value of the right type."""
    for key, kind in KEYS.items():
        if key not in record:
            raise ValueError(f"record: {key}: missing")
        if not isinstance(record[key], kind) or (isinstance(record[key], bool) and kind is not bool):
            raise ValueError(f"record: {key}: expected {kind}, found {record[key]!r}")
    for key, known in (("suite", SUITES), ("metric", METRICS)):
        if record[key] not in known:
            raise ValueError(f"record: {key}: expected one of {', '.join(known)}, found {record[key]!r}")
    if record["value"] is None and not record.get("why"):
        raise ValueError("record: why: a record without a value says why")


def append(path: Path, records: Iterable[Record]) -> None:
    """Append records to the file ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        for record in records:
            check(record)
            file.write(json.dumps(record, allow_nan=False) + "\n")


def read(folder: Path) -> Iterator[Record]:
    """All records of the ``.jsonl`` files in ``folder``, oldest first in each file."""
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                record = json.loads(line)
                check(record)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
            yield record


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """The installed versions of packages, without importing them. Missing packages are left out."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> tuple[str, bool]:
    """The checked-out commit, and whether the code differs from it. Results and docs do not count, because a run writes
    them. Without a checkout it is the package's version."""
    # A copy of the tree without its history gets the commit from the environment.
    if "JLLAMA_COMMIT" in os.environ:
        name = os.environ["JLLAMA_COMMIT"]
        return name.removesuffix("+"), name.endswith("+")
    if not CHECKOUT:
        return f"v{jllama.__version__}", False
    try:
        commit = _git("rev-parse", "--short=10", "HEAD").strip()
        changed = _git(
            "status", "--porcelain", "--", "jllama", "pallas_kernels", "bench/*.py", "bench/peers", "convert"
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown", True
    return commit, bool(changed.strip())


def _git(*args: str) -> str:
    return subprocess.run(
        ["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=True, timeout=20
    ).stdout


def _clocks() -> dict[str, float]:
    """Clocks in MHz at the start of the run: of the GPU if nvidia-smi works, else of the CPU."""
    names = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit")
    query = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        out = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
        return {name: float(value) for name, value in zip(names, out.split(","), strict=True)}
    except (OSError, subprocess.SubprocessError, ValueError):
        pass
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    mhz = [float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")]
    return {"cpu": max(mhz)} if mhz else {}

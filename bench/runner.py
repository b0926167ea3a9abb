"""What `bench.compare` does once its arguments are read."""

import argparse
import dataclasses
import functools
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import peers
from bench.measure import wait_quiet
from bench.process import Budget, PeerFailed, PeerUnsupported, Worker, find_python
from bench.record import RESULTS, ROOT, Record, Run, append, start_run
from bench.reference import Reference
from bench.roofline import best_of
from bench.rows import records_of, table
from bench.workloads import Workload, grid, prompts

PREPARE_S = 600  # writing a large model's random weights


@dataclass
class Entry:
    """One implementation in this run: who, in which Python, and what became of it, workload by workload."""

    impl: str
    peer: str
    backend: str
    python: str | None
    why: str | None = None  # why there is nothing to show
    failed: bool = False  # and that is a failure, not a limit
    worker: Worker | None = None
    opened: dict[str, Any] = field(default_factory=dict)
    startup_s: float = 0.0
    outcomes: dict[Workload, dict[str, Any]] = field(default_factory=dict)
    clock: Budget = field(default_factory=Budget)

    @property
    def ours(self) -> bool:
        """Whether its failure is our failure."""
        return self.peer == "ours"


def say(text: str) -> None:
    """Progress goes to stderr; stdout is for the table."""
    print(text, file=sys.stderr, flush=True)


def list_peers(settings: argparse.Namespace) -> int:
    """Print every peer and where it was found, or why not."""
    for kind in ("model", "ops"):
        for name in peers.discover(kind):
            python, why = find_python(name, settings.peer_python)
            print(f"{peers.load(name).name:16} {kind:6} {'found' if python else why}")
    return 0


def run(settings: argparse.Namespace) -> int:
    """Every model in every dtype; 1 where one of our own backends failed."""
    settings.clock = Budget(settings.budget)
    with Reference() as reference:
        platform: str = reference.hello["platform"]
        say(f"device: {reference.hello['device']}")
        entries = _entries(settings, platform)
        failed = False
        for preset in settings.preset.split(",") if settings.preset else [None]:
            for dtype in settings.dtype or ["f32" if platform == "cpu" else "bf16"]:
                name, path = _model(settings, reference, preset, dtype)
                records = _measure(settings, reference, [_fresh(e) for e in entries], name, path, dtype)
                failed |= any(r["impl"] in ("xla", "pallas", "auto") and r.get("failed") for r in records)
        return int(failed)


def _entries(settings: argparse.Namespace, platform: str) -> list[Entry]:
    backends = settings.backends or (["xla"] if platform == "cpu" else ["xla", "pallas"])
    entries = [Entry(b, "ours", b, sys.executable) for b in backends]
    known: list[str] = [] if settings.peers == "none" else peers.discover("model")
    if settings.peers not in ("all", "none"):  # by name, or by the dotted path of a module that holds a PEER
        by_name: dict[str, str] = {peers.load(n).name: n for n in known}
        known = [by_name.get(asked) or asked for asked in settings.peers.split(",")]
    for name in known:
        try:
            impl = peers.load(name).name
        except ImportError:
            raise peers_error(name) from None
        python, why = find_python(name, settings.peer_python)
        entries.append(Entry(impl, name, "", python, why))
    return entries


def peers_error(name: str) -> Exception:
    """What to say about a peer that nobody knows."""
    from jllama.errors import InputError

    return InputError(f"--peers: expected any of {', '.join(peers.discover('model'))}, found {name!r}")


def _fresh(entry: Entry) -> Entry:
    return Entry(entry.impl, entry.peer, entry.backend, entry.python, entry.why)


def _model(settings: argparse.Namespace, reference: Reference, preset: str | None, dtype: str) -> tuple[str, str]:
    """The name and the directory of the model, its random weights written where they are not there yet."""
    if settings.model:
        return Path(settings.model).resolve().name, str(Path(settings.model).resolve())
    demo = ROOT / "jllama" / "demo"
    if preset is None and (demo / "config.json").exists():
        return "demo", str(demo)
    preset = preset or "stories260k"
    stored = dtype if dtype in ("f32", "bf16", "f16") else "bf16"
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(settings.cache_dir) if settings.cache_dir else user / "jllama" / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.resolve() / f"{preset}-{stored}-seed42"
    if not path.exists():
        say(f"writing random weights: {path}")
    return preset, reference.ask("prepare", PREPARE_S, preset=preset, dtype=stored, path=str(path))["path"]


def _measure(
    settings: argparse.Namespace, reference: Reference, entries: list[Entry], name: str, path: str, dtype: str
) -> list[Record]:
    shape = reference.ask("shape", 60, model=path)
    text = None if settings.preset else reference.ask("encode", 60, model=path, text="Once upon a time,")["ids"]
    lengths = settings.prompt_len or [len(text) if text else 8]
    loads = grid(settings.batch, lengths, settings.new_tokens, settings.prefill, settings.context)
    if longest := [w for w in loads if w.context > shape["max_seq_len"]]:
        say(f"{name}: skipping {len(longest)} workloads past its context of {shape['max_seq_len']}")
        loads = [w for w in loads if w not in longest]
    job = {
        "model": path,
        "dtype": dtype,
        "platform": reference.hello["platform"],
        "batch": max(w.batch for w in loads),
        "max_len": max(w.context for w in loads) + 128,
        # By batch, what a cache must hold.
        "rooms": {str(w.batch): max(o.context + 128 for o in loads if o.batch == w.batch) for w in loads},
        "context": shape["max_seq_len"],
        "vocab_size": shape["vocab_size"],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }
    weights = round(shape["n_params"] * (4 if dtype == "f32" else 2))
    run = start_run(reference.hello["device"], reference.hello["versions"], reference.ceilings(dtype, weights))
    say(f"{name} {dtype}: run {run.run}, {len(loads)} workloads, load average {run.load_average}")
    reference.open(job)
    order = settings.order or ("turns" if job["platform"] == "cpu" else "one-by-one")
    turns, together = order == "turns", order == "warm-together"
    inputs = {w: prompts(w, shape["vocab_size"], shape["bos_id"], text) for w in loads}
    records: list[Record] = []
    if together:
        _warm_all(settings, reference, entries, loads, inputs, job)
    for group in [entries] if turns else [[e] for e in entries]:
        if not together:
            _open_all(settings, group, job)
        _run_group(settings, reference, group, loads, inputs, warmed=together)
        if turns:  # the machine may have been busy: the best of before and after is nearer to its ceiling
            run = dataclasses.replace(run, ceilings=best_of(run.ceilings, reference.ceilings(dtype, weights)))
        made = [r | {"order": order} for e in group for r in records_of(run, e, name, dtype, loads, shape["dims"])]
        append(_results(settings) / "compare.jsonl", made)  # at once: a run that is ended keeps what it has
        records += made
    reference.close_model()
    _show(settings, run, records)
    return records


def _results(settings: argparse.Namespace) -> Path:
    return Path(settings.results) if settings.results else RESULTS


def _open_all(settings: argparse.Namespace, group: list[Entry], job: dict[str, Any]) -> None:
    for entry in (e for e in group if e.why is None):
        _guard(entry, None, lambda e: _open(settings, e, job))


def _warm_all(
    settings: argparse.Namespace,
    reference: Reference,
    entries: list[Entry],
    loads: list[Workload],
    inputs: dict[Workload, list[list[int]]],
    job: dict[str, Any],
) -> None:
    """Open all, and run all workloads cold and warm, at the same time: compiling takes most of a session. What is
    measured once, cold, is measured beside the others' then; what is measured warm is not."""

    def warm(entry: Entry) -> None:
        _open_all(settings, [entry], job)
        for load in loads:
            if entry.why is None:
                _guard(entry, load, functools.partial(_warm_up, settings, reference, load=load, rows=inputs[load]))

    whole, settings.clock = settings.clock, settings.clock.part(0.6)  # so that there is time to measure
    with ThreadPoolExecutor(len(entries)) as pool:
        list(pool.map(warm, entries))
    settings.clock = whole


def _run_group(
    settings: argparse.Namespace,
    reference: Reference,
    group: list[Entry],
    loads: list[Workload],
    inputs: dict[Workload, list[list[int]]],
    *,
    warmed: bool,
) -> None:
    """Run the workloads of open implementations in turns, close all."""
    for entry in group:
        entry.clock = Budget(settings.share, "a peer's share")
    for load in loads:
        for entry in (e for e in group if e.why is None):
            if not entry.ours and "why" not in entry.outcomes.get(load, {}):
                _guard(entry, load, lambda e: e.clock.check())
            if not warmed and load not in entry.outcomes:
                _guard(entry, load, functools.partial(_warm_up, settings, reference, load=load, rows=inputs[load]))
        for _ in range(settings.runs):
            for entry in (e for e in group if e.why is None and "why" not in e.outcomes.get(load, {})):
                _guard(entry, load, functools.partial(_timed, settings, load=load, rows=inputs[load]))
    for entry in group:
        if entry.worker is not None:
            entry.worker.close()


def _open(settings: argparse.Namespace, entry: Entry, job: dict[str, Any]) -> None:
    assert entry.python is not None
    settings.clock.check()
    say(f"  {entry.impl}: opening")
    entry.worker = Worker(entry.peer, entry.python)
    entry.worker.ask("available", settings.time_limit)  # imports nothing heavy: what follows is the peer's own start
    entry.opened = entry.worker.ask("open", max(settings.time_limit, 300), job=job | {"backend": entry.backend})


def _generate(settings: argparse.Namespace, entry: Entry, load: Workload, rows: list[list[int]]) -> dict[str, Any]:
    assert entry.worker is not None
    settings.clock.check()
    return entry.worker.ask("generate", settings.time_limit, prompts=rows, new_tokens=load.new_tokens)


def _timed(settings: argparse.Namespace, entry: Entry, load: Workload, rows: list[list[int]]) -> None:
    idle = wait_quiet(settings.wait_quiet)
    entry.outcomes[load]["runs"].append(_generate(settings, entry, load, rows) | {"idle": idle})


def _warm_up(
    settings: argparse.Namespace, reference: Reference, entry: Entry, load: Workload, rows: list[list[int]]
) -> None:
    """The cold run, which compiles; a second, for what compiles late; and the check of the tokens."""
    outcome = entry.outcomes[load] = {"runs": []}
    outcome["cold"] = _generate(settings, entry, load, rows)
    warm = _generate(settings, entry, load, rows)
    outcome["check"] = reference.verify(rows, warm["ids"])
    if entry.ours:
        sizes = {"batch": load.batch, "prompt": load.prompt_len, "context": load.context}
        outcome["choices"] = entry.worker.ask("chosen", 60, args=sizes)["choices"] if entry.worker else {}
    agreed = outcome["check"].get("agreement")
    note = "not checked" if agreed is None else f"{agreed:.1%} of tokens agree"
    steps = load.new_tokens - 1
    speed = load.batch * (steps / warm["decode_s"] if steps else load.prompt_len / warm["first_s"])
    say(f"  {entry.impl}: {load.case} batch {load.batch} prompt {load.prompt_len}: about {speed:,.0f} tokens/s, {note}")
    if not outcome["check"]["passed"]:
        raise PeerFailed(
            f"its tokens differ: {note}, the worst {outcome['check']['worst']:.2f} standard deviations off"
        )


def _guard(entry: Entry, load: Workload | None, do: Any) -> None:
    """Do something with a peer; what goes wrong becomes what its row says, and the rest goes on."""
    try:
        do(entry)
    except (PeerFailed, OSError) as error:
        say(f"  {entry.impl}: {error}")
        unsupported = isinstance(error, PeerUnsupported)
        gone = entry.worker is None or entry.worker.dead is not None
        if load is not None and not (unsupported and entry.outcomes.get(load, {}).get("runs")):
            entry.outcomes[load] = {"why": str(error), "failed": not unsupported}
        if load is None or gone:
            entry.why, entry.failed = str(error), not unsupported


def _show(settings: argparse.Namespace, run: Run, records: list[Record]) -> None:
    results = _results(settings)
    print(table(records))
    print(f"\nrun {run.run} at {run.commit}{' (changed)' if run.dirty else ''}: {len(records)} records in {results}")
    if settings.plots != "-":
        from bench import plots

        if (why := plots.unavailable()) is not None:
            say(f"no plots: {why}")
            return
        folder = Path(settings.plots) if settings.plots else results / "plots"
        for path in plots.compare_plots(records, folder):
            print(f"plot: {path}")

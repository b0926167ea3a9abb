"""What `bench.ops` does once its arguments are read."""

import argparse
import importlib
import statistics
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import opcases, peers
from bench.entries import say
from bench.measure import stats_dict
from bench.opcases import Case
from bench.process import Budget, PeerFailed, PeerUnsupported, Worker, find_python
from bench.record import RESULTS, Record, Run, append, start_run
from bench.roofline import floor_s, of_dict
from bench.rows import align
from jllama.errors import InputError


def run(settings: argparse.Namespace) -> int:
    """Every operation in every dtype, each by all implementations, one after the other, before the next: what is
    compared is measured within seconds, and what a budget cuts off is whole cases. 1 where one of our own backends
    failed."""
    settings.clock = Budget(settings.budget)
    records: list[Record] = []
    with (
        Worker("op_ours") as reference,
        tempfile.TemporaryDirectory(prefix="bench-ops-") as folder,
        ExitStack() as processes,
    ):
        reference.ask("open", 120, job={"backend": "xla"})
        hello = reference.ask("hello", 120, args={})
        gpu = hello["platform"] == "gpu"
        seqs = settings.seq or ([512, 1024, 2048, 4096] if gpu else [128, 256])
        served = _implementations(settings, hello["platform"])
        for implementation in served:
            processes.callback(implementation.close)
        for dtype in settings.dtype or ["bf16" if gpu else "f32"]:
            cases = [
                case | {"folder": folder}
                for model in settings.model.split(",")
                for op, own in settings.op
                for case in opcases.cases(op, model, model_sizes(model), dtype, settings.batch, own or seqs)
                if op in ("ffn", "matmul") or dtype not in ("int8", "int4")  # attention has no weights
            ]
            ceilings = reference.ask("ceilings", 300, args={"dtype": dtype, "working_set": 0})
            started = start_run(hello["device"], hello["versions"], ceilings)
            say(f"{hello['device']}, {dtype}: {len(cases)} cases, run {started.run}")
            made: list[Record] = []
            for case in cases:
                expected, why = _expected(settings, reference, case, Path(folder))
                one = compared(
                    [_record(started, s.impl, case, s.reply(case, expected, why), s.versions) for s in served]
                )
                append((settings.results or RESULTS) / "ops.jsonl", one)
                made += one
            print(table(made))
            records += made
    _plot(settings, records)
    return int(any(r["impl"] in ("xla", "pallas") and r.get("failed") for r in records))


def model_sizes(model: str) -> dict[str, Any]:
    """What `opcases.cases` needs: the kernels' own CASES where they name the model, else its preset."""
    from jllama.config import preset

    config = preset(model)

    def of(op: str) -> dict[str, Any]:
        return importlib.import_module(f"pallas_kernels.{op}").CASES

    sizes: dict[str, Any] = {"dim": config.dim, "hidden": config.hidden_dim, "heads": config.n_heads}
    sizes |= {"kv_heads": config.n_kv_heads, "head_dim": config.head_dim}
    sizes |= of("attention").get(model, {}) | of("ffn").get(model, {})
    named = {n.removeprefix(f"{model}-"): c for n, c in of("matmul").items() if n.startswith(f"{model}-")}
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    sizes["matmuls"] = named or {
        "qkv": dict(out=q + 2 * kv, inner=config.dim),
        "gate-up": dict(out=2 * config.hidden_dim, inner=config.dim),
        "down": dict(out=config.dim, inner=config.hidden_dim),
    }
    return sizes


def _expected(
    settings: argparse.Namespace, reference: Worker, case: Case, folder: Path
) -> tuple[str | None, str | None]:
    """Where the reference's result lies, or why there is none."""
    path = str(folder / "expected.npy")
    try:
        settings.clock.check()
        reference.ask("expect", settings.time_limit, args={"case": case, "path": path})
    except PeerUnsupported as error:
        return None, str(error)
    except PeerFailed as error:
        say(f"reference of {case['name']} at {case['context']}: {error}")
        return None, "the reference does not fit"
    return path, None


def _implementations(settings: argparse.Namespace, platform: str) -> list["Served"]:
    wanted = [(b, "op_ours", b) for b in settings.backends]
    known = {peers.load(name).name: name for name in peers.discover("ops")}
    asked = {"all": list(known), "none": []}.get(settings.peers, settings.peers.split(","))
    if wrong := [a for a in asked if a not in known]:
        raise InputError(f"--peers: expected any of {', '.join(known)}, found {wrong[0]!r}")
    wanted += [(impl, known[impl], "") for impl in asked]
    served = []
    for impl, name, backend in wanted:
        python, why = find_python(name, settings.peer_python)
        if python is None:
            say(f"{impl}: {why}")
        served.append(Served(settings, impl, name, python, why, {"backend": backend, "platform": platform}))
    return served


@dataclass
class Served:
    """An implementation: a process that takes cases, and another where it has died."""

    settings: argparse.Namespace
    impl: str
    name: str
    python: str | None
    why: str | None  # there is none
    job: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)
    worker: Worker | None = None

    def close(self) -> None:
        """End the process, if there is one."""
        if self.worker is not None:
            self.worker.close()

    def reply(self, case: Case, expected: str | None, why: str | None) -> dict[str, Any]:
        """What one case gave: samples, or why there are none."""
        if self.python is None:
            return {"why": self.why, "failed": False}
        try:
            reply = self._ask(case, expected, why)
        except PeerFailed as error:
            reply = {"why": str(error), "failed": not isinstance(error, PeerUnsupported)}
        figure = f"{1e3 * statistics.median(reply['samples']):.4f} ms" if reply.get("samples") else reply["why"]
        say(f"{self.impl}: {case['name']} batch {case['batch']} at {case['context']}: {figure}")
        return reply

    def _ask(self, case: Case, expected: str | None, why: str | None) -> dict[str, Any]:
        if expected is None:
            raise PeerUnsupported(why)
        self.settings.clock.check()
        if self.worker is None or self.worker.dead is not None:
            self.worker = Worker(self.name, str(self.python))
            self.versions = self.worker.ask("open", 120, job=self.job)["versions"]
        settings = self.settings
        args = dict(case=case, expected=expected, warmup=settings.warmup, iterations=settings.iterations)
        reply = self.worker.ask("run", settings.time_limit, args=args)
        if not reply["samples"]:
            limit = opcases.TOLERANCE[case["dtype"]]
            reply |= {"why": f"error {reply['error_vs_reference']:.1e} above {limit:.0e}", "failed": True}
        return reply


def _record(run: Run, impl: str, case: Case, reply: dict[str, Any], versions: dict[str, str]) -> Record:
    work = opcases.work(case)
    keys = {k: case[k] for k in ("model", "batch", "seq", "context")}
    fields: dict[str, Any] = dict(suite="ops", case=case["name"], impl=impl, metric="ms", **keys)
    fields |= {"dtype": {"int4": "int4-g128"}.get(case["dtype"], case["dtype"])}
    fields |= {"floor": 1e3 * floor_s(work, of_dict(run.ceilings)), "work": {"bytes": work.bytes, "flops": work.flops}}
    fields |= {"tolerance": opcases.TOLERANCE[case["dtype"]]}
    for key in ("error_vs_reference", "peak_bytes", "how", "choices", "why", "failed"):
        if reply.get(key) is not None:
            fields[key] = reply[key] if reply[key] != float("inf") else None
    samples = [1e3 * s for s in reply.get("samples", [])]
    value = statistics.median(samples) if samples else None
    if samples:
        fields["stats"] = stats_dict(samples)
        unfused = opcases.unfused_bytes(case)
        if unfused and reply.get("peak_bytes"):
            fields["unfused_bytes"] = unfused
            fields["memory_reduction"] = (unfused + reply["peak_bytes"]) / reply["peak_bytes"]
    return run.record(**fields, value=value, samples=samples) | {"versions": {**run.versions, **versions}}


def compared(records: list[Record]) -> list[Record]:
    """The records with their speed-up over the XLA reference and over PyTorch on the same case."""

    def of(record: Record, impl: str) -> float | None:
        same = ("case", "model", "dtype", "batch", "seq", "context")
        found = [r["value"] for r in records if r["impl"] == impl and all(r[k] == record[k] for k in same)]
        return found[0] / record["value"] if found and found[0] and record["value"] else None

    return [r | {"speedup": {base: s for base in ("xla", "torch") if (s := of(r, base)) is not None}} for r in records]


def table(records: list[Record]) -> str:
    """One line a case and implementation: time, rate, limit, speed-ups, memory, error."""
    head = ("case", "model", "dtype", "batch", "rows", "keys", "impl", "ms", "± %", "p95", "p99", "TFLOP/s", "TB/s")
    lines: list[tuple[str, ...]] = [
        (*head, "% of floor", "vs xla", "vs torch", "peak MB", "less memory", "error (limit)")
    ]
    for r in sorted(records, key=lambda r: (r["model"], r["case"], r["batch"], r["context"])):
        start = tuple(str(r[k]) for k in ("case", "model", "dtype", "batch", "seq", "context", "impl"))
        if r["value"] is None:
            lines.append((*start, r["why"]))
            continue
        stats, seconds = r["stats"], r["value"] / 1e3
        times = (
            f"{r['value']:.4f}",
            f"{100 * stats['std'] / stats['mean']:.1f}",
            f"{stats['p95']:.4f}",
            f"{stats['p99']:.4f}",
        )
        rates = (f"{r['work']['flops'] / seconds / 1e12:.2f}", f"{r['work']['bytes'] / seconds / 1e12:.3f}")
        ups = tuple(f"{r['speedup'][b]:.2f}" if b in r["speedup"] else "" for b in ("xla", "torch"))
        memory = f"{r['peak_bytes'] / 1e6:,.1f}" if "peak_bytes" in r else ""
        less = f"{r['memory_reduction']:.1f}x" if "memory_reduction" in r else ""
        error = f"{r['error_vs_reference']:.1e} ({r['tolerance']:.0e})"
        lines.append((*start, *times, *rates, f"{100 * r['floor'] / r['value']:.0f}", *ups, memory, less, error))
    return align(lines)


def _plot(settings: argparse.Namespace, records: list[Record]) -> None:
    if settings.plots == "-":
        return
    from bench import plots

    if (why := plots.unavailable()) is not None:
        say(f"no plots: {why}")
        return
    folder = Path(settings.plots) if settings.plots else (settings.results or RESULTS) / "plots"
    for path in plots.ops_plots(records, folder):
        print(f"plot: {path}")

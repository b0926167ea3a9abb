"""Runs `bench.ops` once its arguments are parsed."""

import argparse
import importlib
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench import opcases
from bench.entries import say
from bench.measure import stats_dict
from bench.models import cache_folder
from bench.names import is_ours
from bench.opcases import Case
from bench.process import Budget, PeerFailed, PeerUnsupported, Worker
from bench.record import RESULTS, Record, Run, append, start_run
from bench.roofline import floor_s, of_dict
from bench.rows import align
from bench.served import Served, implementations

ROUNDS = (False, True, False, True)  # of a case: whether an implementation has the device for itself


def run(settings: argparse.Namespace) -> int:
    """Run every operation in every dtype. All implementations run a case before the next case begins, so compared
    figures are measured within seconds, and a budget cuts off whole cases. Returns 1 if one of our backends failed."""
    settings.clock = Budget(settings.budget)
    records: list[Record] = []
    with (
        Worker("op_ours") as reference,
        tempfile.TemporaryDirectory(prefix="bench-ops-") as folder,
        ExitStack() as processes,
    ):
        reference.ask("open", 120, job={"backend": "xla", "compiled": str(cache_folder(None) / "compiled")})
        hello = reference.ask("hello", 120, args={})
        gpu = hello["platform"] == "gpu"
        seqs = settings.seq or ([512, 1024, 2048, 4096] if gpu else [128, 256])
        served = implementations(settings, hello["platform"])
        for implementation in served:
            processes.callback(implementation.close)
        for dtype in settings.dtype or ["bf16" if gpu else "f32"]:
            cases = [
                case | {"folder": folder}
                for model in settings.model.split(",")
                for op, own in settings.op
                for case in opcases.cases(
                    op,
                    model,
                    model_sizes(model),
                    dtype,
                    settings.batch,
                    own or (opcases.VOCABULARIES if op == "draw" else seqs),
                )
                if op in ("ffn", "matmul") or dtype not in ("int8", "int4")  # attention has no weights
            ]
            ceilings = reference.ask("ceilings", 300, args={"dtype": dtype, "working_set": 0})
            started = start_run(hello["device"], hello["versions"], ceilings)
            say(f"{hello['device']}, {dtype}: {len(cases)} cases, run {started.run}")
            made: list[Record] = []
            for case in cases:
                replies = side_by_side(settings, reference, served, case, Path(folder) / f"expected-{len(made)}.npy")
                one = [_record(started, s.impl, case, r, s.versions) for s, r in zip(served, replies, strict=True)]
                one = compared(one)
                append((settings.results or RESULTS) / "ops.jsonl", one)
                made += one
            print(table(made))
            records += made
    _plot(settings, records)
    return int(any(is_ours(r["impl"]) and r.get("failed") for r in records))


def side_by_side(
    settings: argparse.Namespace, reference: Worker, served: list[Served], case: Case, path: Path
) -> list[dict[str, Any]]:
    """The result of a case for each implementation. All of them and the reference prepare at the same time, because
    compiling takes most of the time. They are timed one after the other."""
    for implementation in served:
        implementation.begin(settings, case, path)
    with ThreadPoolExecutor(len(served) + 1) as pool:
        expected = pool.submit(_expect, settings, reference, case, path)
        for number, alone in enumerate(ROUNDS):
            list((map if alone else pool.map)(Served.go_on, served))
            if number == 0 and (why := expected.result()) is not None:
                for implementation in served:
                    implementation.give_up(why)
    path.unlink(missing_ok=True)
    return [implementation.reply for implementation in served]


def model_sizes(model: str) -> dict[str, Any]:
    """The sizes for `opcases.cases`: from the ops' CASES where they name the model, else from its preset."""
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


def _expect(settings: argparse.Namespace, reference: Worker, case: Case, path: Path) -> str | None:
    """Have the reference write its result to ``path``. Returns why there is none, else None."""
    try:
        settings.clock.check()
        reference.ask("expect", settings.time_limit, args={"case": case, "path": str(path)})
    except PeerUnsupported as error:
        return str(error)
    except PeerFailed as error:
        say(f"reference of {case['name']} at {case['context']}: {error}")
        return "the reference failed"
    return None


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
    """The records, with the speed-up over the XLA reference and over PyTorch on the same case."""

    def of(record: Record, impl: str) -> float | None:
        same = ("case", "model", "dtype", "batch", "seq", "context")
        found = [r["value"] for r in records if r["impl"] == impl and all(r[k] == record[k] for k in same)]
        return found[0] / record["value"] if found and found[0] and record["value"] else None

    return [r | {"speedup": {base: s for base in ("xla", "torch") if (s := of(r, base)) is not None}} for r in records]


def table(records: list[Record]) -> str:
    """One line per case and implementation: time, rates, percent of the floor, speed-ups, memory, error."""
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

"""Makes records from measurements, and the terminal's table from records."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.measure import stats_dict
from bench.meshes import Shape
from bench.record import Record, Run
from bench.roofline import Work, floor_s, of_dict
from bench.workloads import SAMPLING, Workload


def records_of(
    entry: Any,
    loads: Sequence[Workload],
    run: Run,
    model: str,
    dtype: str,
    dims: Mapping[str, int],
    shape: Shape | None = None,
) -> list[Record]:
    """All records of one implementation: a figure or a reason for every workload, and the time to open it. With a
    ``shape``, they name the mesh."""
    dtype = entry.dtype or dtype
    stored = {"int4": "int4-g128"}.get(dtype, dtype)
    versions = {**run.versions, **entry.opened.get("versions", {})}
    out = []
    for load in loads:
        outcome = entry.outcomes.get(load, {})
        base: dict[str, Any] = dict(
            suite="mesh" if shape else "compare",
            case=load.case,
            impl=entry.impl,
            model=model,
            dtype=stored,
            batch=load.batch,
        )
        base |= dict(tp=shape.tp, dp=shape.dp, devices=shape.devices) if shape else {}
        base |= dict(seq=load.prompt_len, context=load.context, new_tokens=load.new_tokens)
        base |= {"sampling": SAMPLING} if load.sampled else {}
        floor = run_floor(run, load, dtype, dims, shape)
        base["work"] = work_of(load, dtype, dims, shape)
        if not outcome.get("runs"):
            why = outcome.get("why") or entry.why or "not run"
            failed = bool(outcome.get("failed", entry.failed))
            nothing = dict(metric="tokens_per_s", value=None, samples=[], floor=floor, why=why, failed=failed)
            out.append(run.record(**base, **nothing) | {"versions": versions})
            continue
        more = {
            "versions": versions,
            "agreement": outcome["check"].get("agreement"),
            "backend_per_op": outcome.get("choices", {}),
        }
        if settings := entry.opened.get("settings"):
            more["settings"] = settings
        if any(r.get("idle") is not None for r in outcome["runs"]):
            more["idle_before"] = [r["idle"] for r in outcome["runs"]]  # idle fraction of all CPUs before each run
        made = _figures(load, outcome, floor, first=load is loads[0], entry=entry)
        for case, metric, samples, limit in made:
            stats = stats_dict(samples)
            value = statistics.median(samples)
            fields = base | dict(case=case, metric=metric, value=value, samples=samples, floor=limit, stats=stats)
            out.append(run.record(**fields) | more)
    return out


def work_of(load: Workload, dtype: str, dims: Mapping[str, int], shape: Shape | None = None) -> dict[str, float]:
    """Bytes and flops of a decode step or a prefill on one device, and the tokens that all devices produce or
    consume."""
    prefill = load.case == "prefill"
    length, tokens = (load.prompt_len, load.batch * load.prompt_len) if prefill else (load.mean_context, load.batch)
    work = (shape or Shape()).work(load.case, dims, dtype, load.batch, length)
    return {"bytes": work.bytes, "flops": work.flops, "tokens": tokens}


def run_floor(run: Run, load: Workload, dtype: str, dims: Mapping[str, int], shape: Shape | None = None) -> float:
    """The most tokens/s that the ceilings of this run allow on each of its devices."""
    work = work_of(load, dtype, dims, shape)
    return work["tokens"] / floor_s(Work(work["bytes"], work["flops"]), of_dict(run.ceilings), dtype)


def _figures(
    load: Workload, outcome: Mapping[str, Any], floor: float, *, first: bool, entry: Any
) -> Iterable[tuple[str, str, list[float], float | None]]:
    runs, cold = outcome["runs"], outcome["cold"]
    ttft = [r["first_s"] for r in runs]
    if load.case == "prefill":
        speeds = [load.batch * load.prompt_len / t for t in ttft]
    else:
        steps = [r["steps"] or len(r["ids"][0]) - 1 for r in runs]
        speeds = [load.batch * n / r["decode_s"] for n, r in zip(steps, runs, strict=True)]
    yield load.case, "tokens_per_s", speeds, floor
    if load.sampled:  # the greedy workload has the other figures
        return
    yield "ttft-warm", "s", ttft, None
    if outcome["warm"].get("peak_bytes"):  # 0: the devices belong to other processes, those of vLLM on several GPUs
        yield "memory", "bytes_peak", [outcome["warm"]["peak_bytes"]], None
    warm_s = statistics.median([r["first_s"] + r["decode_s"] for r in runs])
    yield "compile", "s", [max(cold["first_s"] + cold["decode_s"] - warm_s, 1e-6)], None
    if first and "load_s" in entry.opened:
        yield "load", "s", [entry.opened["load_s"]], None
        yield "ttft-cold", "s", [entry.opened["load_s"] + cold["first_s"]], None


def table(records: Sequence[Record]) -> str:
    """The terminal's table: one line per workload and implementation, with the percent of the floor, or why there is no
    figure."""
    head = (
        "case",
        "model",
        "dtype",
        "batch",
        "prompt",
        "impl",
        "tokens/s",
        "± %",
        "% of floor",
        "ttft s",
        "peak MB",
    )
    lines: list[tuple[str, ...]] = [head]
    for r in records:
        if r["metric"] != "tokens_per_s":
            continue
        mesh = f", {Shape(r['tp'], r['dp']).name}" if "tp" in r else ""
        start = (r["case"], r["model"] + mesh, r["dtype"], str(r["batch"]), str(r["seq"]), r["impl"])
        if r["value"] is None:
            lines.append((*start, r["why"]))
            continue
        alike = ("impl", "dtype", "tp", "dp", "batch", "seq")
        others = {o["case"]: o["value"] for o in records if all(o.get(k) == r.get(k) for k in alike)}
        noise = 100 * r["stats"]["std"] / r["stats"]["mean"]
        figures = (f"{r['value']:,.1f}", f"{noise:.1f}", f"{100 * r['value'] / r['floor']:.0f}")
        first, held = others.get("ttft-warm"), others.get("memory")
        more = ("" if first is None else f"{first:.4f}", "" if held is None else f"{held / 1e6:,.0f}")
        lines.append((*start, *figures, *more))
    return align(lines)


def align(lines: Sequence[Sequence[str]]) -> str:
    """Align columns to their widest cell. The last cell of a line with fewer cells may be longer."""
    full = [line for line in lines if len(line) == len(lines[0])]
    widths = [max(len(line[i]) for line in full) for i in range(len(lines[0]))]
    rows = []
    for line in lines:
        cells = [cell.ljust(w) for cell, w in zip(line, widths, strict=False)]
        if len(line) < len(lines[0]):
            cells[-1] = line[-1]
        rows.append("  ".join(cells).rstrip())
    return "\n".join(rows)

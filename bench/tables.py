"""The Markdown tables that `bench.report` writes, by name."""

from collections.abc import Callable, Sequence

from bench import scaling
from bench.beside import beside
from bench.choice import NEWEST, grouped, latest, newest
from bench.glance import glance
from bench.mixed import mixed
from bench.names import (
    age_of,
    commit_of,
    cores,
    is_cpu,
    is_ours,
    markdown,
    model_name,
    name_of,
    short,
    versions_of,
)
from bench.record import HIGHER_IS_BETTER, RESULTS, Record

GROUP = ("device", "model", "dtype", "context", "batch", "seq")

# Figures that other projects publish: source, hardware, model, figure; and the case, model and metric of our figure to
# compare. Their hardware is not ours, so the table names the device of every figure.
LENGTHS = range(512, 4096 + 1)  # lengths that the published figures of operations cover
PUBLISHED: tuple[tuple[str, str, str, str, tuple[str, str, str]], ...] = (
    ("llama2.c, one CPU core", "one CPU core", "7B", "0.27 tokens/s", ("decode", "7b", "tokens_per_s")),
    ("llama2.c with CUDA", "not named", "7B", "4.19 tokens/s", ("decode", "7b", "tokens_per_s")),
    ("FlashAttention + GEMV kernels", "not named", "7B", "35.57 tokens/s", ("decode", "7b", "tokens_per_s")),
    ("vLLM", "A100", "7B", "78.74 to 88.45 tokens/s", ("decode", "7b", "tokens_per_s")),
    (
        "attention kernel over PyTorch",
        "RTX 3090",
        "512 to 4096",
        "1.33 to 1.80 times",
        ("attention-prefill", "7b", "ms"),
    ),
    ("feed-forward kernel over PyTorch", "RTX 3090", "512 to 4096", "1.51 to 1.68 times", ("ffn", "7b", "ms")),
)


def _speeds(records: Sequence[Record], case: str, keep: Callable[[Record], bool]) -> str:
    """Tokens/s: one row per implementation and run, the newest run of a workload first."""
    chosen = [r for r in records if r["suite"] == "compare" and r["case"] == case and keep(r)]
    chosen = [r for r in chosen if r["metric"] == "tokens_per_s" and r["value"] is not None]
    head = ("on", "model", "dtype", "batch", "prompt", "implementation", "tokens/s", "range", "% of floor")
    rows = []
    chosen = [r for group in newest(chosen) for r in group]
    for group in sorted(grouped(chosen, (*GROUP, "run")), key=lambda g: [g[0][k] for k in GROUP]):
        for r in sorted(group, key=lambda r: -r["value"]):
            agreed = "not checked" if r.get("agreement") is None else f"{100 * r['agreement']:.0f} %"
            start = (
                cores(r["device"]),
                model_name(r["model"]),
                r["dtype"],
                str(r["batch"]),
                str(r["seq"]),
                name_of(r["impl"]),
            )
            between = f"{short(min(r['samples']))} to {short(max(r['samples']))}"
            rows.append((*start, short(r["value"]), between, _share(r), agreed, age_of(r)))
    return markdown((*head, "tokens agree", "measured"), rows) + _where(chosen)


def _share(r: Record) -> str:
    """How much of its floor a rate reaches, in percent; empty where no ceiling was measured."""
    return "" if not r["floor"] else f"{100 * r['value'] / r['floor']:.0f}"


def _where(records: Sequence[Record]) -> str:
    """The lines under a table: device, versions, ceilings and load of each run."""
    lines = []
    for group in latest(records, (*NEWEST, "run")):
        r = group[0]
        parts = [r["device"], *versions_of(group, "jax", "torch", "transformers", "tokamax")]
        if c := r.get("ceilings"):
            rates = (f"{name} {c[name] / 1e9:,.0f} GB/s" for name in ("copy", "read", "stream") if name in c)
            parts.append(f"ceilings: {', '.join(rates)}")
            parts.append(f"{c['matrix'] / 1e12:,.2f} TFLOP/s")
            if "launch" in c:  # imported ceilings have no latencies
                parts.append(f"a launch {c['launch'] * 1e6:,.1f} us, one kernel of many {c['kernel'] * 1e6:,.1f} us")
        if is_cpu(r) and r.get("load_average"):
            parts.append(f"load average {r['load_average'][0]:.1f} at its start")
        parts += [r["note"]] if "note" in r else []
        lines.append(f"<sub>{model_name(r['model'])} {r['dtype']}: {', '.join(parts)}; run `{r['run']}`.</sub><br>")
    return "\n\n" + "\n".join(dict.fromkeys(lines)) if lines else ""


def _startup(records: Sequence[Record]) -> str:
    """Load time, compile time, time to first token, and memory."""
    wanted = {
        "load": "load s",
        "compile": "compile s",
        "ttft-cold": "first token cold s",
        "ttft-warm": "warm s",
        "memory": "peak MB",
    }
    chosen = [r for r in records if r["suite"] == "compare" and r["value"] is not None and r["case"] in wanted]
    chosen = [r for group in newest(chosen) for r in group]
    found = {(*(r[k] for k in GROUP), r["impl"], r["case"]): r for r in reversed(chosen)}  # the newest run last
    rows = []
    for *workload, impl in sorted({key[:-1] for key in found}):
        mine = {case: found.get((*workload, impl, case)) for case in wanted}
        one = next(r for r in mine.values() if r)
        cells = ["" if r is None else _seconds_or_mb(r) for r in mine.values()]
        sizes = (one["device"], model_name(one["model"]), one["dtype"], str(one["batch"]), str(one["seq"]))
        rows.append((*sizes, name_of(impl), *cells, commit_of(one)))
    head = ("device", "model", "dtype", "batch", "prompt", "implementation")
    return markdown((*head, *wanted.values(), "commit"), rows)


def _seconds_or_mb(r: Record) -> str:
    return f"{r['value'] / 1e6:,.0f}" if r["case"] == "memory" else f"{r['value']:.3f}"


def _ops(records: Sequence[Record], *cases: str) -> str:
    """Operations: one row per size and implementation, the fastest of each run first."""
    chosen = [r for r in records if r["suite"] == "ops" and r["case"].startswith(cases) and r["value"] is not None]
    head = ("device", "case", "dtype", "batch", "rows", "keys", "implementation", "ms", "p95", "TFLOP/s", "TB/s")
    rows = []
    chosen = [r for group in latest(chosen, ("device", "model", "case", "dtype")) for r in group]
    keys = ("device", "case", "model", "dtype", "batch", "seq", "context", "metric")
    for group in sorted(latest(chosen, keys), key=lambda g: [g[0][k] for k in keys]):
        for r in sorted(group, key=lambda r: -r["value"] if r["metric"] in HIGHER_IS_BETTER else r["value"]):
            more = [f"{r['kv_heads']} key heads"] if "kv_heads" in r else []
            more += [f"{r['timing']} timing"] if "timing" in r else []  # the way of timing, if recorded
            case = ", ".join([f"{r['model']} {r['case']}", *more])
            sizes = tuple(str(r[k]) for k in ("batch", "seq", "context"))
            ups = tuple(f"{r['speedup'][b]:.2f}" if b in r.get("speedup", {}) else "" for b in ("xla", "torch"))
            less = f"{r['memory_reduction']:.1f}" if "memory_reduction" in r else ""
            cells = (r["device"], case, r["dtype"], *sizes, name_of(r["impl"]), *_rates(r), *ups, less)
            rows.append((*cells, commit_of(r)))
    return markdown((*head, "% of floor", "x XLA", "x PyTorch", "less memory, times", "commit"), rows) + _where(chosen)


def _rates(r: Record) -> tuple[str, ...]:
    """Milliseconds, p95, TFLOP/s, TB/s and percent of the floor. A record of a rate has only the rate and the floor."""
    percent = "" if not r["floor"] else f"{100 * r['floor'] / r['value']:.0f}"
    if r["metric"] == "ms":
        work, p95 = r.get("work"), r.get("stats", {}).get("p95")
        made = tuple(f"{work[k] / r['value'] / 1e9:,.3g}" for k in ("flops", "bytes")) if work else ("", "")
        return (f"{r['value']:.4f}", "" if p95 is None else f"{p95:.4f}", *made, percent)
    percent = _share(r)
    tflops, tbs = (f"{r['value']:,.3g}" if r["metric"] == m else "" for m in ("tflops", "tb_per_s"))
    return "", "", tflops, tbs, percent


def _published(records: Sequence[Record]) -> str:
    """The figures that others publish, of one device, beside our best one, each with its hardware."""
    rows = []
    for source, hardware, size, figure, (case, model, metric) in PUBLISHED:
        ours = [
            r for r in records if r["case"] == case and r["model"] == model and r["metric"] == metric and r["value"]
        ]
        ours = [r for r in ours if is_ours(r["impl"]) and r["batch"] == 1 and not is_cpu(r) and r["suite"] != "mesh"]
        rows.append((source, hardware, size, figure, *_best(ours, metric)))
    return markdown(("published by", "on", "size", "their figure", "ours", "on", "commit"), rows)


def _best(ours: Sequence[Record], metric: str) -> tuple[str, str, str]:
    if metric == "ms":
        ours = [r for r in ours if r["impl"] == "pallas" and "torch" in r.get("speedup", {}) and r["seq"] in LENGTHS]
        if not ours:
            return "not measured yet", "", ""
        # The device of the newest record, and the newest run of each length.
        device = max(ours, key=lambda r: r["when"])["device"]
        ours = [r for g in latest(ours, ("context", "dtype")) for r in g if r["device"] == device]
        low, high = (f"{pick(r['speedup']['torch'] for r in ours):.2f}" for pick in (min, max))
        lengths = sorted({r["seq"] for r in ours})
        at = " to ".join(str(n) for n in sorted({lengths[0], lengths[-1]}))
        return f"{low if low == high else f'{low} to {high}'} times, at {at}", device, commit_of(ours[-1])
    ours = [r for group in latest(ours, ("device", "dtype", "seq", "context")) for r in group]
    if not ours:
        return "not measured yet", "", ""
    best = max((r for r in ours if r["dtype"] in ("bf16", "f16")), key=lambda r: r["value"], default=None)
    best = best or max(ours, key=lambda r: r["value"])
    return f"{best['value']:,.0f} tokens/s ({best['dtype']}, {best['impl']})", best["device"], commit_of(best)


def _charts(*patterns: str) -> str:
    """Links to the charts that match ``patterns``. `bench.report` makes their paths relative to the page."""
    found = [p for pattern in patterns for p in sorted((RESULTS / "plots").glob(f"{pattern}.png"))]
    return "\n".join(f"![{p.stem.replace('-', ' ')}](plots/{p.name})" for p in found)


Table = Callable[[Sequence[Record]], str]
TABLES: dict[str, Table] = {
    "glance-cpu": lambda records: glance(records, is_cpu),
    "glance-gpu": beside,
    "chart-decode-gpu": lambda _: _charts("rows-7b-bf16-h*") or _charts("decode-7b-bf16-h*"),
    "charts-models-gpu": lambda _: _charts("rows-*", "decode-*-h[0-9]*", "prefill-*-h[0-9]*"),
    "charts-models-cpu": lambda _: _charts("decode-*-cpu-*"),
    "charts-roofline": lambda _: _charts("roofline-[!o]*"),
    "charts-ops-gpu": lambda _: _charts("roofline-ops-*-h[0-9]*", "speedup-*-h[0-9]*"),
    "decode-cpu": lambda records: _speeds(records, "decode", is_cpu),
    "decode-gpu": lambda records: _speeds(records, "decode", lambda r: not is_cpu(r)),
    "prefill-cpu": lambda records: _speeds(records, "prefill", is_cpu),
    "prefill-gpu": lambda records: _speeds(records, "prefill", lambda r: not is_cpu(r)),
    "mesh": scaling.table,
    "charts-mesh": lambda _: _charts("mesh-*"),
    "sampled": lambda records: _speeds(records, "sampled", lambda _: True),
    "startup": _startup,
    "traffic": mixed,
    "charts-kernels": lambda _: _charts("kernels-*"),
    "ops-attention": lambda records: _ops(records, "attention", "decode-attention", "paged-decode-attention"),
    "ops-ffn": lambda records: _ops(records, "ffn", "layer"),
    "ops-matmul": lambda records: _ops(records, "matmul"),
    "published": _published,
}

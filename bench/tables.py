"""The Markdown tables that `bench.report` writes, by name."""

from collections.abc import Callable, Iterable, Sequence

from bench.record import Record

NONE = "*nothing recorded yet*"
NAMES = {
    "xla": "**jllama, XLA**",
    "pallas": "**jllama, Pallas kernels**",
    "auto": "**jllama, auto**",
    "hf-eager": "HF transformers, eager",
    "hf-compile": "HF transformers, static cache + compile",
    "torch-graph": "plain PyTorch (CUDA graph on a GPU)",
    "llama2.c": "llama2.c, all cores",
    "llama2.c-1t": "llama2.c, one thread",
    "cudnn": "cuDNN (`jax.nn`)",
    "torch": "PyTorch",
    "tokamax": "tokamax",
    "jax-example": "JAX's example kernel",
}
GROUP = ("device", "model", "dtype", "batch", "seq", "context")

# What other projects publish about themselves: source, hardware, model, figure, unit; and the case, model and rows of
# ours that answers it. No hardware of theirs is ours: the device of every figure is named.
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


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; figures to the right."""
    rows = list(rows)
    if not rows:
        return NONE
    left = {i for i in range(len(head)) if not rows[0][i].replace(",", "").replace(".", "").isdigit()}
    lines = [
        "| " + " | ".join(head) + " |",
        "|" + "|".join("---" if i in left else "---:" for i in range(len(head))) + "|",
    ]
    return "\n".join(lines + ["| " + " | ".join(r) + " |" for r in rows])


def latest(records: Sequence[Record], keys: Sequence[str]) -> list[list[Record]]:
    """Records in groups of equal ``keys``, of each group only its newest run: what stands together ran together."""
    groups: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record[k] for k in keys), []).append(record)
    newest = {key: max(rows, key=lambda r: r["when"])["run"] for key, rows in groups.items()}
    return [[r for r in rows if r["run"] == newest[key]] for key, rows in groups.items()]


def is_cpu(record: Record) -> bool:
    """Devices of jax's CPU platform carry the number of cores in their name."""
    return record["device"].endswith("cores")


def name_of(impl: str) -> str:
    """What a reader calls it."""
    return NAMES.get(impl, impl)


def commit_of(record: Record) -> str:
    """The commit, and whether code had changed since."""
    return f"`{record['commit']}`" + (" + changes" if record["dirty"] else "")


def _speeds(records: Sequence[Record], case: str, keep: Callable[[Record], bool]) -> str:
    """Tokens/s: a row an implementation, in the groups that ran side by side."""
    chosen = [r for r in records if r["suite"] == "compare" and r["case"] == case and keep(r)]
    chosen = [r for r in chosen if r["metric"] == "tokens_per_s" and r["value"] is not None]
    head = (
        "model",
        "dtype",
        "batch",
        "prompt",
        "implementation",
        "tokens/s",
        "range",
        "% of floor",
        "tokens agree",
        "commit",
    )
    rows = []
    for group in sorted(
        latest(chosen, GROUP), key=lambda g: (g[0]["device"], g[0]["model"], g[0]["batch"], g[0]["seq"])
    ):
        for r in sorted(group, key=lambda r: -r["value"]):
            agreed = "not checked" if r.get("agreement") is None else f"{100 * r['agreement']:.0f} %"
            start = (r["model"], r["dtype"], str(r["batch"]), str(r["seq"]), name_of(r["impl"]))
            between = f"{_short(min(r['samples']))} to {_short(max(r['samples']))}"
            rows.append(
                (*start, _short(r["value"]), between, f"{100 * r['value'] / r['floor']:.0f}", agreed, commit_of(r))
            )
    return markdown(head, rows) + _where(chosen)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _where(records: Sequence[Record]) -> str:
    """Under a table: devices, ceilings and load of the newest run of each."""
    lines = []
    for group in latest(records, ("device", "model", "dtype")):
        r, c = group[0], group[0]["ceilings"]
        versions: dict[str, str] = {}
        for record in group:
            versions |= record["versions"]
        shown = ", ".join(f"{n} {versions[n]}" for n in ("jax", "torch", "transformers", "tokamax") if n in versions)
        measured = (
            f"copy {c['copy'] / 1e9:,.0f} GB/s, read {c['read'] / 1e9:,.0f} GB/s, {c['matrix'] / 1e12:,.2f} TFLOP/s"
        )
        load = f", load average {r['load_average'][0]:.1f} at its start" if is_cpu(r) and r["load_average"] else ""
        lines.append(
            f"{r['model']} {r['dtype']}: {r['device']}; {shown}; ceilings: {measured}{load}; run `{r['run']}`."
        )
    return "\n\n" + "\n".join(f"<sub>{line}</sub><br>" for line in dict.fromkeys(lines)) if lines else ""


def _startup(records: Sequence[Record]) -> str:
    """Load, first token and memory."""
    wanted = {
        "load": "load s",
        "compile": "compile s",
        "ttft-cold": "first token cold s",
        "ttft-warm": "warm s",
        "memory": "peak MB",
    }
    chosen = [r for r in records if r["suite"] == "compare" and r["value"] is not None and r["case"] in wanted]
    rows = []
    for group in latest(chosen, ("device", "model", "dtype")):
        first = min((r["batch"], r["seq"], r["context"]) for r in group)
        for impl in dict.fromkeys(r["impl"] for r in group):
            mine = [r for r in group if r["impl"] == impl and (r["batch"], r["seq"], r["context"]) == first]
            values = {r["case"]: r["value"] for r in mine}
            if not mine:
                continue
            cells = [
                f"{values[c] / 1e6:,.0f}" if c == "memory" else f"{values[c]:.3f}" if c in values else ""
                for c in wanted
            ]
            rows.append(
                (mine[0]["device"], mine[0]["model"], mine[0]["dtype"], name_of(impl), *cells, commit_of(mine[0]))
            )
    return markdown(("device", "model", "dtype", "implementation", *wanted.values(), "commit"), rows)


def _ops(records: Sequence[Record], *cases: str) -> str:
    """An operation: a row a size, a column an implementation."""
    chosen = [r for r in records if r["suite"] == "ops" and r["case"].startswith(cases) and r["value"] is not None]
    head = (
        "device",
        "case",
        "dtype",
        "batch",
        "rows",
        "keys",
        "implementation",
        "ms",
        "p95",
        "TFLOP/s",
        "TB/s",
        "% of floor",
    )
    rows = []
    keys = ("device", "case", "model", "dtype", "batch", "seq", "context")
    for group in sorted(latest(chosen, keys), key=lambda g: [g[0][k] for k in keys]):
        for r in sorted(group, key=lambda r: r["value"]):
            seconds, stats, work = r["value"] / 1e3, r["stats"], r["work"]
            start = (
                r["device"],
                f"{r['model']} {r['case']}",
                r["dtype"],
                str(r["batch"]),
                str(r["seq"]),
                str(r["context"]),
            )
            rates = (f"{work['flops'] / seconds / 1e12:,.2f}", f"{work['bytes'] / seconds / 1e12:,.3f}")
            ups = tuple(f"{r['speedup'][b]:.2f}" if b in r["speedup"] else "" for b in ("xla", "torch"))
            less = f"{r['memory_reduction']:.1f}" if "memory_reduction" in r else ""
            limit = f"{100 * r['floor'] / r['value']:.0f}"
            times = (f"{r['value']:.4f}", f"{stats['p95']:.4f}")
            rows.append((*start, name_of(r["impl"]), *times, *rates, limit, *ups, less, commit_of(r)))
    return markdown((*head, "x XLA", "x PyTorch", "less memory, times", "commit"), rows) + _where(chosen)


def _published(records: Sequence[Record]) -> str:
    """What others publish, beside the best of ours, each with its hardware."""
    rows = []
    for source, hardware, size, figure, (case, model, metric) in PUBLISHED:
        ours = [
            r for r in records if r["case"] == case and r["model"] == model and r["metric"] == metric and r["value"]
        ]
        ours = [r for r in ours if r["impl"] in ("xla", "pallas", "auto") and r["batch"] == 1 and not is_cpu(r)]
        rows.append((source, hardware, size, figure, *_best(ours, metric)))
    return markdown(("published by", "on", "size", "their figure", "ours", "on", "commit"), rows)


def _best(ours: Sequence[Record], metric: str) -> tuple[str, str, str]:
    if metric == "ms":
        ours = [
            r
            for group in latest(ours, ("device", "context", "dtype"))
            for r in group
            if "torch" in r.get("speedup", {})
        ]
        ups = [r["speedup"]["torch"] for r in ours if r["impl"] == "pallas"]
        if not ups:
            return "not measured yet", "", ""
        return f"{min(ups):.2f} to {max(ups):.2f} times", ours[-1]["device"], commit_of(ours[-1])
    ours = [r for group in latest(ours, ("device", "dtype", "seq", "context")) for r in group]
    if not ours:
        return "not measured yet", "", ""
    best = max((r for r in ours if r["dtype"] in ("bf16", "f16")), key=lambda r: r["value"], default=None)
    best = best or max(ours, key=lambda r: r["value"])
    return f"{best['value']:,.0f} tokens/s ({best['dtype']}, {best['impl']})", best["device"], commit_of(best)


Table = Callable[[Sequence[Record]], str]
TABLES: dict[str, Table] = {
    "decode-cpu": lambda records: _speeds(records, "decode", is_cpu),
    "decode-gpu": lambda records: _speeds(records, "decode", lambda r: not is_cpu(r)),
    "prefill-cpu": lambda records: _speeds(records, "prefill", is_cpu),
    "prefill-gpu": lambda records: _speeds(records, "prefill", lambda r: not is_cpu(r)),
    "startup": _startup,
    "ops-attention": lambda records: _ops(records, "attention", "decode-attention"),
    "ops-ffn": lambda records: _ops(records, "ffn", "layer"),
    "ops-matmul": lambda records: _ops(records, "matmul"),
    "published": _published,
}

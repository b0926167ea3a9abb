"""The summary table: one row per implementation, one column per workload."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from bench.choice import newest
from bench.names import (
    CHECKED,
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
from bench.record import Record

Column = tuple[Any, ...]  # the fields that decide a record's column
COLUMN = ("device", "model", "case", "batch", "seq", "context")


def glance(records: Sequence[Record], keep: Callable[[Record], bool]) -> str:
    """Tokens/s of the newest runs of every device, model and dtype, with the percent of the floor in brackets."""
    chosen = [r for r in records if r["suite"] == "compare" and r["case"] in CHECKED and keep(r)]
    chosen = [r for group in newest(chosen) for r in group]
    columns = _columns(chosen)
    cells = {(_row(r), _column(r)): r for r in reversed(chosen)}  # the newest run last
    rows = sorted({_row(r) for r in chosen}, key=lambda row: _rank(row, columns, cells))
    dtypes = {dtype for _, dtype in rows}
    best = {c: max(r["value"] for r in chosen if _column(r) == c) for c in columns}
    lines = []
    for impl, dtype in rows:
        of_row = [cells.get(((impl, dtype), column)) for column in columns]
        name = name_of(impl) if len(dtypes) == 1 else f"{name_of(impl)}, {dtype}"
        lines.append([name, *(_cell(r, best) for r in of_row)])
    return markdown(("tokens/s (% of floor)", *_heads(columns, chosen)), lines, right=range(1, 99)) + _foot(chosen)


def _row(r: Record) -> tuple[str, str]:
    return r["impl"], r["dtype"]


def _column(r: Record) -> Column:
    return tuple(r[k] for k in COLUMN)


def _columns(records: Sequence[Record]) -> list[Column]:
    """The order of columns: the model with the most workloads, then larger models; decode before prefill; small batches
    before large ones."""
    workloads = Counter(model for _, model, *_ in {_column(r) for r in records})

    def order(r: Record) -> tuple[Any, ...]:
        size = r.get("work", {}).get("bytes", 0) / (r["batch"] if r["case"] == "prefill" else 1)
        model = max((o.get("work", {}).get("bytes", 0) for o in records if o["model"] == r["model"]), default=size)
        return (
            -workloads[r["model"]],
            -model,
            r["model"],
            r["device"],
            r["case"],
            r["context"] > 1024,
            r["batch"],
            r["seq"],
            r["context"],
        )

    return list(dict.fromkeys(_column(r) for r in sorted(records, key=order)))


def _rank(row: tuple[str, str], columns: Sequence[Column], cells: dict[Any, Record]) -> tuple[Any, ...]:
    """The order of rows: the fastest first, by the first column in which a row has a figure."""
    for number, column in enumerate(columns):
        if found := cells.get((row, column)):
            return number, -found["value"]
    return len(columns), 0.0


def _heads(columns: Sequence[Column], records: Sequence[Record]) -> list[str]:
    """The name of a column. It leaves out what all columns have in common."""
    named: list[dict[str, Any]] = [dict(zip(COLUMN, c, strict=True)) for c in columns]
    several = {k for k in COLUMN if len({n[k] for n in named}) > 1}
    heads = []
    for n in named:
        parts = [model_name(n["model"])] if "model" in several else []
        parts += [cores(n["device"]) if is_cpu(n) else n["device"]] if "device" in several else []
        if n["case"] == "prefill":
            parts.append(f"prefill {n['seq']:,}")
        elif len(columns) == 1 or sum((m["device"], m["model"]) == (n["device"], n["model"]) for m in named) > 1:
            parts.append(f"batch {n['batch']}")
        alike = [m for m in named if all(m[k] == n[k] for k in ("device", "model", "case", "batch"))]
        if n["case"] == "decode" and len(alike) > 1 and n != min(alike, key=lambda m: m["context"]):
            parts.append(f"{n['context']:,} tokens")
        heads.append(", ".join(parts) or model_name(n["model"]))
    return heads


def _cell(r: Record | None, best: dict[Column, float]) -> str:
    if r is None:
        return ""
    figure = f"**{short(r['value'])}**" if r["value"] == best[_column(r)] else short(r["value"])
    return figure + (f" ({100 * r['value'] / r['floor']:.0f})" if r["floor"] else "")


def _foot(records: Sequence[Record]) -> str:
    """The devices, versions, runs and commits of the records."""
    if not records:
        return ""
    parts = [", ".join(sorted({r["device"].split(", ")[0] for r in records}))]
    parts.append(", ".join(versions_of(records, "jax", "torch", "transformers", "llama_cpp_python")))
    parts += [f"prompt of {p} tokens" for p in [_prompt(records)] if p]
    parts.append("runs " + ", ".join(f"`{r}`" for r in sorted({r["run"] for r in records})))
    ours = [r for r in records if is_ours(r["impl"])] or records
    parts.append("commit " + ", ".join(sorted({commit_of(r) for r in ours})))
    parts += sorted({r["note"] for r in records if "note" in r})
    return f"\n\n<sub>{'; '.join(parts)}.</sub>"


def _prompt(records: Sequence[Record]) -> str:
    lengths = sorted({r["seq"] for r in records if r["case"] == "decode" and r["context"] <= 1024})
    return " or ".join(str(n) for n in lengths)

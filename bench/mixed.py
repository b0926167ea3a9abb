"""The table of mixed traffic: what each engine or server reached under the same requests."""

from collections.abc import Sequence
from typing import Any

from bench.choice import Group, grouped
from bench.names import age_of, cores, markdown, model_name, name_of, short
from bench.record import Record

# The times of a text, by the end of a record's case, and how a column names them.
FIGURES = {"first": "to the first token", "between": "between tokens", "longest": "the longest wait of a text"}
TRAFFIC = ("device", "model", "dtype", "case", "batch")


def times(rate: Record, records: Sequence[Record]) -> list[str]:
    """The latencies of the run that reached this rate, each as "p50 / p99" in milliseconds; empty if not recorded."""
    mine = [r for r in records if r["suite"] == "traffic" and all(r[k] == rate[k] for k in ("run", "impl", "batch"))]
    found = {r["case"]: r for r in mine if r["value"] is not None}
    cells = []
    for figure in FIGURES:
        r = found.get(f"{rate['case']}, {figure}")
        cells.append("" if r is None else f"{1e3 * r['value']:.1f} / {1e3 * r['p99']:.1f}")
    return cells


def arrivals(traffic: dict[str, Any]) -> str:
    """When requests come."""
    return "at once" if traffic["rate"] is None else f"{traffic['rate']:.1f}"


def mixed(records: Sequence[Record]) -> str:
    """One row per traffic and implementation: see `_shown`."""
    rates = [r for r in records if r["suite"] == "traffic" and r["metric"] == "tokens_per_s" and r["value"] is not None]
    rows = []
    for group in sorted(grouped(rates, TRAFFIC), key=lambda g: [str(g[0][k]) for k in TRAFFIC]):
        for r in sorted(_shown(group), key=lambda r: -r["value"]):
            start = (cores(r["device"]), model_name(r["model"]), r["dtype"], r["case"], arrivals(r["traffic"]))
            sizes = str(r["traffic"]["requests"]), str(r["batch"])
            rows.append((*start, *sizes, name_of(r["impl"]), short(r["value"]), *times(r, records), age_of(r)))
    head = ("on", "model", "dtype", "traffic", "requests/s", "texts", "at a time", "implementation", "tokens/s")
    return markdown((*head, *(f"{name}, ms" for name in FIGURES.values()), "measured"), rows)


def _shown(group: Group) -> Group:
    """The run that held most implementations, the newest of several. Beside it, what was measured later without the
    others. Measured twice in a run, the second figure counts."""
    runs = [list({r["impl"]: r for r in run}.values()) for run in grouped(group, ("run",))]
    together = max(runs, key=lambda run: (len(run), run[0]["when"]))
    when = {r["impl"]: r["when"] for r in together}
    newest = {r["impl"]: r for r in sorted(group, key=lambda r: r["when"])}
    return [*together, *(r for impl, r in newest.items() if r["when"] > when.get(impl, ""))]

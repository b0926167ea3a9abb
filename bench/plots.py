"""Charts from records: tokens/s by implementation, speed-up against length, the roofline. PNG and SVG.

Every chart names the device and the versions, and draws the ceiling of the same run.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.record import Record

COLOURS = {"xla": "#1f77b4", "pallas": "#d62728", "auto": "#9467bd"}
OTHERS = ("#2ca02c", "#ff7f0e", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf", "#aec7e8")
MARKERS = "os^Dvp*hX<>"


def unavailable() -> str | None:
    """Why there can be no charts."""
    from importlib.util import find_spec

    return None if find_spec("matplotlib") else "matplotlib is not installed (pip install jllama[bench])"


def figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure that needs no display and leaves no state behind."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(fig)
    return fig, fig.add_subplot()


def save(fig: Any, folder: Path, name: str) -> list[Path]:
    """Write PNG and SVG, without the date, so that equal charts are equal files."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
    paths = [folder / f"{stem}.png", folder / f"{stem}.svg"]
    fig.savefig(paths[0], dpi=110, metadata={"Software": None})
    fig.savefig(paths[1], metadata={"Date": None})
    return paths


def label(records: Sequence[Record]) -> str:
    """Device, versions, commit and run of what a chart shows."""
    first = records[0]
    versions: dict[str, str] = {}
    for record in records:
        versions |= record["versions"]
    shown = [f"{n} {versions[n]}" for n in ("jax", "torch", "transformers", "tokamax") if n in versions]
    runs = sorted({r["run"] for r in records})
    return f"{first['device']} · {', '.join(shown)}\ncommit {first['commit']}, run {runs[-1]}"


def colour(impl: str, impls: Sequence[str]) -> str:
    """Ours have fixed colours, others one each."""
    rest = [i for i in impls if i not in COLOURS]
    return COLOURS[impl] if impl in COLOURS else OTHERS[rest.index(impl) % len(OTHERS)]


def compare_plots(records: Sequence[Record], folder: Path) -> Iterator[Path]:
    """Bars of tokens/s for every workload group, and the decode steps on the roofline."""
    good = [r for r in records if r["value"] is not None and r["metric"] == "tokens_per_s"]
    for case in ("decode", "prefill"):
        chosen = [r for r in good if r["case"] == case]
        if chosen:
            fig = bars(chosen, case)
            yield from save(fig, folder, f"{case}-{chosen[0]['model']}-{chosen[0]['dtype']}-{short_device(chosen[0])}")
    if good and all("work" in r for r in good):
        yield from save(
            roofline(good), folder, f"roofline-{good[0]['model']}-{good[0]['dtype']}-{short_device(good[0])}"
        )


def ops_plots(records: Sequence[Record], folder: Path) -> Iterator[Path]:
    """Speed-up over XLA against length for every operation, and all of them on the roofline."""
    good = [r for r in records if r["value"] is not None]
    for dtype in sorted({r["dtype"] for r in good}):
        mine = [r for r in good if r["dtype"] == dtype]
        for case in sorted({r["case"] for r in mine}):
            chosen = [r for r in mine if r["case"] == case]
            fig = speedups(chosen, case)
            yield from save(fig, folder, f"speedup-{case}-{chosen[0]['model']}-{dtype}-{short_device(chosen[0])}")
        yield from save(roofline(mine), folder, f"roofline-ops-{dtype}-{short_device(mine[0])}")


def short_device(record: Record) -> str:
    """A device's name for a file's."""
    return "cpu" if "core" in record["device"] else record["device"].replace("NVIDIA ", "")


def bars(records: Sequence[Record], case: str) -> Any:
    """One group of bars for every batch and prompt length; the line above each group is the floor's speed."""
    groups = sorted({(r["batch"], r["seq"]) for r in records})
    impls = list(dict.fromkeys(r["impl"] for r in records))
    fig, ax = figure(max(6.5, 1.1 * len(groups) * max(len(impls), 2) / 1.6 + 2), 4.6)
    width = 0.8 / len(impls)
    for g, group in enumerate(groups):
        mine = [r for r in records if (r["batch"], r["seq"]) == group]
        for r in mine:
            at = g + (impls.index(r["impl"]) - (len(impls) - 1) / 2) * width
            low, high = r["value"] - min(r["samples"]), max(r["samples"]) - r["value"]
            name = r["impl"] if g == 0 else None
            ax.bar(at, r["value"], width * 0.92, color=colour(r["impl"], impls), label=name)
            ax.errorbar(at, r["value"], yerr=[[low], [high]], color="black", capsize=2, linewidth=0.8)
            text = f"{r['value']:,.0f}" if r["value"] >= 100 else f"{r['value']:.1f}"
            ax.annotate(text, (at, max(r["samples"])), (0, 4), textcoords="offset points", ha="center", fontsize=8)
        ax.plot(
            [g - 0.45, g + 0.45], [mine[0]["floor"]] * 2, "k--", lw=1, label=None if g else "what the ceilings allow"
        )
    top = max(max(r["samples"]) for r in records)
    if max(r["floor"] for r in records) < 4 * top:
        top = max(top, *(r["floor"] for r in records))
    ax.set_ylim(0, top * 1.15)
    ax.set_xticks(range(len(groups)), [f"batch {b}, prompt {s}" for b, s in groups])
    ax.set_ylabel("tokens/s (median; bar: range)")
    ax.set_title(f"{case}, {records[0]['model']} {records[0]['dtype']}\n{label(records)}", fontsize=9, loc="left")
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return fig


def speedups(records: Sequence[Record], case: str) -> Any:
    """Times as fast as XLA, by length."""
    impls = list(dict.fromkeys(r["impl"] for r in records))
    models = sorted({(r["model"], r["batch"]) for r in records})
    fig, ax = figure(7, 4.4)
    for impl in impls:
        for m, key in enumerate(models):
            mine = [
                r for r in records if r["impl"] == impl and (r["model"], r["batch"]) == key and "xla" in r["speedup"]
            ]
            mine.sort(key=lambda r: r["context"])
            name = impl if len(models) == 1 else f"{impl}, {key[0]} batch {key[1]}"
            x, y = [r["context"] for r in mine], [r["speedup"]["xla"] for r in mine]
            ax.plot(x, y, marker=MARKERS[m % len(MARKERS)], color=colour(impl, impls), label=name if mine else None)
    ax.set_xscale("log", base=2)
    ticks = sorted({r["context"] for r in records})
    ax.set_xticks(ticks, [str(t) for t in ticks])
    ax.set_ylim(bottom=0)
    ax.set_xlabel("rows, or keys")
    ax.set_ylabel("times as fast as XLA")
    ax.grid(alpha=0.3)
    ax.set_title(f"{case}, {records[0]['dtype']}\n{label(records)}", fontsize=9, loc="left")
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return fig


def roofline(records: Sequence[Record]) -> Any:
    """Everything that was measured, by what it does a byte and what it reached, under the ceilings of its run."""
    ceilings = records[0]["ceilings"]
    bandwidth, matrix = max(ceilings["copy"], ceilings["read"]), ceilings["matrix"]
    fig, ax = figure(8.4, 5)
    impls = list(dict.fromkeys(r["impl"] for r in records))
    cases = list(dict.fromkeys(r["case"] for r in records))
    points = []
    for r in records:
        seconds = r["value"] / 1e3 if r["metric"] == "ms" else r["work"]["tokens"] / r["value"]
        intensity = r["work"]["flops"] / r["work"]["bytes"]
        points.append((intensity, r["work"]["flops"] / seconds / 1e12))
        ax.plot(*points[-1], MARKERS[cases.index(r["case"]) % len(MARKERS)], color=colour(r["impl"], impls), alpha=0.75)
    knee = matrix / bandwidth
    left, right = min(min(p[0] for p in points), knee) / 4, max(max(p[0] for p in points), knee) * 4
    ax.plot([left, knee, right], [left * bandwidth / 1e12, matrix / 1e12, matrix / 1e12], "k-", lw=1.5)
    ax.annotate(f"{bandwidth / 1e9:,.0f} GB/s", (left * 1.3, left * 1.3 * bandwidth / 1e12 * 1.9), fontsize=8)
    ax.annotate(f"{matrix / 1e12:,.2f} TFLOP/s", (right, matrix / 1e12 * 1.15), fontsize=8, ha="right")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_ylim(top=matrix / 1e12 * 2.5)
    ax.xaxis.set_minor_formatter("")
    ax.set_xlabel("flops a byte (each input read once, the output written once)")
    ax.set_ylabel("TFLOP/s")
    ax.grid(alpha=0.3, which="both")
    for impl in impls:
        ax.plot([], [], "o", color=colour(impl, impls), label=impl)
    for number, case in enumerate(cases):
        ax.plot([], [], MARKERS[number % len(MARKERS)], color="black", label=case)
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    ax.set_title(
        f"Roofline, {records[0]['dtype']}; ceilings measured in the same run\n{label(records)}", fontsize=9, loc="left"
    )
    return fig

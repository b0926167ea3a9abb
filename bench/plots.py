"""Charts from records, as PNG: tokens/s by implementation, speed-up by length, the roofline.

Every chart names the device and the versions, and shows the ceiling of the same run.
"""

import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.choice import bits, grouped, held_both, latest, newest
from bench.names import CHECKED, cores, is_cpu, is_ours, model_name, plain_name, short, versions_of
from bench.record import Record
from bench.roofline import best_of, of_dict

COLOURS = {"xla": "#1f77b4", "pallas": "#d62728", "auto": "#9467bd", "torch": "#ff7f0e", "torch-graph": "#e6ab02"}
COLOURS |= {"engine": "#8b0000", "vllm": "#1b9e77", "vllm-fp8": "#66c2a5"}
COLOURS |= {"hf-eager": "#c5b0d5", "hf-compile": "#8c564b", "llama.cpp": "#2ca02c", "llama2.c": "#bcbd22"}
COLOURS |= {"cudnn": "#2ca02c", "tokamax": "#17becf", "jax-example": "#7f7f7f", "llama2.c-1t": "#dbdb8d"}
OTHERS = ("#e377c2", "#aec7e8", "#98df8a", "#ffbb78")
MARKERS = "os^Dvp*hX<>"


def unavailable() -> str | None:
    """Why no charts can be drawn, else None."""
    from importlib.util import find_spec

    return None if find_spec("matplotlib") else "matplotlib is not installed (pip install jllama[bench])"


def figure(width: float, height: float, columns: int = 1) -> tuple[Any, list[Any]]:
    """A figure with a row of panels. It needs no display and leaves no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(fig)
    return fig, [fig.add_subplot(1, columns, i + 1) for i in range(columns)]


def save(fig: Any, folder: Path, name: str) -> Path:
    """Write a PNG without the version of matplotlib, so that equal charts are equal files."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{re.sub(r'[^a-z0-9.]+', '-', name.lower()).strip('-')}.png"
    fig.savefig(path, dpi=110, metadata={"Software": None})
    return path


def label(records: Sequence[Record]) -> str:
    """The device, versions, commits and runs of a chart's records."""
    shown = versions_of(records, "jax", "vllm", "torch", "transformers", "tokamax")
    ran = sorted({(r["run"], r["commit"][:10]) for r in records})
    runs = "\n".join(f"run {run}, commit {commit}" for run, commit in ran)
    return f"{records[0]['device']}\n{', '.join(shown)}\n{runs}"


def colour(impl: str, impls: Sequence[str]) -> str:
    """The colour of an implementation: fixed for those in `COLOURS`, one of `OTHERS` for the rest."""
    rest = [i for i in impls if i not in COLOURS]
    return COLOURS[impl] if impl in COLOURS else OTHERS[rest.index(impl) % len(OTHERS)]


def draw(records: Sequence[Record], folder: Path) -> Iterator[Path]:
    """Draw every chart, from the runs that `bench.choice` chooses."""
    measured = [r for r in records if r["value"] is not None and r.get("ceilings") and "work" in r]
    whole = [r for r in measured if r["suite"] == "compare" and r["case"] in CHECKED]
    single = [r for r in measured if r["suite"] == "ops" and r["metric"] == "ms"]
    models = newest(whole)
    for group in models:
        yield from compare_plots(group, folder)
    yield from rows_plots([r for r in whole if r["case"] == "decode"], folder)
    groups = latest(single, ("device", "case", "dtype"))
    for device, dtype in dict.fromkeys((g[0]["device"], g[0]["dtype"]) for g in groups):
        mine = [r for g in groups for r in g if (r["device"], r["dtype"]) == (device, dtype)]
        steps = [r for g in models for r in g if (r["device"], r["dtype"]) == (device, dtype)]
        yield from ops_plots(mine, folder, steps)


def compare_plots(records: Sequence[Record], folder: Path) -> Iterator[Path]:
    """Bars of tokens/s for every workload, and the roofline of all runs."""
    good = [r for r in records if r["value"] is not None and r["case"] in CHECKED]
    for case in CHECKED:
        chosen = [r for r in good if r["case"] == case]
        if chosen:
            fig = bars(chosen, case)
            yield save(
                fig, folder, f"{case}-{model_name(chosen[0]['model'])}-{chosen[0]['dtype']}-{short_device(chosen[0])}"
            )
    if good and all("work" in r for r in good):
        yield save(
            roofline(good),
            folder,
            f"roofline-{model_name(good[0]['model'])}-{good[0]['dtype']}-{short_device(good[0])}",
        )


def rows_plots(records: Sequence[Record], folder: Path) -> Iterator[Path]:
    """The rate by the number of rows, from the newest run that held us and a peer at three numbers or more: one chart
    for every device, model and number of bits."""
    runs = sorted(grouped(records, ("run", "device", "model", "seq")), key=lambda g: g[-1]["when"])
    found: dict[tuple[str, str, int], list[Record]] = {}
    for run in runs:
        for width in {bits(r) for r in run}:
            mine = [r for r in run if bits(r) == width]
            if sum(held_both(g) for g in grouped(mine, ("batch",))) >= 3:
                found[run[0]["device"], run[0]["model"], width] = mine
    for mine in found.values():
        dtype = next(r["dtype"] for r in mine if is_ours(r["impl"]))
        yield save(by_rows(mine), folder, f"rows-{model_name(mine[0]['model'])}-{dtype}-{short_device(mine[0])}")


def by_rows(records: Sequence[Record]) -> Any:
    """Two panels by the number of rows: tokens/s under the floor's, and the percent of the floor. The floor is what the
    run's ceilings allow, so a peer with other weights has one of its own."""
    fig, (rate, share) = figure(10, 4.4, columns=2)
    impls = list(dict.fromkeys(r["impl"] for r in records))
    series = [sorted(g, key=lambda r: r["batch"]) for g in grouped(records, ("impl", "dtype"))]
    for line in series:
        x, name, paint = [r["batch"] for r in line], plain_name(line[0]["impl"]), colour(line[0]["impl"], impls)
        rate.plot(x, [r["value"] for r in line], "o-", color=paint, label=name)
        share.plot(x, [100 * r["value"] / r["floor"] for r in line], "o-", color=paint, label=name)
    for dtype in dict.fromkeys(r["dtype"] for r in records):
        floors = sorted({(r["batch"], r["floor"]) for r in records if r["dtype"] == dtype})
        style = "k--" if dtype != "fp8" else "k:"
        rate.plot(*zip(*floors, strict=True), style, lw=1, label=f"what the ceilings allow, {dtype}")
    ticks = sorted({r["batch"] for r in records})
    for ax, title in ((rate, "tokens/s"), (share, "% of what the ceilings allow")):
        ax.set_xscale("log", base=2)
        ax.set_xticks(ticks, [str(t) for t in ticks])
        ax.set_xlabel("rows")
        ax.set_title(title, fontsize=9)
        ax.grid(alpha=0.3)
    rate.set_yscale("log")
    share.set_ylim(0, 105)
    rate.legend(fontsize=8)
    first, dtypes = records[0], " and ".join(sorted({r["dtype"] for r in records}))
    title = f"decode, {model_name(first['model'])}, {dtypes}, prompt {first['seq']}"
    fig.suptitle(f"{title}\n{label(records)}", fontsize=9)
    return fig


def ops_plots(records: Sequence[Record], folder: Path, steps: Sequence[Record] = ()) -> Iterator[Path]:
    """The speed-up over XLA by length for every operation, and the roofline of all operations and whole ``steps``."""
    good = [r for r in records if r["value"] is not None]
    for dtype in sorted({r["dtype"] for r in good}):
        mine = [r for r in good if r["dtype"] == dtype]
        for case in sorted({r["case"] for r in mine}):
            chosen = [r for r in mine if r["case"] == case]
            if len({r["context"] for r in chosen if "xla" in r["speedup"]}) < 2:
                continue
            fig = speedups(chosen, case)
            yield save(fig, folder, f"speedup-{case}-{chosen[0]['model']}-{dtype}-{short_device(chosen[0])}")
        yield save(roofline([*mine, *steps]), folder, f"roofline-ops-{dtype}-{short_device(mine[0])}")


def short_device(record: Record) -> str:
    """A short name of the device, for file names."""
    return f"cpu-{cores(record['device'])}" if is_cpu(record) else record["device"].replace("NVIDIA ", "")


def bars(records: Sequence[Record], case: str) -> Any:
    """One panel per batch and length, with the fastest on top. The dashed line is what the run's ceilings allow."""
    groups = sorted({(r["batch"], r["seq"], r["context"]) for r in records}, key=lambda g: (g[2] > 1024, g))
    impls = list(dict.fromkeys(r["impl"] for r in records))
    fig, axes = figure(2.2 + 3.6 * len(groups), 1.6 + 0.36 * len(impls), columns=len(groups))
    for ax, group in zip(axes, groups, strict=True):
        mine = sorted((r for r in records if (r["batch"], r["seq"], r["context"]) == group), key=lambda r: r["value"])
        for at, r in enumerate(mine):
            low, high = r["value"] - min(r["samples"]), max(r["samples"]) - r["value"]
            ax.barh(at, r["value"], 0.72, color=colour(r["impl"], impls))
            ax.errorbar(r["value"], at, xerr=[[low], [high]], color="black", capsize=2, linewidth=0.8)
            box = dict(facecolor="white", edgecolor="none", pad=1)
            end = (max(r["samples"]), at)
            ax.annotate(short(r["value"]), end, (6, -3), textcoords="offset points", fontsize=8, bbox=box)
        top = max(max(r["samples"]) for r in mine)
        several = len({r["run"] for r in mine}) > 1
        if (floor := mine[0]["floor"]) and floor < 4 * top:
            ax.axvline(floor, color="black", ls="--", lw=1)
            top = max(top, floor)
        ax.set_xlim(0, top * 1.22)
        ax.set_yticks(range(len(mine)), [_bar_name(r, several) for r in mine], fontsize=8)
        ax.tick_params(axis="x", labelsize=8)
        ax.set_title(f"batch {group[0]}, prompt {group[1]:,}", fontsize=9)
        ax.spines[["top", "right"]].set_visible(False)
    fig.supxlabel("tokens/s: median and range; dashed: what the ceilings of the run allow", fontsize=8)
    fig.suptitle(f"{case}, {model_name(records[0]['model'])} {records[0]['dtype']}\n{label(records)}", fontsize=9)
    return fig


def _bar_name(r: Record, several: bool) -> str:
    """What a bar is of, and its run where a panel has several."""
    return plain_name(r["impl"]) + (f"\n{r['run']}" if several else "")


def speedups(records: Sequence[Record], case: str) -> Any:
    """The speed-up over XLA, by length."""
    impls = list(dict.fromkeys(r["impl"] for r in records))
    models = sorted({(r["model"], r["batch"]) for r in records})
    fig, (ax,) = figure(7, 4.4)
    for impl in impls:
        for m, key in enumerate(models):
            mine = [
                r for r in records if r["impl"] == impl and (r["model"], r["batch"]) == key and "xla" in r["speedup"]
            ]
            mine.sort(key=lambda r: r["context"])
            name = plain_name(impl) + ("" if len(models) == 1 else f", {key[0]} batch {key[1]}")
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


def _kind(record: Record) -> str:
    """The kind of operation, which decides the marker. All products are one kind."""
    return "matmul" if record["case"].startswith("matmul") else record["case"]


def roofline(records: Sequence[Record]) -> Any:
    """All records by flops per byte and TFLOP/s, under the ceilings of their runs."""
    ceilings = of_dict(functools.reduce(best_of, (r["ceilings"] for r in records)))
    bandwidth, matrix = ceilings.bandwidth, ceilings.matrix
    fig, (ax,) = figure(8.4, 5)
    impls = list(dict.fromkeys(r["impl"] for r in records))
    cases = list(dict.fromkeys(_kind(r) for r in records))
    points = []
    for r in records:
        seconds = r["value"] / 1e3 if r["metric"] == "ms" else r["work"]["tokens"] / r["value"]
        intensity = r["work"]["flops"] / r["work"]["bytes"]
        points.append((intensity, r["work"]["flops"] / seconds / 1e12))
        ax.plot(*points[-1], MARKERS[cases.index(_kind(r)) % len(MARKERS)], color=colour(r["impl"], impls), alpha=0.75)
    knee = matrix / bandwidth
    left, right = min(min(p[0] for p in points), knee) / 4, max(max(p[0] for p in points), knee) * 4
    ax.plot([left, knee, right], [left * bandwidth / 1e12, matrix / 1e12, matrix / 1e12], "k-", lw=1.5)
    ax.annotate(f"{bandwidth / 1e9:,.0f} GB/s", (left, left * 3 * bandwidth / 1e12), fontsize=8)
    ax.annotate(f"{matrix / 1e12:,.2f} TFLOP/s", (right, matrix / 1e12 * 1.15), fontsize=8, ha="right")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_ylim(top=matrix / 1e12 * 2.5)
    ax.xaxis.set_minor_formatter("")
    ax.set_xlabel("flops per byte (each input read once, the output written once)")
    ax.set_ylabel("TFLOP/s")
    ax.grid(alpha=0.3, which="both")
    for impl in impls:
        ax.plot([], [], "o", color=colour(impl, impls), label=plain_name(impl))
    for number, case in enumerate(cases):
        ax.plot([], [], MARKERS[number % len(MARKERS)], color="black", label=case)
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    ax.set_title(
        f"Roofline, {records[0]['dtype']}; ceilings measured in the same runs\n{label(records)}", fontsize=9, loc="left"
    )
    return fig

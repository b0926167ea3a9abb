"""Charts of the time by kernel: of a decode step by its number of rows, and of prompts."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.choice import grouped, latest
from bench.names import model_name
from bench.plots import OTHERS, figure, label, save, short_device
from bench.record import Record
from bench.trace import OTHER

IDLE = "no kernel runs"
PAINTS = ("#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#17becf", "#bcbd22", *OTHERS)
KINDS = {"engine-step-kernels": "decode step", "engine-prefill-kernels": "prefill"}


def draw_kernels(records: Sequence[Record], folder: Path) -> Iterator[Path]:
    """One chart for every device, model and format: a panel of decode steps, and one of prompts. Each bar is from the
    newest run of its shape."""
    found = [r for r in records if r["case"] in KINDS and r.get("kernels_ms")]
    for group in grouped(found, ("device", "model", "dtype")):
        shown = [run[-1] for run in latest(group, ("case", "batch", "seq"))]
        first = shown[0]
        name = f"kernels-{model_name(first['model'])}-{first['dtype']}-{short_device(first)}"
        yield save(by_kernel(shown), folder, name)


def by_kernel(records: Sequence[Record]) -> Any:
    """Stacked bars, the kernel that takes longest at the left."""
    panels = [[r for r in records if r["case"] == case] for case in KINDS]
    panels = [sorted(panel, key=lambda r: (r["batch"], r["seq"]), reverse=True) for panel in panels if panel]
    parts = {id(r): {plain(n): ms for n, ms in r["kernels_ms"].items()} | {IDLE: r["idle_ms"]} for r in records}
    totals: dict[str, float] = {}
    for r in records:
        for kernel, ms in parts[id(r)].items():
            totals[kernel] = totals.get(kernel, 0.0) + ms / r["value"]
    kernels = sorted((name for name in totals if name not in (OTHER, IDLE)), key=lambda name: -totals[name])
    paints = {kernel: PAINTS[i % len(PAINTS)] for i, kernel in enumerate(kernels)} | {OTHER: "#aaaaaa", IDLE: "#eeeeee"}
    fig, axes = figure(5.4 * len(panels) + 2.6, 2.2 + 0.5 * max(map(len, panels)), columns=len(panels))
    for ax, panel in zip(axes, panels, strict=True):
        for at, r in enumerate(panel):
            left = 0.0
            for kernel, paint in paints.items():
                ms = parts[id(r)].get(kernel, 0.0)
                ax.barh(at, ms, 0.7, left=left, color=paint, edgecolor="white", linewidth=0.3)
                left += ms
            ax.annotate(f"{left:.2f}", (left, at), (4, -3), textcoords="offset points", fontsize=8)
        ax.set_yticks(range(len(panel)), [_shape(r) for r in panel], fontsize=8)
        ax.set_title(f"{KINDS[panel[0]['case']]}, ms", fontsize=9)
        ax.margins(x=0.12)
        ax.spines[["top", "right"]].set_visible(False)
    for kernel in [kernel for kernel in paints if kernel in totals]:
        axes[-1].barh(0, 0, color=paints[kernel], label=kernel)
    axes[-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    fig.suptitle(
        f"time by kernel, {model_name(records[0]['model'])}, {records[0]['dtype']}\n{label(records)}", fontsize=9
    )
    return fig


def plain(kernel: str) -> str:
    """The name of a kernel without what all of ours end with."""
    return kernel.removesuffix("_kernel").removesuffix("_mosaic_gpu")


def _shape(r: Record) -> str:
    rows = f"{r['batch']} row" + "s" * (r["batch"] > 1)
    return rows if r["case"] == "engine-step-kernels" else f"{r['batch']} x {r['seq']:,} tokens"

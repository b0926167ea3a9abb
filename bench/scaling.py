"""Several devices: the table of their rates, and the chart of tokens/s against devices under the floor."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.choice import grouped, latest
from bench.meshes import Shape
from bench.names import age_of, markdown, model_name, name_of, plain_name, short
from bench.record import Record

WORKLOAD = ("device", "model", "dtype", "impl", "tp", "dp", "batch", "seq")
WAYS = {"tp": "the model divided (`--tp`)", "dp": "the rows divided (`--dp`), so many on each device"}


def rates(records: Sequence[Record]) -> list[Record]:
    """The newest decode rate of every workload of a mesh."""
    wanted = [r for r in records if r["suite"] == "mesh" and r["case"] == "decode" and r["metric"] == "tokens_per_s"]
    return [r for group in latest([r for r in wanted if r["value"] is not None], WORKLOAD) for r in group[-1:]]


def series(records: Sequence[Record]) -> dict[tuple[str, str, str, int], list[Record]]:
    """Rates of one model that a line joins, by the way of dividing, the implementation, the format and the rows: all
    rows where the devices divide the model, those of one device where they divide the rows."""
    found: dict[tuple[str, str, str, int], list[Record]] = {}
    for r in sorted(records, key=lambda r: r["devices"]):
        for way, other in (("tp", "dp"), ("dp", "tp")):
            if r[other] == 1:
                found.setdefault((way, r["impl"], r["dtype"], r["batch"] // r["dp"]), []).append(r)
    return {key: line for key, line in found.items() if line[-1]["devices"] > 1}


def table(records: Sequence[Record]) -> str:
    """The rates of meshes, with the percent of the floor and how many times they are that of one device."""
    found = rates(records)
    lines = [line for of_model in grouped(found, ("device", "model")) for line in series(of_model).values()]
    alone = {id(r): line[0] for line in lines for r in line if line[0]["devices"] == 1}
    rows = []
    order = ("device", "model", "dtype", "impl", "devices", "tp", "batch")
    for r in sorted(found, key=lambda r: [r[k] for k in order]):
        one = alone.get(id(r))
        times = f"{r['value'] / one['value']:.2f}" if one and one is not r else ""
        between = f"{short(min(r['samples']))} to {short(max(r['samples']))}"
        floor = (short(r["floor"]), f"{100 * r['value'] / r['floor']:.0f}") if r["floor"] else ("", "")
        devices = f"{r['devices']} × {r['device']}"
        start = (devices, model_name(r["model"]), r["dtype"], Shape(r["tp"], r["dp"]).name, str(r["batch"]))
        rows.append((*start, name_of(r["impl"]), short(r["value"]), between, *floor, times, age_of(r)))
    head = ("on", "model", "dtype", "mesh", "rows", "implementation", "tokens/s", "range", "floor", "% of floor")
    return markdown((*head, "times one device", "measured"), rows)


def draw(records: Sequence[Record], folder: Path) -> Iterator[Path]:
    """One chart for every device and model."""
    from bench.plots import save, short_device

    for group in grouped(rates(records), ("device", "model")):
        lines = series(group)
        if any(len(line) > 1 for line in lines.values()):  # else the table is enough
            first = group[0]
            yield save(_chart(lines), folder, f"mesh-{model_name(first['model'])}-{short_device(first)}")


def _chart(lines: dict[tuple[str, str, str, int], list[Record]]) -> Any:
    """A panel for each way of dividing: tokens/s of all rows by the number of devices; dashed, the floor."""
    from bench.plots import figure, label

    ways = [way for way in WAYS if any(key[0] == way for key in lines)]
    fig, axes = figure(1.5 + 4.5 * len(ways), 4.4, columns=len(ways))
    for ax, way in zip(axes, ways, strict=True):
        for (_, impl, dtype, rows), line in ((key, line) for key, line in lines.items() if key[0] == way):
            x = [r["devices"] for r in line]
            name = f"{plain_name(impl)}, {dtype}, {rows} row{'s' * (rows > 1)}"
            (drawn,) = ax.plot(x, [r["value"] for r in line], "o-", label=name)
            floors = [(r["devices"], r["floor"]) for r in line if r["floor"]]
            ax.plot(*zip(*floors, strict=True) if floors else ((), ()), "--", lw=1, color=drawn.get_color())
        ticks = sorted({r["devices"] for key, line in lines.items() if key[0] == way for r in line})
        for axis in (ax.set_xscale, ax.set_yscale):
            axis("log", base=2)
        ax.set_xticks(ticks, [str(n) for n in ticks])
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        ax.set_xlabel("devices")
        ax.set_title(f"{WAYS[way].replace('`', '')}", fontsize=9)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7)
    axes[0].set_ylabel("tokens/s, all rows")
    chosen = [r for line in lines.values() for r in line]
    what = f"decode, {model_name(chosen[0]['model'])}; dashed: what the ceilings of the devices allow"
    fig.suptitle(f"{what}\n{label(chosen)}", fontsize=9)
    return fig

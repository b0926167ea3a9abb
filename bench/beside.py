"""The table that a reader sees first: our rates on a GPU beside those of peers, measured on one card in one run."""

from collections.abc import Sequence

from bench.choice import bits, side_by_side
from bench.names import commit_of, is_cpu, markdown, name_of, short, versions_of
from bench.record import Record

MODEL, PROMPT = "7b", 128
COLUMNS = {  # case, rows, length of the prompt
    "1 row": ("decode", 1, PROMPT),
    "8 rows": ("decode", 8, PROMPT),
    "64 rows": ("decode", 64, PROMPT),
    "256 rows": ("decode", 256, PROMPT),
    "prefill 2,048": ("prefill", 1, 2048),
}
# As `jllama.LM` runs prompts: one with a session, several with the engine. If a run has only the other way, show that.
WAYS = {"pallas": "`generate`", "auto": "`generate`", "engine": "`Engine`"}
ALONE, SEVERAL = ("pallas", "auto", "engine"), ("engine", "pallas", "auto")

Line = dict[str, Record]  # a row of the table, by column


def beside(records: Sequence[Record]) -> str:
    """One row per implementation, format of weights and run."""
    lines = _lines(records)
    columns = [c for c in COLUMNS if any(c in line for line in lines)]
    head = ("tokens/s (% of floor)", *columns, "measured")
    rows = [[_name(line), *(_cell(line, c, lines) for c in columns), _measured(line, records)] for line in lines]
    return markdown(head, rows, right=range(1, len(columns) + 1)) + _foot(lines)


def _lines(records: Sequence[Record]) -> list[Line]:
    """The rows in their order: most bits first, then the newest run, then the fastest."""
    rates = [r for r in records if r["suite"] == "compare" and r["model"] == MODEL and r["metric"] == "tokens_per_s"]
    rates = [r for r in rates if r["value"] is not None and "note" not in r and not is_cpu(r)]
    lines: dict[tuple[str, ...], Line] = {}
    for column, workload in COLUMNS.items():
        preferred = ALONE if workload[1] == 1 else SEVERAL
        found = [r for r in rates if (r["case"], r["batch"], r["seq"]) == workload]
        for r in side_by_side(found, kind=_who):
            line = lines.setdefault((r["run"], *_who(r)), {})
            if column not in line or preferred.index(r["impl"]) < preferred.index(line[column]["impl"]):
                line[column] = r

    def rank(line: Line) -> tuple[int, str, int, float]:
        column, first = next((c, line[c]) for c in COLUMNS if c in line)
        return bits(first), _began(first["run"], records), -list(COLUMNS).index(column), first["value"]

    return sorted(lines.values(), key=rank, reverse=True)


def _who(r: Record) -> tuple[str, str]:
    """The key of a row. Our two ways of running with kernels share a row."""
    return "jllama" if r["impl"] in WAYS else r["impl"], r["dtype"]


def _one(line: Line) -> Record:
    return next(iter(line.values()))


def _name(line: Line) -> str:
    """The name of a row. For ours, it says which way gave which figure."""
    one = _one(line)
    if one["impl"] not in WAYS:
        name = name_of(one["impl"])
        return name if one["dtype"] in name else f"{name}, {one['dtype']}"
    ways: dict[str, list[str]] = {}
    for column in COLUMNS:
        if column in line:
            ways.setdefault(WAYS[line[column]["impl"]], []).append(column)
    return f"**jllama**, {one['dtype']}: " + "; ".join(
        f"{way} {', '.join(columns)}" if len(ways) > 1 else way for way, columns in ways.items()
    )


def _cell(line: Line, column: str, lines: Sequence[Line]) -> str:
    """A rate. The best among those with the same number of bits in the same run is bold."""
    if (r := line.get(column)) is None:
        return ""
    rivals = [o[column]["value"] for o in lines if column in o and _peers_of(o[column]) == _peers_of(r)]
    figure = short(r["value"])
    figure = f"**{figure}**" if len(rivals) > 1 and r["value"] == max(rivals) else figure
    return figure + (f" ({100 * r['value'] / r['floor']:.0f})" if r["floor"] else "")


def _peers_of(r: Record) -> tuple[str, int]:
    return r["run"], bits(r)


def _measured(line: Line, records: Sequence[Record]) -> str:
    """When the row's run began, and the commit."""
    commits = ", ".join(dict.fromkeys(commit_of(r) for r in line.values()))
    return f"{_began(_one(line)['run'], records)} {commits}"


def _began(run: str, records: Sequence[Record]) -> str:
    return min(r["when"] for r in records if r["run"] == run)[:16].replace("T", " ")


def _foot(lines: Sequence[Line]) -> str:
    """The line under the table: what all rows have in common."""
    shown = [r for line in lines for r in line.values()]
    if not shown:
        return ""
    devices = sorted({r["device"] for r in shown})
    on = {f"`{r['run']}`" + (f" on {r['device']}" if len(devices) > 1 else "") for r in shown}
    parts = [", ".join(devices)]
    parts.append(", ".join(versions_of(shown, "jax", "vllm", "torch", "transformers")))
    parts.append(f"the {MODEL} shape with random weights, a prompt of {PROMPT} tokens, greedy")
    parts.append(f"rows of one time are one run on one machine: {', '.join(sorted(on))}")
    return f"\n\n<sub>{'; '.join(parts)}.</sub>"

"""Names of things in tables, and the choice of the records that tables show."""

from collections.abc import Collection, Iterable, Sequence

from bench.record import Record

NEWEST = ("device", "model", "dtype")  # what a run is the newest of
WORKLOAD = ("case", "metric", "batch", "seq")  # without the number of new tokens, on which a rate hardly depends
CHECKED = ("decode", "prefill")  # workloads that peers have, too
NONE = "*nothing recorded yet*"
OURS = ("xla", "pallas", "auto", "engine")
NAMES = {
    "xla": "**jllama, XLA**",
    "pallas": "**jllama, Pallas kernels**",
    "auto": "**jllama, auto**",
    "engine": "**jllama, engine**",
    "vllm": "vLLM",
    "vllm-fp8": "vLLM, fp8",
    "hf-eager": "HF transformers, eager",
    "hf-compile": "HF transformers, static cache + compile",
    "torch-graph": "plain PyTorch (CUDA graph on a GPU)",
    "llama.cpp": "llama.cpp",
    "llama2.c": "llama2.c, all cores",
    "llama2.c-1t": "llama2.c, one thread",
    "cudnn": "cuDNN (`jax.nn`)",
    "torch": "PyTorch",
    "tokamax": "tokamax",
    "jax-example": "JAX's example kernel",
}


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], right: Collection[int] = ()) -> str:
    """A Markdown table. Columns of figures, and those in ``right``, are aligned to the right."""
    rows = list(rows)
    if not rows:
        return NONE
    figures = [
        i in right or (all(_is_figure(row[i]) for row in rows) and any(row[i] for row in rows))
        for i in range(len(head))
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join("---:" if f else "---" for f in figures) + "|"]
    return "\n".join(lines + ["| " + " | ".join(r) + " |" for r in rows])


def _is_figure(cell: str) -> bool:
    return not cell or cell.removesuffix(" %").replace(",", "").replace(".", "").replace("e+", "").isdigit()


def latest(records: Sequence[Record], keys: Sequence[str]) -> list[list[Record]]:
    """Group records by ``keys``, and keep only the newest run of each group. So a group's records were measured side by
    side."""
    groups: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record[k] for k in keys), []).append(record)
    newest = {key: max(rows, key=lambda r: r["when"])["run"] for key, rows in groups.items()}
    return [[r for r in rows if r["run"] == newest[key]] for key, rows in groups.items()]


def newest(records: Sequence[Record]) -> list[list[Record]]:
    """Group records that have a figure by device, model and dtype. Each workload's records come from its newest run, so
    a run of a few workloads does not hide the others. If a run measured a workload twice (in two commands on one
    machine), the second figure counts. Runs with a ``note`` are rehearsals; they count only where there is no other."""

    def owner(record: Record) -> tuple[object, ...]:
        return tuple(record[k] for k in NEWEST)

    figures = [r for r in records if r["value"] is not None]
    proper = {owner(r) for r in figures if "note" not in r}
    figures = [r for r in figures if "note" not in r or owner(r) not in proper]
    whole: dict[tuple[object, ...], list[Record]] = {}
    for group in latest(figures, (*NEWEST, *WORKLOAD)):
        last = {(r["impl"], r["metric"]): r for r in group}
        whole.setdefault(owner(group[0]), []).extend(last.values())
    return list(whole.values())


def versions_of(records: Iterable[Record], *libraries: str) -> list[str]:
    """The versions of ``libraries`` in the records, without those that the records do not name."""
    found: dict[str, set[str]] = {}
    for record in records:
        for library in libraries:
            if library in record["versions"]:
                found.setdefault(library, set()).add(record["versions"][library])
    return [f"{library} {'/'.join(sorted(found[library]))}" for library in libraries if library in found]


def is_cpu(record: Record) -> bool:
    """Whether a record's device is a CPU. Names of CPUs contain the number of cores."""
    return " core" in record["device"]


def cores(device: str) -> str:
    """The number of cores, from a CPU's name."""
    count = device.split(", ")[-1]
    return "1 core" if count == "1 cores" else count


def is_ours(impl: str) -> bool:
    """Whether an implementation is one of our backends."""
    return impl in OURS


def name_of(impl: str) -> str:
    """The name of an implementation in tables."""
    return NAMES.get(impl, impl)


def plain_name(impl: str) -> str:
    """The name of an implementation in charts: shorter, without Markdown."""
    return name_of(impl).replace("**", "").replace("`", "").partition(" (")[0]


def short(value: float) -> str:
    """A figure with one decimal below 100, and none above."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def commit_of(record: Record) -> str:
    """A record's commit, and whether the code had uncommitted changes."""
    return f"`{record['commit'][:10]}`" + (" + changes" if record["dirty"] else "")

"""How tables call things, and what they are made of."""

from collections.abc import Collection, Iterable, Sequence

from bench.record import Record

NEWEST = ("device", "model", "dtype")  # what a run is the newest of
WORKLOAD = ("case", "metric", "batch", "seq")  # whatever the number of new tokens: a rate hardly depends on it
CHECKED = ("decode", "prefill")  # workloads that peers have, too
NONE = "*nothing recorded yet*"
OURS = ("xla", "pallas", "auto")
NAMES = {
    "xla": "**jllama, XLA**",
    "pallas": "**jllama, Pallas kernels**",
    "auto": "**jllama, auto**",
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
    """A table; figures, and the columns ``right``, stand to the right."""
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
    """Records in groups of equal ``keys``, of each group only its newest run: what stands together ran together."""
    groups: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record[k] for k in keys), []).append(record)
    newest = {key: max(rows, key=lambda r: r["when"])["run"] for key, rows in groups.items()}
    return [[r for r in rows if r["run"] == newest[key]] for key, rows in groups.items()]


def newest(records: Sequence[Record]) -> list[list[Record]]:
    """Records with a figure in groups of one device, model and dtype: of each workload its last run, whose
    implementations ran together, so that a run of a few workloads leaves the figures of the others where they are. What
    a run measured twice, in a second command on the same machine, stands with the second figure.
    Runs with a ``note``, rehearsals, stand only where there is no other."""

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
    """Those of ``libraries`` that the records ran with, each with its version, or versions."""
    found: dict[str, set[str]] = {}
    for record in records:
        for library in libraries:
            if library in record["versions"]:
                found.setdefault(library, set()).add(record["versions"][library])
    return [f"{library} {'/'.join(sorted(found[library]))}" for library in libraries if library in found]


def is_cpu(record: Record) -> bool:
    """Devices of jax's CPU platform carry the number of cores in their name."""
    return " core" in record["device"]


def cores(device: str) -> str:
    """How many cores a CPU's name says."""
    count = device.split(", ")[-1]
    return "1 core" if count == "1 cores" else count


def is_ours(impl: str) -> bool:
    """One of our backends."""
    return impl in OURS


def name_of(impl: str) -> str:
    """What a reader calls it."""
    return NAMES.get(impl, impl)


def plain_name(impl: str) -> str:
    """The same without Markdown, as short as a chart needs it."""
    return name_of(impl).replace("**", "").replace("`", "").partition(" (")[0]


def short(value: float) -> str:
    """As many digits as anybody compares."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def commit_of(record: Record) -> str:
    """The commit, and whether code had changed since."""
    return f"`{record['commit'][:10]}`" + (" + changes" if record["dirty"] else "")

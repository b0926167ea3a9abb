"""Names of things in tables."""

from collections.abc import Collection, Iterable, Sequence

from bench.record import Record

CHECKED = ("decode", "prefill")  # workloads that peers have, too
NONE = "*nothing recorded yet*"
OURS = ("xla", "pallas", "auto", "engine")
NAMES = {
    "xla": "**jllama, XLA**",
    "pallas": "**jllama, Pallas kernels**",
    "auto": "**jllama, auto**",
    "engine": "**jllama, engine**",
    "serve": "**jllama serve**",
    "vllm": "vLLM",
    "vllm-fp8": "vLLM, fp8",
    "vllm-serve": "vLLM serve",
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
MODELS = {"f32.gguf": "SmolLM2-135M"}  # recorded by the name of a file


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


def model_name(model: str) -> str:
    """The name of a model in tables."""
    return MODELS.get(model, model)


def name_of(impl: str) -> str:
    """The name of an implementation in tables."""
    return NAMES.get(impl, impl)


def plain_name(impl: str) -> str:
    """The name of an implementation in charts: shorter, without Markdown."""
    return name_of(impl).replace("**", "").replace("`", "").partition(" (")[0]


def short(value: float) -> str:
    """A figure with one decimal below 100, and none above."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def age_of(record: Record) -> str:
    """The day of a record's run, and its commit."""
    return f"{record['when'][:10]} {commit_of(record)}"


def commit_of(record: Record) -> str:
    """A record's commit, and whether the code had uncommitted changes."""
    return f"`{record['commit'][:10]}`" + (" + changes" if record["dirty"] else "")

"""The cost of quantisation in perplexity: measures it on real text, records it, and writes a table for docs/formats.md.

    python -m bench.quality --model DIR --name stories260K --text FILE [--text FILE ...]   # measure and record
    python -m bench.quality --write-docs                                                   # the table, from the records

Our scales, which minimise the squared error, are compared with absmax scales of the same format and size.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.record import CHECKOUT, RESULTS, ROOT, append, package_versions, read, start_run
from jllama.errors import InputError, reported

if TYPE_CHECKING:
    from jllama.params import Params

DOCS = ROOT / "docs" / "formats.md"
BEGIN, END = "<!-- quality: written by python -m bench.quality --write-docs -->", "<!-- end of quality -->"
CASE = "perplexity"
# The name of a format -> the arguments of `load` for it.
FORMATS: dict[str, tuple[str, int | None]] = {
    "f32": ("none", None),
    "int8": ("int8", None),
    "int4-g128": ("int4", 128),
    "int4-g32": ("int4", 32),
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench.quality", description="Measure what quantisation costs in perplexity.")
    parser.add_argument("--model", type=Path, metavar="PATH", help="a checkpoint with its tokenizer")
    parser.add_argument("--name", metavar="NAME", help="its name in the records (default: the path's last part)")
    parser.add_argument("--text", type=Path, action="append", default=[], metavar="FILE", help="may be repeated")
    parser.add_argument("--windows", type=int, metavar="N", help="stop after this many windows of 512 tokens")
    parser.add_argument("--write-docs", action="store_true", help="write the table from the records")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit code."""
    with reported("bench.quality"):
        args = parser().parse_args(argv)
        if args.write_docs and not CHECKOUT:
            raise InputError("--write-docs: expected a checkout, which has docs/formats.md, found an installed package")
        if args.model is not None:
            append(RESULTS / "quality.jsonl", measure(args))
        elif not args.write_docs:
            raise InputError("--model: expected one to measure, or --write-docs, found neither")
        if args.write_docs:
            write_docs()
    return 0


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One record per text, format and way to choose scales."""
    from jllama.cli.perplexity import cut, read_text
    from jllama.cli.perplexity import measure as perplexity
    from jllama.formats import open_source
    from jllama.formats.checkpoint import load
    from jllama.text.tokenizer import tokenizer_for

    source = open_source(args.model)
    tokenizer = tokenizer_for(source)
    window = min(512, source.config.max_seq_len)
    params = load(source, dtype="float32")
    run = start_run("cpu", package_versions(["jax", "numpy"]), {})
    records = []
    for text in args.text:
        windows = cut(tokenizer.encode(read_text(text), bos=False), window, limit=args.windows)
        for dtype, impl in variants():
            result = perplexity(prepared(params, dtype, impl), windows, tokenizer.bos_id)
            print(f"{text.name} {dtype} {impl}: {result.perplexity:.4f}", file=sys.stderr)
            fields = dict(suite="load", case=CASE, impl=impl, model=args.name or args.model.name, dtype=dtype)
            fields |= dict(batch=len(windows), seq=window, context=source.config.max_seq_len, metric="ppl", floor=None)
            fields |= dict(value=result.perplexity, samples=[result.perplexity], text=text.name, tokens=result.tokens)
            records.append(run.record(**fields, interval=list(result.perplexity_interval or ())))
    return records


def variants() -> Iterator[tuple[str, str]]:
    """Every format with our scales, and the quantised ones also with absmax scales."""
    yield from ((dtype, "jllama") for dtype in FORMATS)
    yield from ((dtype, "absmax") for dtype in FORMATS if dtype != "f32")


def prepared(params: "Params", dtype: str, impl: str) -> "Params":
    """The float model with its matrices in the format, quantised with the scales of ``impl``."""
    from pallas_kernels import group_size
    from pallas_kernels.quantized import CLIP_RATIOS, quantize

    quant, group = FORMATS[dtype]
    if quant == "none":
        return params

    ratios = (1.0,) if impl == "absmax" else CLIP_RATIOS

    def rounded(w: Any) -> Any:
        size = None if group is None else group_size(w.shape[-1], group)
        return quantize(w, quant, group=size, ratios=ratios)

    names = ("wqkv", "wo", "w_gate_up", "w_down")
    layers = tuple(
        dataclasses.replace(layer, **{name: rounded(getattr(layer, name)) for name in names})
        for layer in map(params.layer, range(params.config.n_layers))
    )
    if params.lm_head is not None:
        return dataclasses.replace(params, layers=layers, lm_head=rounded(params.lm_head))
    # An embedding that is the head, too, has 8 bits in every format: `jllama.params.field_format`.
    embed: Any = params.embed
    return dataclasses.replace(params, layers=layers, embed=quantize(embed, "int8", ratios=ratios))


def table(records: list[dict[str, Any]]) -> str:
    """The latest figures of every model and text, beside the perplexity in float32."""
    latest = {(r["model"], r["text"], r["dtype"], r["impl"]): r for r in records}
    lines = [
        "| model | text | tokens | weights | scales | perplexity | to float32 |",
        "|---|---|---:|---|---|---:|---:|",
    ]
    for (model, text, dtype, impl), record in sorted(latest.items(), key=lambda item: _order(item[0])):
        base = latest[model, text, "f32", "jllama"]["value"]
        change = "" if dtype == "f32" else f"{100 * (record['value'] / base - 1):+.2f} %"
        kind = "" if dtype == "f32" else "absmax" if impl == "absmax" else "least squared error"
        lines.append(f"| {model} | {text} | {record['tokens']} | {dtype} | {kind} | {record['value']:.4f} | {change} |")
    return "\n".join(lines)


def _order(key: tuple[str, str, str, str]) -> tuple[str, str, int, bool]:
    model, text, dtype, impl = key
    return model, text, list(FORMATS).index(dtype), impl == "absmax"


def write_docs(path: Path = DOCS, folder: Path = RESULTS) -> None:
    """Replace the table between its two marks."""
    records = [
        r for r in read(folder) if r["case"] == CASE and r["metric"] == "ppl" and r["dtype"] in FORMATS and "text" in r
    ]
    text = path.read_text()
    if BEGIN not in text or END not in text:
        raise InputError(f"{path}: expected the marks {BEGIN!r} and {END!r}, found one missing")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    path.write_text(f"{before}{BEGIN}\n{table(records)}\n{END}{after}")


if __name__ == "__main__":
    sys.exit(main())

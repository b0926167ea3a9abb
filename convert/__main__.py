"""``python -m convert SRC DST``: convert a checkpoint from any supported format to another."""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from jllama.cli.options import Parser
from jllama.errors import InputError, reported

if TYPE_CHECKING:
    from jllama.formats.native import Export
    from jllama.formats.source import Source

PROGRAM = "jllama convert"
FORMS = ("native", "hf", "llama2c", "gguf")
DTYPES = ("float32", "bfloat16", "float16")


def parser() -> Parser:
    """The command's flags."""
    parser = Parser(
        prog=PROGRAM,
        description="Convert a checkpoint. SRC may be a Hugging Face, Meta, llama2.c, GGUF or native checkpoint.",
    )
    parser.add_argument("source", type=Path, metavar="SRC", help="checkpoint: a directory, .gguf or llama2.c's .bin")
    parser.add_argument("destination", type=Path, metavar="DST", help="path to write (with --check: to compare with)")
    parser.add_argument("--to", choices=FORMS, help="output format (default: by DST's suffix, else native)")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of unquantised weights (default: unchanged)")
    parser.add_argument("--quant", choices=("none", "int8", "int4"), default="none", help="quantise the weights")
    parser.add_argument("--group", type=int, metavar="N", help="with --quant: number of inputs that share a scale")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="tokenizer (default: SRC's own)")
    parser.add_argument("--force", action="store_true", help="replace DST if it exists")
    parser.add_argument("--check", action="store_true", help="compare SRC and DST, and write nothing")
    parser.add_argument("-q", "--quiet", action="store_true", help="print only errors and warnings")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit code."""
    args = parser().parse_args(argv)
    with reported(PROGRAM):
        return check(args) if args.check else convert(args)


def convert(args: argparse.Namespace) -> int:
    """Convert SRC to DST. Returns the exit code."""
    from convert.progress import watched
    from jllama.formats import open_source
    from jllama.formats.native import save
    from jllama.formats.replaceable import check_place
    from jllama.text.tokenizer import with_tokenizer

    to = args.to or {".gguf": "gguf", ".bin": "llama2c"}.get(args.destination.suffix, "native")
    if args.group is not None and args.quant == "none":
        raise InputError("--group: expected --quant int8 or int4 with it, found none")
    if args.group is not None and args.group not in (32, 64, 128) and to == "native":
        raise InputError(f"--group: expected 32, 64 or 128, found {args.group}")
    source = with_tokenizer(open_source(args.source), args.tokenizer)
    export = plan(source, to, args)
    replaced = check_place(args.destination, export.form, reads=[args.source], force=args.force)
    if replaced and not args.quiet:
        print(f"{PROGRAM}: replaces {args.destination}, {replaced}", file=sys.stderr)
    with watched(export.nbytes, PROGRAM, quiet=args.quiet) as watch:
        save(export, args.destination, reads=[args.source], force=args.force, watch=watch)
    if not args.quiet:
        own, why = _carried(source, to, args.destination)
        tokenizer = "with its tokenizer" if own else f"without a tokenizer{'' if why is None else f' ({why})'}"
        print(f"{args.destination}: {to}, {export.nbytes / 1e6:.1f} MB, {tokenizer}")
    return 0


def _carried(source: "Source", to: str, destination: Path) -> tuple[object, str | None]:
    """The tokenizer that goes into a form, if any; and why one that is there does not."""
    from convert.to_gguf import carried
    from jllama.formats.vocabulary import vocabulary_of

    if to == "gguf":
        return carried(source)
    if to == "llama2c":  # a directory holds sentencepiece's, a file none
        return (None if destination.is_file() else vocabulary_of(source.tokenizer)), None
    return source.tokenizer, None


def plan(source: "Source", to: str, args: argparse.Namespace) -> "Export":
    """The export for the flags, or an `InputError` if the format cannot represent it."""
    from convert.to_gguf import gguf
    from convert.to_llama2c import llama2c
    from jllama.formats.native import directory, hf_directory
    from jllama.formats.transform import as_floats, with_dtype

    if to == "llama2c":
        if args.quant == "int4" or args.dtype not in (None, "float32"):
            raise InputError("--to llama2c: expected float32 or --quant int8, found another dtype")
        if args.group is not None and args.group < 1:
            raise InputError(f"--group: expected a positive number, found {args.group}")
        as_file = args.destination.suffix == ".bin"
        return llama2c(source, int8=args.quant == "int8", group=args.group, directory=not as_file)
    if args.quant != "none" and to != "native":
        raise InputError(f"--quant: expected --to native (or int8 with llama2c), found --to {to}")
    if to == "native":
        if args.quant == "none":
            return directory(with_dtype(source, args.dtype))
        from convert.quantize import quantised

        return directory(quantised(with_dtype(source, args.dtype), args.quant, args.group))
    floats = as_floats(source, args.dtype)
    return gguf(floats) if to == "gguf" else hf_directory(floats)


def check(args: argparse.Namespace) -> int:
    """Compare SRC and DST. Returns 1 if they differ by more than the rounding of their formats."""
    import numpy as np

    from convert.check import compare_logits, compare_tensors, tolerance
    from jllama.formats import open_source

    a, b = open_source(args.source), open_source(args.destination)
    if args.tokenizer is not None:
        a = dataclasses.replace(a, tokenizer=args.tokenizer)
    allowed, count, same, worst = tolerance(a, b), 0, 0, 0.0
    for difference in compare_tensors(a, b):
        count, same, worst = count + 1, same + difference.same, float(np.maximum(worst, difference.relative))
        if not difference.same and not args.quiet:
            print(f"{difference.name}: relative {difference.relative:.3g}, largest {difference.largest:.3g}")
    print(f"tensors: {same} of {count} the same, largest relative difference {worst:.3g} ({allowed:.3g} expected)")
    logits = compare_logits(a, b)
    print(
        f"logits: largest difference {logits.largest:.3g} (their standard deviation is {logits.spread:.3g}), "
        f"{logits.agreeing} of {logits.tokens} likeliest tokens agree"
    )
    return 0 if worst <= allowed else 1


if __name__ == "__main__":
    sys.exit(main())

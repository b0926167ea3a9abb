"""The flags that the command lines share. Nothing heavy is imported here: ``--help`` answers at once."""

import argparse
from typing import Any

from jllama.demo_model import DEMO


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that say which model runs, and how."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "-m", "--model", default=str(DEMO), metavar="PATH", help="checkpoint (default: the embedded demo)"
    )
    group.add_argument("--tokenizer", metavar="FILE", help="tokenizer (default: the checkpoint's own)")
    group.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of activations and cache")
    group.add_argument("--quant", choices=("none", "int8", "int4"), default="none", help="quantise the weights at load")
    group.add_argument("--backend", choices=("auto", "xla", "pallas"), default="auto", help="kernels (default: auto)")
    group.add_argument(
        "-c", "--max-seq-len", type=int, metavar="N", help="context, prompt included (default: the model's)"
    )
    group.add_argument("--compilation-cache", metavar="DIR", help="where compiled programs are kept between runs")
    group.add_argument("--no-compilation-cache", action="store_true", help="compile anew")


def add_sampling_flags(parser: argparse.ArgumentParser, temperature: float) -> None:
    """Flags that say how tokens are drawn."""
    group = parser.add_argument_group("sampling")
    help_temperature = f"0: greedy (default: {temperature:g})"
    group.add_argument(
        "--temp",
        "--temperature",
        dest="temperature",
        type=float,
        default=temperature,
        metavar="T",
        help=help_temperature,
    )
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="draw among the K likeliest (0: off)")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw among those that make up P (1: off)")
    group.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="drop those below P times the likeliest (0: off)"
    )
    group.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1: repeat less (1: off)"
    )
    group.add_argument("-s", "--seed", type=int, default=0, help="same seed, same text (default: 0)")
    group.add_argument("-n", "--max-new-tokens", type=int, default=256, metavar="N", help="default: 256")
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="stop before this text; may be repeated"
    )


def sampling_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling flags as arguments of `make_sampling`; an `InputError` names the flag that is out of range."""
    from jllama.errors import InputError
    from jllama.sampling import check_setting

    if args.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens: expected at least 1, found {args.max_new_tokens}")
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    for name in names:
        try:
            check_setting(name, getattr(args, name))
        except InputError as error:
            raise InputError(f"--{str(error).replace('_', '-', 1) if '_' in name else error}") from None
    return {name: getattr(args, name) for name in names}

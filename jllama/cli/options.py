"""The flags that the command lines share. Nothing heavy is imported here, so that ``--help`` is fast."""

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn

import jllama
from jllama.demo_model import DEMO
from jllama.errors import InputError, quiet_pipe

# Flags of other programs that do not exist here -> what to use instead.
FOREIGN = {
    "--n-ctx": "--max-seq-len",
    "--num-predict": "--max-new-tokens",
    "--interactive": "the command jllama chat",
    "--ubatch-size": "--slots",
    "--device": "JAX_PLATFORMS=cpu or JAX_PLATFORMS=cuda in the environment",
}


class Parser(argparse.ArgumentParser):
    """An argument parser with one-line errors. For an unknown flag, it suggests the most similar one."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)
        self.add_argument("--version", action="version", version=version_line(), help="print the versions and exit")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # pyright: ignore
        """Parse the arguments. On an error, print one line on stderr and exit with code 2."""
        given = sys.argv[1:] if args is None else list(args)
        for text in given:
            self._check_text(text)
        for text in given[: given.index("--") if "--" in given else None]:
            flag = text.partition("=")[0]
            # Checked before argparse does, which would report a misspelt required flag as missing.
            if flag.startswith("--") and " " not in text and flag not in self._option_string_actions:
                self._no_such_flag(flag)
        values, unknown = self.parse_known_args(given, namespace)
        if unknown:
            flag = next((text for text in unknown if text.startswith("-")), unknown[0])
            self._no_such_flag(flag.partition("=")[0])
        return values

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Exit, after ``--help`` or ``--version`` has printed, too."""
        with quiet_pipe():
            super().exit(status, message)

    def error(self, message: str) -> NoReturn:
        """Print one line on stderr and exit with code 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.removeprefix('argument ').split())}\n")

    def _no_such_flag(self, flag: str) -> NoReturn:
        self.error(f"{flag}: no such flag; {self._advice(flag)}")

    def _advice(self, flag: str) -> str:
        if flag in FOREIGN:
            return f"use {FOREIGN[flag]} instead"
        near = difflib.get_close_matches(flag, self._option_string_actions, n=1, cutoff=0.6)
        return f"did you mean {near[0]}?" if near else "--help lists them; text that begins with '-' goes after '--'"

    def _check_text(self, text: str) -> None:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # Python decodes bytes that are not UTF-8 to lone surrogates
            shown = text.encode(errors="backslashreplace").decode().replace("\\udc", "\\x")
            byte = os.fsencode(text[error.start])[0]
            self.error(f"'{shown[:60]}': expected UTF-8 text, found byte 0x{byte:02x}")


def version_line() -> str:
    """The versions that a bug report needs."""
    try:
        jax = version("jax")
    except PackageNotFoundError:
        jax = "missing"
    return f"jllama {jllama.__version__} (jax {jax}, Python {sys.version.split()[0]})"


def add_model_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the flags that select a model and how it runs. Returns their group."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "-m",
        "--model",
        default=str(DEMO),
        metavar="PATH",
        help="checkpoint: a path, smollm2, or a repository (default: the demo)",
    )
    group.add_argument("--follow-links", action="store_true", help="links may point outside the checkpoint's directory")
    help_lora = "merge this PEFT adapter, multiplied by WEIGHT (default: 1); may be repeated"
    group.add_argument("--lora", action="append", default=[], metavar="DIR[=WEIGHT]", help=help_lora)
    group.add_argument("--tokenizer", metavar="FILE", help="tokenizer (default: the checkpoint's own)")
    group.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="dtype of activations and cache")
    group.add_argument("--quant", choices=("none", "int8", "int4"), default="none", help="quantise the weights at load")
    group.add_argument(
        "--backend", choices=("auto", "xla", "pallas"), default="auto", help="implementation of the ops (default: auto)"
    )
    help_context = "context length, including the prompt (default: the model's)"
    group.add_argument("-c", "--max-seq-len", "--max-len", "--ctx-size", type=int, metavar="N", help=help_context)
    help_tp = "divide the model's weights over N devices (tensor parallel; default: 1)"
    group.add_argument("--tp", "--tensor-parallel-size", type=int, default=1, metavar="N", help=help_tp)
    help_dp = "divide the prompts over N groups of devices, each with the whole model (data parallel; default: 1)"
    group.add_argument("--dp", "--data-parallel-size", type=int, default=1, metavar="N", help=help_dp)
    group.add_argument("-t", "--threads", type=int, metavar="N", help="number of CPU cores to use (default: all)")
    help_layers = "accepted but has no effect: the whole model runs on the device that JAX finds"
    group.add_argument("-ngl", "--gpu-layers", "--n-gpu-layers", metavar="N", help=help_layers)
    group.add_argument(
        "--compilation-cache", metavar="DIR", help="directory for compiled programs, which later runs reuse"
    )
    group.add_argument("--no-compilation-cache", action="store_true", help="do not read or write compiled programs")
    return group


def add_process_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags for a run of several processes, each with some of the devices."""
    group = parser.add_argument_group("several processes (all run the same command, and process 0 prints)")
    help_coordinator = "where process 0 listens for the others: a free port of its host; auto: jax asks the cluster, "
    help_coordinator += "such as Slurm, for all three flags"
    group.add_argument("--coordinator", metavar="HOST:PORT", help=help_coordinator)
    group.add_argument("--num-processes", type=int, metavar="N", help="how many processes there are")
    group.add_argument("--process-id", type=int, metavar="I", help="which of them this is, from 0")


def add_sampling_flags(parser: argparse.ArgumentParser, temperature: float) -> None:
    """Add the flags for sampling."""
    group = parser.add_argument_group("sampling")
    help_temperature = f"temperature, 0: greedy (default: {temperature:g})"
    group.add_argument(
        "--temp",
        "--temperature",
        dest="temperature",
        type=float,
        default=temperature,
        metavar="T",
        help=help_temperature,
    )
    group.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="sample from the K most likely tokens (0: off)"
    )
    help_top_p = "sample from the likeliest tokens whose total probability is P (1: off)"
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help=help_top_p)
    help_min_p = "drop tokens whose probability is below P times the largest (0: off)"
    group.add_argument("--min-p", type=float, default=0.0, metavar="P", help=help_min_p)
    help_penalty = "values above 1 reduce repetition (1: off)"
    group.add_argument(
        "--repetition-penalty", "--repeat-penalty", type=float, default=1.0, metavar="R", help=help_penalty
    )
    help_presence = "subtract P from the logit of every token drawn so far (0: off)"
    group.add_argument("--presence-penalty", type=float, default=0.0, metavar="P", help=help_presence)
    help_frequency = "subtract P from the logit of a token for each time it was drawn (0: off)"
    group.add_argument("--frequency-penalty", type=float, default=0.0, metavar="P", help=help_frequency)
    help_bias = "add BIAS to the logit of the token with this id; -inf bans it; may be repeated"
    group.add_argument("--logit-bias", action="append", default=[], metavar="ID=BIAS", help=help_bias)
    group.add_argument(
        "-s", "--seed", type=int, default=0, help="random seed; the same seed gives the same text (default: 0)"
    )
    names = ("-n", "--max-new-tokens", "--max-tokens", "--n-predict")
    help_tokens = "maximum number of new tokens (default: 256)"
    group.add_argument(*names, type=int, default=256, metavar="N", help=help_tokens)
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end a completion before this text; may be repeated"
    )


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling flags as options of `jllama.LM`. An `InputError` names a flag that is out of range."""
    from jllama.sampling import check_setting

    if args.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens: expected at least 1, found {args.max_new_tokens}")
    if "" in args.stop:
        raise InputError("--stop: expected a text, found an empty one")
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    for name in names:
        try:
            check_setting(name, getattr(args, name))
        except InputError as error:
            raise InputError(f"--{str(error).replace('_', '-', 1) if '_' in name else error}") from None
    more = ("max_new_tokens", "stop", "seed")
    biases = dict(_bias(text) for text in args.logit_bias)
    return {name: getattr(args, name) for name in (*names, *more)} | ({"logit_bias": biases} if biases else {})


def _bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        found = int(token), float(value)
    except ValueError:
        found = -1, 0.0
    if found[0] < 0 or not found[1] < float("inf"):
        raise InputError(f"--logit-bias: expected ID=BIAS, a token's id and a number, found {text!r}")
    return found

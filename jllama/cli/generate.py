"""``python -m jllama.generate`` and ``jllama generate``: text from a prompt, on the command line."""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jllama.cli.options import add_model_flags, add_sampling_flags, sampling_settings
from jllama.errors import InputError, reported


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(prog="jllama generate", description="Generate text with a Llama.")
    parser.add_argument("prompt_words", nargs="*", metavar="PROMPT", help="text to continue ('-': read stdin)")
    parser.add_argument("-p", "--prompt", help="the same as PROMPT")
    parser.add_argument("--prompt-file", type=Path, metavar="FILE", help="a prompt a line, run in batches")
    parser.add_argument("--batch-size", type=int, default=8, metavar="B", help="prompts at once (default: 8)")
    parser.add_argument("--ignore-eos", action="store_true", help="go on past the end-of-sequence token")
    add_sampling_flags(parser, temperature=0.0)
    add_model_flags(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--echo", action="store_true", help="print the prompt, too")
    group.add_argument("--ids", action="store_true", help="print token ids instead of text")
    group.add_argument("--json", action="store_true", help="print a JSON object a prompt")
    group.add_argument("--logprobs", action="store_true", help="with --json: each new token's log-probability")
    group.add_argument("-q", "--quiet", action="store_true", help="nothing on stderr but errors")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit code."""
    args = parser().parse_args(argv)
    with reported("jllama generate"):
        prompts = read_prompts(args)
        if args.batch_size < 1:
            raise InputError(f"--batch-size: expected at least 1, found {args.batch_size}")
        settings = sampling_settings(args)
        from jllama.cli.runtime import as_input_error

        as_input_error(lambda: run(args, prompts, settings))
    return 0


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts that the flags give; none is one empty prompt, from which a model writes what it likes."""
    given = [" ".join(args.prompt_words)] if args.prompt_words else []
    given += [args.prompt] if args.prompt is not None else []
    if len(given) + (args.prompt_file is not None) > 1:
        raise InputError("prompt: expected one of PROMPT, --prompt and --prompt-file, found more")
    if args.prompt_file is None:
        return [sys.stdin.read() if text == "-" else text for text in given or [""]]
    try:
        lines = args.prompt_file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{args.prompt_file}: cannot be read as text: {error}") from None
    if not lines:
        raise InputError(f"{args.prompt_file}: expected a prompt a line, found an empty file")
    return lines


def run(args: argparse.Namespace, prompts: list[str], settings: dict[str, Any]) -> None:
    """Load the model, and print what it makes of the prompts."""
    from jllama.cli.runtime import figures, open_model
    from jllama.sampling import make_sampling
    from jllama.stream import Session, Timings
    from jllama.text.complete import Completion, complete

    batch_size = min(args.batch_size, len(prompts))
    model = open_model(args, batch=batch_size, quiet=args.quiet)
    completions = [Completion(model.tokenizer.encode(text)) for text in prompts]
    total = Timings()
    for at in range(0, len(prompts), batch_size):
        batch = completions[at : at + batch_size]
        session = Session(model.params, model.max_len, len(batch), args.backend)
        sampling = make_sampling(len(batch), seed=args.seed + at, **settings)
        pieces = complete(
            session,
            model.tokenizer,
            batch,
            max_new_tokens=args.max_new_tokens,
            sampling=sampling,
            stop_ids=() if args.ignore_eos else model.params.config.eos_ids,
            stop=args.stop,
        )
        show(args, prompts[at : at + batch_size], batch, pieces)
        total += session.timings
        if args.json:
            spent = timings(model.load_seconds, session.timings)
            report = {"timings": spent, "backend": backend_report(session.backends)}
            for completion in batch:
                print(json.dumps(as_json(completion, args.logprobs) | report), flush=True)
    if not args.quiet:
        print(figures(model.params, total), file=sys.stderr)


def show(args: argparse.Namespace, prompts: list[str], batch: list[Any], pieces: Iterator[tuple[int, str]]) -> None:
    """Print text as it comes, or, for several prompts at once, one completion after another."""
    alone = len(batch) == 1 and not args.json and not args.ids
    if alone and args.echo:
        print(prompts[0], end="", flush=True)
    for _, text in pieces:
        if alone:
            print(text, end="", flush=True)
    if alone:
        print()
    elif not args.json:
        for prompt, completion in zip(prompts, batch, strict=True):
            if args.ids:
                print(*(completion.prompt_ids if args.echo else []), *completion.ids)
            else:
                print((prompt if args.echo else "") + completion.text, end="\n\n", flush=True)


def timings(load_seconds: float, timings: Any) -> dict[str, float]:
    """The seconds and rates of a run, for ``--json``."""
    return {
        "load_s": round(load_seconds, 4),
        "compile_s": round(timings.compile, 4),
        "prefill_s": round(timings.prefill, 6),
        "decode_s": round(timings.decode, 6),
        "prompt_tokens": timings.prompt_tokens,
        "new_tokens": timings.new_tokens,
        "tokens_per_s": round(timings.decode_rate, 3),
    }


def backend_report(backends: dict[str, Any]) -> dict[str, Any]:
    """The backend of every op that ran, for ``--json``."""
    return {phase: {op: asdict(choice) for op, choice in ops.items()} for phase, ops in backends.items()}


def as_json(completion: Any, logprobs: bool) -> dict[str, Any]:
    """A completion as a JSON object."""
    out = asdict(completion)
    if not logprobs:
        del out["logprobs"]
    return out

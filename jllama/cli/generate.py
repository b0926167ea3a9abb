"""``jllama generate`` and ``python -m jllama.generate``: generate text from prompts."""

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jllama.cli import inputs
from jllama.cli.options import Parser, add_model_flags, add_process_flags, add_sampling_flags, sampling_options
from jllama.cli.progress import Progress
from jllama.errors import InputError, reported

if TYPE_CHECKING:
    from jllama.cli.runtime import Opened
    from jllama.engine.request import Completion
    from jllama.stream import Timings


def parser() -> Parser:
    """The command's flags."""
    parser = Parser(prog="jllama generate", description="Generate text with a Llama.")
    parser.add_argument(
        "prompt_words",
        nargs="*",
        metavar="PROMPT",
        help="text to continue (default if the input is piped, or '-': standard input)",
    )
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="the same as PROMPT")
    parser.add_argument("-f", "--file", type=Path, metavar="FILE", help="use the whole file as a prompt ('-': stdin)")
    parser.add_argument("--prompt-file", type=Path, metavar="FILE", help="a file with many prompts ('-': stdin)")
    parser.add_argument(
        "--prompt-format",
        choices=("lines", "jsonl"),
        help="format of --prompt-file: one prompt per line, or JSON lines, each a string or an object with a prompt "
        "(default: jsonl if the file has this suffix)",
    )
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="completions per prompt (default: 1)")
    help_slots = "completions that run at a time (default: 16 on a CPU, 64 on a GPU)"
    parser.add_argument("--slots", "--batch-size", type=int, metavar="N", help=help_slots)
    parser.add_argument("--ignore-eos", action="store_true", help="continue after the end-of-sequence token")
    help_schema = "the completion is JSON of the schema in this file (needs llguidance)"
    parser.add_argument("--json-schema", type=Path, metavar="FILE", help=help_schema)
    help_regex = "the completion matches this expression as a whole (needs llguidance)"
    parser.add_argument("--regex", metavar="REGEX", help=help_regex)
    add_sampling_flags(parser, temperature=0.0)
    add_model_flags(parser)
    add_process_flags(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--echo", action="store_true", help="also print the prompt")
    group.add_argument("--ids", action="store_true", help="print token ids instead of text, one completion per line")
    group.add_argument("--jsonl", action="store_true", help="print one JSON object per completion when it is finished")
    group.add_argument("--json", action="store_true", help="print one JSON object: completions, timings, backends")
    help_logprobs = "with --json or --jsonl: include the log-probability of each new token"
    group.add_argument("--logprobs", action="store_true", help=help_logprobs)
    group.add_argument("-q", "--quiet", action="store_true", help="print only errors on stderr")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit code."""
    args = parser().parse_args(argv)
    with reported("jllama generate"):
        check(args)
        options = sampling_options(args) | {"ignore_eos": args.ignore_eos} | constraint_options(args)
        prompts = read_prompts(args) if args.coordinator is None else None  # before anything slow is imported
        from jllama.cli.processes import from_first, together
        from jllama.cli.runtime import as_input_error

        with together(args):
            given = from_first(lambda: read_prompts(args)) if prompts is None else prompts
            as_input_error(lambda: run(args, given, options))
    return 0


def check(args: argparse.Namespace) -> None:
    """Raise `InputError` for flags that cannot be combined, before anything is read or loaded."""
    for name in ("slots", "samples"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise InputError(f"--{name}: expected at least 1, found {value}")
    as_json = args.json or args.jsonl
    for wrong, message in (
        (args.json and args.jsonl, "--json: expected without --jsonl, found both"),
        (args.logprobs and not as_json, "--logprobs: expected --json or --jsonl with it, found neither"),
        (args.ids and as_json, "--ids: expected without --json and --jsonl, which hold the ids anyway"),
        (args.echo and as_json, "--echo: expected without --json and --jsonl, which hold the prompt anyway"),
        (args.json_schema and args.regex is not None, "--regex: expected without --json-schema, found both"),
        (args.prompt_format and not args.prompt_file, "--prompt-format: expected --prompt-file with it, found none"),
        (
            args.samples > 1 and args.temperature == 0,
            "--samples: expected --temp above 0 with it (all samples would be alike), found 0",
        ),
    ):
        if wrong:
            raise InputError(message)


def constraint_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `jllama.LM` for what a completion must be."""
    if args.json_schema is not None:
        return {"json_schema": inputs.read_text(args.json_schema)}
    return {} if args.regex is None else {"regex": args.regex}


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts from the flags or from a pipe. Without any, the result is one empty prompt."""
    words = " ".join(args.prompt_words) if args.prompt_words else None
    given = [source for source in (words, args.prompt, args.file, args.prompt_file) if source is not None]
    if len(given) > 1:
        raise InputError("prompt: expected one of PROMPT, --prompt, --file and --prompt-file, found more")
    if args.prompt_file is not None:
        where = "standard input" if str(args.prompt_file) == "-" else str(args.prompt_file)
        as_json = (args.prompt_format or args.prompt_file.suffix.removeprefix(".")) == "jsonl"
        return (inputs.json_lines if as_json else inputs.lines)(inputs.read_text(args.prompt_file), where)
    if args.file is not None:
        return [inputs.without_newline(inputs.read_text(args.file))]
    piped = sys.stdin is not None and not sys.stdin.isatty()
    if words == "-" or (not given and piped):
        return [inputs.without_newline(inputs.read_stdin())]
    return given or [""]


@dataclass(frozen=True)
class Task:
    """A completion to generate: the index of its prompt, and of the sample for this prompt."""

    prompt: int
    sample: int
    text: str
    completion: "Completion"


def run(args: argparse.Namespace, prompts: list[str], options: dict[str, Any]) -> None:
    """Load the model, generate, and print the completions."""
    from jllama.cli.runtime import figures, open_model, quicker
    from jllama.decode import check_prompts
    from jllama.engine.request import Completion

    model = open_model(args, quiet=args.quiet)
    lm = model.lm
    ids = [lm.tokenizer.encode(text) for text in prompts]
    check_prompts(ids, lm.max_len - 1, "one less than the context", lm.params.config)
    tasks = [Task(i, j, prompts[i], Completion(ids[i])) for i in range(len(prompts)) for j in range(args.samples)]
    printer = Printer(args, tasks)
    try:
        printer.show(lm.complete([task.completion for task in tasks], slots=args.slots, **options))
    finally:
        printer.close()
    if args.json:
        done = [as_json(args, task) for task in tasks]
        print(json.dumps({"completions": done, **describe(args, model, lm.timings)}))
    if not args.quiet:
        print(figures(lm.params, lm.timings) + quicker(lm.params), file=sys.stderr)


class Printer:
    """Prints completions in order, each when it and all before it are finished. A completion that is alone is printed
    while it is generated."""

    def __init__(self, args: argparse.Namespace, tasks: list[Task]) -> None:
        self._args, self._tasks, self._printed = args, tasks, 0
        self._alone = len(tasks) == 1  # then tokens are counted; their number is not known, so the total is the maximum
        self._streams = self._alone and not (args.json or args.jsonl or args.ids)
        visible = self._streams and sys.stdout.isatty()  # the text itself shows the progress
        unit, size = ("token", args.max_new_tokens) if self._alone else ("completion", len(tasks))
        self._progress = Progress(size, unit, quiet=args.quiet or visible)

    def show(self, pieces: Iterable[tuple[int, str]]) -> None:
        """Run the completions and print them."""
        if self._streams:
            self._print_head(self._tasks[0])
        done = 0
        for i, text in pieces:
            completion = self._tasks[i].completion
            if self._streams:
                print(text, end="", flush=True)
            if self._alone:
                self._progress.add(len(completion.ids) - done)
                done = len(completion.ids)
            elif completion.finish_reason:
                self._progress.add(1)
                self._print_finished()
        if self._streams:
            print(flush=True)
        else:
            self._print_finished()

    def _print_finished(self) -> None:
        while self._printed < len(self._tasks) and self._tasks[self._printed].completion.finish_reason:
            task = self._tasks[self._printed]
            if self._args.ids:
                before = task.completion.prompt_ids if self._args.echo else []
                print(*before, *task.completion.ids, flush=True)
            elif self._args.jsonl:
                print(json.dumps(as_json(self._args, task)), flush=True)
            elif not self._args.json:
                self._print_head(task)
                print(task.completion.text, flush=True)
            self._printed += 1

    def _print_head(self, task: Task) -> None:
        """Print an empty line between two completions, and the prompt with ``--echo``."""
        print(("\n" if self._printed else "") + (task.text if self._args.echo else ""), end="", flush=True)

    def close(self) -> None:
        """Remove the progress bar."""
        self._progress.close()


def as_json(args: argparse.Namespace, task: Task) -> dict[str, Any]:
    """A completion as a JSON object."""
    names = ("prompt_ids", "ids", *(("logprobs",) if args.logprobs else ()), "text", "finish_reason")
    values = {name: getattr(task.completion, name) for name in names}
    return {"index": task.prompt, "sample": task.sample, "prompt": task.text, **values}


def describe(args: argparse.Namespace, model: "Opened", total: "Timings") -> dict[str, Any]:
    """The part of ``--json`` about the whole run: the model, the timings, and the backend of every op."""
    return {
        "model": {
            "path": args.model,
            "format": model.source.form,
            "dtype": str(model.lm.params.dtype),
            "quant": args.quant,
        },
        "timings": timings(model.load_seconds, total),
        "backend": {
            phase: {op: asdict(choice) for op, choice in ops.items()} for phase, ops in model.lm.backends.items()
        },
    }


def timings(load_seconds: float, timings: "Timings") -> dict[str, float]:
    """The timings and rates of a run, for ``--json``."""
    return {
        "load_s": round(load_seconds, 4),
        "compile_s": round(timings.compile, 4),
        "prefill_s": round(timings.prefill, 6),
        "decode_s": round(timings.decode, 6),
        "prompt_tokens": timings.prompt_tokens,
        "new_tokens": timings.new_tokens,
        "tokens_per_s": round(timings.decode_rate, 3),
    }


if __name__ == "__main__":
    sys.exit(main())

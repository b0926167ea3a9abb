"""The console script ``jllama``. Each subcommand has its own module.

Other packages add subcommands as entry points of the group ``jllama.commands``. `convert` does so; therefore nothing
here imports it.
"""

import difflib
import importlib
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from types import ModuleType

from jllama.errors import quiet_pipe

COMMANDS = {
    "generate": ("jllama.cli.generate", "generate text from prompts"),
    "chat": ("jllama.cli.chat", "chat with a model in the terminal"),
    "serve": ("jllama.cli.serve", "serve a model over HTTP, with OpenAI's API"),
    "info": ("jllama.cli.info", "describe a checkpoint and how it would run on this machine"),
    "perplexity": ("jllama.cli.perplexity", "measure how well a model predicts a text"),
}
ADDED = {
    "convert": "convert a checkpoint to another format",
    "quantize": "quantise a checkpoint to int8 or int4",
}
NAMES = (*COMMANDS, *ADDED)


def main(argv: list[str] | None = None) -> int:
    """Run the subcommand that the first argument names."""
    with quiet_pipe():
        return _run(sys.argv[1:] if argv is None else argv)


def _run(argv: list[str]) -> int:
    match argv:
        case ["-h" | "--help" | "help", *_] | []:
            print(usage())
            return 0
        case ["--version", *_]:
            from jllama.cli.options import version_line

            print(version_line())
            return 0
        case ["--completion", *shells]:
            from jllama.cli.completion import script

            return _print_result(script(shells[0] if shells else ""))
        case _:
            command = _command(argv[0])
            return _print_result(_unknown(argv[0])) if command is None else command(argv[1:]) or 0


def usage() -> str:
    """The text of ``jllama --help``."""
    texts = {name: text for name, (_, text) in COMMANDS.items()} | ADDED
    width = max(map(len, texts))
    lines = "\n".join(f"  {name:<{width}}  {text}" for name, text in texts.items())
    return (
        "usage: jllama COMMAND ...\n\nLlama inference inside JAX.\n\n"
        f"commands:\n{lines}\n\n"
        "  --version           print the versions\n"
        "  --completion SHELL  print the completion script for bash, zsh or fish\n\n"
        "'jllama COMMAND --help' lists the flags of a command."
    )


def _print_result(result: str | ValueError) -> int:
    """Print a result on stdout, or an error on stderr. Returns the exit code."""
    failed = isinstance(result, ValueError)
    print(f"jllama: error: {result}" if failed else result, file=sys.stderr if failed else sys.stdout)
    return 2 if failed else 0


def _unknown(name: str) -> ValueError:
    near = difflib.get_close_matches(name, NAMES, n=1)
    advice = f"; did you mean {near[0]}?" if near else ""
    return ValueError(f"command: expected one of {', '.join(NAMES)}, found {name!r}{advice}")


def _command(name: str) -> Callable[[list[str]], int | None] | None:
    if name in COMMANDS:
        return importlib.import_module(COMMANDS[name][0]).main
    added = entry_points(group="jllama.commands", name=name)
    return next((entry.load() for entry in added), None)


def command_modules() -> dict[str, ModuleType]:
    """The modules of all installed subcommands."""
    commands = {name: command for name in NAMES if (command := _command(name)) is not None}
    return {name: sys.modules[command.__module__] for name, command in commands.items()}

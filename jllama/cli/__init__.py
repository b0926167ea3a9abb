"""The console script ``jllama``: one command, its subcommands in modules of their own.

Other packages add subcommands as entry points of the group ``jllama.commands``, as `convert` does: so nothing here
imports them.
"""

import difflib
import importlib
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from types import ModuleType

COMMANDS = {
    "generate": ("jllama.cli.generate", "text from a prompt"),
    "chat": ("jllama.cli.chat", "a conversation with a chat model"),
    "info": ("jllama.cli.info", "what a checkpoint is, and how it would run here"),
    "perplexity": ("jllama.cli.perplexity", "how well a model predicts a text"),
}
ADDED = {
    "convert": "a checkpoint from one format to another",
    "quantize": "a checkpoint to int8 or int4",
}
NAMES = (*COMMANDS, *ADDED)


def main(argv: list[str] | None = None) -> int:
    """Run the subcommand that the first argument names."""
    argv = sys.argv[1:] if argv is None else argv
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

            return _said(script(shells[0] if shells else ""))
        case _:
            command = _command(argv[0])
            return _said(_unknown(argv[0])) if command is None else command(argv[1:]) or 0


def usage() -> str:
    """What ``jllama --help`` prints."""
    texts = {name: text for name, (_, text) in COMMANDS.items()} | ADDED
    width = max(map(len, texts))
    lines = "\n".join(f"  {name:<{width}}  {text}" for name, text in texts.items())
    return (
        "usage: jllama COMMAND ...\n\nLlama inference inside JAX.\n\n"
        f"commands:\n{lines}\n\n"
        "  --version           print the versions\n"
        "  --completion SHELL  print what makes bash, zsh or fish complete commands and flags\n\n"
        "'jllama COMMAND --help' tells more."
    )


def _said(answer: str | ValueError) -> int:
    """Print an answer, or the reason why there is none."""
    refused = isinstance(answer, ValueError)
    print(f"jllama: error: {answer}" if refused else answer, file=sys.stderr if refused else sys.stdout)
    return 2 if refused else 0


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
    """The module of every subcommand that is installed."""
    commands = {name: command for name in NAMES if (command := _command(name)) is not None}
    return {name: sys.modules[command.__module__] for name, command in commands.items()}

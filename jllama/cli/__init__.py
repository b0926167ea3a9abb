"""The console script ``jllama``: one command, its subcommands in modules of their own.

Other packages add subcommands as entry points of the group ``jllama.commands``, as `convert` does: so nothing here
imports them.
"""

import importlib
import sys
from collections.abc import Callable
from importlib.metadata import entry_points

COMMANDS = {
    "generate": ("jllama.cli.generate", "text from a prompt"),
    "chat": ("jllama.cli.chat", "a conversation with a chat model"),
    "perplexity": ("jllama.cli.perplexity", "how well a model predicts a text"),
}
ADDED = {
    "convert": "a checkpoint from one format to another",
    "quantize": "a checkpoint to int8 or int4",
}


def main(argv: list[str] | None = None) -> int:
    """Run the subcommand that the first argument names."""
    argv = sys.argv[1:] if argv is None else argv
    command = _command(argv[0]) if argv else None
    if command is not None:
        return command(argv[1:]) or 0
    texts = {name: text for name, (_, text) in COMMANDS.items()} | ADDED
    asked = bool(argv) and argv[0] in ("-h", "--help", "help")
    if argv and not asked:
        print(f"jllama: error: command: expected one of {', '.join(texts)}, found {argv[0]!r}", file=sys.stderr)
        return 2
    width = max(map(len, texts))
    print("usage: jllama COMMAND ...\n\nLlama inference inside JAX.\n\ncommands:")
    print("\n".join(f"  {name:<{width}}  {text}" for name, text in texts.items()))
    print("\n'jllama COMMAND --help' tells more.")
    return 0


def _command(name: str) -> Callable[[list[str]], int | None] | None:
    if name in COMMANDS:
        return importlib.import_module(COMMANDS[name][0]).main
    added = entry_points(group="jllama.commands", name=name)
    return next((entry.load() for entry in added), None)

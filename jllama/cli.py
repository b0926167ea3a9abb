"""The console script ``jllama``: one command, its subcommands in modules of their own."""

import importlib
import sys

COMMANDS = {
    "generate": ("jllama.generate_command", "text from a prompt"),
    "chat": ("jllama.chat", "a conversation with a Llama-2 chat model"),
    "convert": ("convert.__main__", "a checkpoint from one format to another"),
    "quantize": ("jllama.quantize", "a checkpoint to int8 or int4"),
    "perplexity": ("jllama.perplexity", "how well a model predicts a text"),
}


def main(argv: list[str] | None = None) -> int:
    """Run the subcommand that the first argument names."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        module = importlib.import_module(COMMANDS[argv[0]][0])
        return module.main(argv[1:]) or 0
    asked = bool(argv) and argv[0] in ("-h", "--help", "help")
    if argv and not asked:
        print(f"jllama: error: command: expected one of {', '.join(COMMANDS)}, found {argv[0]!r}", file=sys.stderr)
        return 2
    width = max(map(len, COMMANDS))
    print("usage: jllama COMMAND ...\n\nLlama-2 inference inside JAX.\n\ncommands:")
    print("\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()))
    print("\n'jllama COMMAND --help' tells more.")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""``python -m jllama.chat``: a conversation in the terminal, in Meta's Llama-2 chat format."""

import argparse
import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jllama.cli.options import add_model_flags, add_sampling_flags, sampling_settings
from jllama.errors import InputError, reported
from jllama.text.dialog import Exchange, dialog_ids

HELP = """\
/system TEXT  set the system prompt (without TEXT: show it); starts anew
/reset        forget the conversation
/save FILE    write the conversation as JSON
/help         this
/quit         leave (or Ctrl-D); Ctrl-C stops an answer"""

MIN_ANSWER = 16  # tokens that an answer must have room for


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="jllama chat", description="Chat with a Llama-2 chat model.", epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    add_sampling_flags(parser, temperature=0.6)
    add_model_flags(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="no figures after an answer")
    parser.set_defaults(top_p=0.9)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit code."""
    args = parser().parse_args(argv)
    with reported("jllama chat"):
        settings = sampling_settings(args)
        from jllama.cli.runtime import as_input_error

        as_input_error(lambda: run(args, settings))
    return 0


@dataclass
class Conversation:
    """What was said."""

    system: str | None = None
    exchanges: list[Exchange] = field(default_factory=list)


class Leave(Exception):
    """The user has had enough."""


def run(args: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Load the model and talk until the user leaves."""
    from jllama.cli.runtime import open_model
    from jllama.stream import Session

    model = open_model(args, quiet=args.quiet)
    session = Session(model.params, model.max_len, backend=args.backend)
    conversation = Conversation(args.system)
    say("chat with " + str(Path(args.model).name) + "; /help tells the commands")
    while True:
        try:
            line = read_line("> ")
            if line.startswith("/"):
                say(command(line, conversation))
            elif line:
                answer(line, conversation, session, model, args, settings)
        except Leave:
            return
        except InputError as error:  # one bad command or question does not end the conversation
            say(f"error: {error}")


def say(text: str) -> None:
    """To the user, not part of the model's text."""
    print(text, file=sys.stderr, flush=True)


def read_line(prompt: str) -> str:
    """A line from the user, with editing and history where it is a terminal; `Leave` at its end."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        if not line:
            raise Leave
        return line.strip()
    import readline  # noqa: F401  (input() uses it)

    try:
        return input(prompt).strip()
    except EOFError:
        print()
        raise Leave from None
    except KeyboardInterrupt:
        print()
        return ""


def command(line: str, conversation: Conversation) -> str:
    """Do what a line that begins with a slash asks; what to tell the user."""
    name, _, argument = line.partition(" ")
    argument = argument.strip()
    match name:
        case "/quit" | "/exit":
            raise Leave
        case "/help":
            return HELP
        case "/reset":
            conversation.exchanges.clear()
            return "forgotten"
        case "/system" if argument:
            conversation.system = argument
            conversation.exchanges.clear()
            return "system prompt set; the conversation starts anew"
        case "/system":
            return conversation.system or "no system prompt"
        case "/save" if argument:
            return save(Path(argument), conversation)
        case "/save":
            raise InputError("/save: expected a file name, found none")
    raise InputError(f"{name}: no such command; /help tells what there is")


def save(path: Path, conversation: Conversation) -> str:
    """Write the conversation to a file that does not exist yet."""
    try:
        with open(path, "x") as file:
            json.dump(asdict(conversation), file, indent=2, ensure_ascii=False)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    return f"saved {len(conversation.exchanges)} exchanges to {path}"


def answer(
    question: str,
    conversation: Conversation,
    session: Any,
    model: Any,
    args: argparse.Namespace,
    settings: dict[str, Any],
) -> None:
    """Let the model answer; Ctrl-C stops it, and what it said until then counts."""
    from jllama.cli.runtime import figures
    from jllama.sampling import make_sampling
    from jllama.text.complete import Completion, complete

    asked = Exchange(question)
    ids = make_room(asked, conversation, model)
    if ids is None:
        return
    completion = Completion(ids)
    pieces = complete(
        session,
        model.tokenizer,
        [completion],
        max_new_tokens=args.max_new_tokens,
        sampling=make_sampling(1, seed=args.seed + len(conversation.exchanges), **settings),
        stop_ids=model.params.config.eos_ids,
        stop=args.stop,
    )
    begun = False
    try:
        for _, text in pieces:
            # The format puts a space before the answer; the terminal needs none.
            print(text if begun else text.lstrip(), end="", flush=True)
            begun = begun or bool(text.strip())
        print()
    except KeyboardInterrupt:
        pieces.close()
        print()
        say("(stopped)")
    conversation.exchanges.append(Exchange(question, completion.text.strip()))
    if completion.finish_reason == "length":
        say(f"(cut off after {len(completion.ids)} tokens)")
    if not args.quiet:
        say(figures(model.params, session.timings))


def make_room(asked: Exchange, conversation: Conversation, model: Any) -> list[int] | None:
    """The ids of the conversation with this question. Where they leave no room for an answer the user chooses what
    goes; None: nothing was asked after all."""
    while True:
        ids = dialog_ids(model.tokenizer, [*conversation.exchanges, asked], conversation.system)
        if len(ids) + MIN_ANSWER <= model.max_len:
            return ids
        if not conversation.exchanges:
            raise InputError(f"question: expected up to {model.max_len - MIN_ANSWER} tokens, found {len(ids)}")
        say(f"the context is full: {len(ids)} tokens and an answer do not fit into {model.max_len}")
        match read_line("[d]rop the oldest exchange, [r]eset the conversation, or [c]ancel the question? ")[:1]:
            case "d":
                del conversation.exchanges[0]
            case "r":
                conversation.exchanges.clear()
            case "c":
                return None


if __name__ == "__main__":
    sys.exit(main())

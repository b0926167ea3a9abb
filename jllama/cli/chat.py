"""``jllama chat``: a conversation in the terminal, in the model's chat format."""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jllama
from jllama.cli.options import Parser, add_model_flags, add_sampling_flags, sampling_options
from jllama.cli.terminal import Cancelled, Leave, history, interactive, read_line, read_message, say
from jllama.errors import InputError, reported
from jllama.text.dialog import Exchange

if TYPE_CHECKING:
    from jllama.cli.runtime import Opened
    from jllama.text.lm import LM
    from jllama.text.templates import Message

HELP = """\
/system TEXT  set the system prompt and restart the conversation; without TEXT: show it
/reset        forget the conversation
/save FILE    write the conversation to FILE as JSON
/help         show this list
/quit         leave (also Ctrl-D); Ctrl-C stops an answer
A line that ends with \\ continues on the next line. Several pasted lines are one message."""

MIN_ANSWER = 16  # number of tokens that must be free for an answer
MENU = "[d]rop the oldest exchange, [r]eset the conversation, or [c]ancel the question? "


def parser() -> Parser:
    """The command's flags."""
    parser = Parser(
        prog="jllama chat", description="Chat with a model.", epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    help_template = "llama-2, plain, or the file of a jinja template (default: the model's own)"
    parser.add_argument("--chat-template", metavar="FORMAT", help=help_template)
    parser.add_argument(
        "--when-full",
        choices=("ask", "drop", "stop"),
        help="what to do when the context is full: ask, drop the oldest exchanges, or stop with an error "
        "(default: ask at a terminal, stop if the input is piped)",
    )
    parser.add_argument("--no-history", action="store_true", help="do not read or write the history of messages")
    add_sampling_flags(parser, temperature=0.6)
    add_model_flags(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="print no banner, and no figures after an answer")
    parser.set_defaults(top_p=0.9)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit code."""
    args = parser().parse_args(argv)
    with reported("jllama chat"):
        options = sampling_options(args)
        if args.when_full == "ask" and not interactive():
            raise InputError("--when-full: expected drop or stop where the input is piped, found ask")
        args.when_full = args.when_full or ("ask" if interactive() else "stop")
        from jllama.cli.runtime import as_input_error

        as_input_error(lambda: run(args, options))
    return 0


@dataclass
class Conversation:
    """The system prompt and the exchanges so far."""

    system: str | None = None
    exchanges: list[Exchange] = field(default_factory=list)

    def messages(self, question: str) -> list["Message"]:
        """The conversation and a new question, as messages for `jllama.LM`."""
        return list(self._messages(question))

    def _messages(self, question: str) -> Iterator["Message"]:
        if self.system:
            yield {"role": "system", "content": self.system}
        for exchange in self.exchanges:
            yield {"role": "user", "content": exchange.question}
            yield {"role": "assistant", "content": exchange.answer or ""}
        yield {"role": "user", "content": question}


class Full(InputError):
    """The context is full, and ``--when-full stop`` applies."""


def run(args: argparse.Namespace, options: dict[str, Any]) -> None:
    """Load the model and talk until the user leaves."""
    from jllama.cli.runtime import open_model

    model = open_model(args, quiet=args.quiet)
    conversation = Conversation(args.system)
    if not args.quiet:
        say(banner(args, model))
        if model.lm.chat_format.note:
            say(model.lm.chat_format.note)
    with history(keep=not args.no_history):
        while True:
            try:
                text = read_message("> ")
                if text.startswith("/"):
                    say(command(text, conversation))
                elif text:
                    answer(text, conversation, model.lm, args, options)
            except Leave:
                return
            except Cancelled:
                say("(Ctrl-D or /quit leaves)")
            except Full:
                raise
            except InputError as error:  # a bad command or question does not end the conversation
                say(f"error: {error}")


def banner(args: argparse.Namespace, model: "Opened") -> str:
    """The banner: the model, its format and dtype, what runs it, and the context."""
    from jllama.cli.runtime import device_line

    params, source = model.lm.params, model.source
    quant = {"none": ""}.get(args.quant, f" weights in {args.quant},")
    if source.quant is not None:
        quant = f" weights in {source.quant.format},"
    what = f"{source.path.name} ({source.form}, {params.config.n_params / 1e6:,.1f} M weights)"
    how = f"{quant} {params.dtype}, {device_line(args.backend, params)}, context {model.lm.max_len:,} tokens"
    return f"jllama {jllama.__version__}: {what},{how}; /help lists the commands"


def command(line: str, conversation: Conversation) -> str:
    """Run a command, which is a line that begins with a slash. Returns a message to the user."""
    name, _, argument = line.partition(" ")
    argument = argument.strip()
    match name:
        case "/quit" | "/exit":
            raise Leave
        case "/help":
            return HELP
        case "/reset":
            conversation.exchanges.clear()
            return "conversation forgotten"
        case "/system" if argument:
            conversation.system = argument
            conversation.exchanges.clear()
            return "system prompt set; the conversation restarts"
        case "/system":
            return conversation.system or "no system prompt"
        case "/save" if argument:
            return save(Path(argument), conversation)
        case "/save":
            raise InputError("/save: expected a file name, found none")
    raise InputError(f"{name}: no such command; /help lists the commands")


def save(path: Path, conversation: Conversation) -> str:
    """Write the conversation to a file that does not exist yet."""
    try:
        with open(path, "x", encoding="utf-8") as file:
            json.dump(asdict(conversation), file, indent=2, ensure_ascii=False)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    return f"saved {len(conversation.exchanges)} exchanges to {path}"


def answer(
    question: str, conversation: Conversation, lm: "LM", args: argparse.Namespace, options: dict[str, Any]
) -> None:
    """Print the model's answer. Ctrl-C stops it; the text until then stays in the conversation."""
    from jllama.cli.runtime import figures
    from jllama.engine.request import Completion

    ids = make_room(question, conversation, lm, args.when_full)
    if ids is None:
        return
    completion = Completion(ids)
    pieces = lm.complete([completion], row=len(conversation.exchanges), chat=True, **options)
    shown = ""
    try:
        for _, text in pieces:
            # Chat formats put white space before the answer, which is not printed.
            new = text if shown else text.lstrip()
            print(new, end="", flush=True)
            shown += new
        print()
    except KeyboardInterrupt:
        pieces.close()
        print()
        say("(stopped)")
        if not shown:
            return  # stopped before the first text: the question is dropped, too
    conversation.exchanges.append(Exchange(question, shown.strip()))
    if completion.finish_reason == "length":
        say(f"(cut off after {len(completion.ids)} tokens)")
    if not args.quiet:
        say(figures(lm.params, lm.timings))


def make_room(question: str, conversation: Conversation, lm: "LM", when_full: str) -> list[int] | None:
    """The ids of the conversation with this question. If they leave no room for an answer, ``when_full`` or the user
    decides what is dropped. None if the user cancels the question."""
    while True:
        ids = lm.prompt_ids(conversation.messages(question))
        if len(ids) + MIN_ANSWER <= lm.max_len:
            return ids
        full = f"the context is full: {len(ids)} tokens and an answer do not fit into {lm.max_len}"
        if not conversation.exchanges:
            raise InputError(f"question: expected up to {lm.max_len - MIN_ANSWER} tokens, found {len(ids)}")
        if when_full == "stop":
            raise Full(f"{full} (--when-full drop forgets the oldest exchange)")
        choice = "d" if when_full == "drop" else ask(full)
        match choice:
            case "d":
                say("(the oldest exchange is forgotten)")
                del conversation.exchanges[0]
            case "r":
                conversation.exchanges.clear()
            case "c":
                return None


def ask(full: str) -> str:
    """Ask the user what to drop. Ctrl-C cancels the question, and /quit leaves."""
    say(full)
    try:
        choice = read_line(MENU).strip()
    except Cancelled:
        return "c"
    if choice in ("/quit", "/exit"):
        raise Leave
    return choice[:1].lower()


if __name__ == "__main__":
    sys.exit(main())

"""``jllama chat``: a conversation in the terminal, in the chat format of the model."""

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
/system TEXT  set the system prompt (without TEXT: show it); starts anew
/reset        forget the conversation
/save FILE    write the conversation as JSON
/help         this
/quit         leave (or Ctrl-D); Ctrl-C stops an answer
A line that ends with \\ goes on in the next; pasted lines are one message."""

MIN_ANSWER = 16  # tokens that an answer must have room for
MENU = "[d]rop the oldest exchange, [r]eset the conversation, or [c]ancel the question? "


def parser() -> Parser:
    """The command's flags."""
    parser = Parser(
        prog="jllama chat", description="Chat with a model.", epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    help_template = "llama-2, plain, or the file of a jinja template (default: as the model says)"
    parser.add_argument("--chat-template", metavar="FORMAT", help=help_template)
    parser.add_argument(
        "--when-full",
        choices=("ask", "drop", "stop"),
        help="what to do when the context is full: ask, drop the oldest exchanges, or stop with an error "
        "(default: ask at a terminal, stop where the input is piped)",
    )
    parser.add_argument("--no-history", action="store_true", help="neither read nor write the history of messages")
    add_sampling_flags(parser, temperature=0.6)
    add_model_flags(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="no banner, and no figures after an answer")
    parser.set_defaults(top_p=0.9)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit code."""
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
    """What was said."""

    system: str | None = None
    exchanges: list[Exchange] = field(default_factory=list)

    def messages(self, question: str) -> list["Message"]:
        """All of it and a question, as `jllama.LM` takes it."""
        return list(self._messages(question))

    def _messages(self, question: str) -> Iterator["Message"]:
        if self.system:
            yield {"role": "system", "content": self.system}
        for exchange in self.exchanges:
            yield {"role": "user", "content": exchange.question}
            yield {"role": "assistant", "content": exchange.answer or ""}
        yield {"role": "user", "content": question}


class Full(InputError):
    """The context is full, and nobody is there to choose what goes."""


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
            except InputError as error:  # one bad command or question does not end the conversation
                say(f"error: {error}")


def banner(args: argparse.Namespace, model: "Opened") -> str:
    """What answers: the model, its format and dtype, what runs it, and how much it can remember."""
    from jllama.cli.runtime import device_line

    params, source = model.lm.params, model.source
    quant = {"none": ""}.get(args.quant, f" weights in {args.quant},")
    if source.quant is not None:
        quant = f" weights in int{source.quant.bits},"
    what = f"{source.path.name} ({source.form}, {params.config.n_params / 1e6:,.1f} M weights)"
    how = f"{quant} {params.dtype}, {device_line(args.backend, params)}, context {model.lm.max_len:,} tokens"
    return f"jllama {jllama.__version__}: {what},{how}; /help tells the commands"


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
        with open(path, "x", encoding="utf-8") as file:
            json.dump(asdict(conversation), file, indent=2, ensure_ascii=False)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    return f"saved {len(conversation.exchanges)} exchanges to {path}"


def answer(
    question: str, conversation: Conversation, lm: "LM", args: argparse.Namespace, options: dict[str, Any]
) -> None:
    """Let the model answer; Ctrl-C stops it, and what it said until then counts."""
    from jllama.cli.runtime import figures
    from jllama.text.complete import Completion

    ids = make_room(question, conversation, lm, args.when_full)
    if ids is None:
        return
    completion = Completion(ids)
    pieces = lm.complete([completion], row=len(conversation.exchanges), chat=True, **options)
    shown = ""
    try:
        for _, text in pieces:
            # Formats put white space before the answer; the terminal needs none.
            new = text if shown else text.lstrip()
            print(new, end="", flush=True)
            shown += new
        print()
    except KeyboardInterrupt:
        pieces.close()
        print()
        say("(stopped)")
        if not shown:
            return  # before it had begun: nothing was asked
    conversation.exchanges.append(Exchange(question, shown.strip()))
    if completion.finish_reason == "length":
        say(f"(cut off after {len(completion.ids)} tokens)")
    if not args.quiet:
        say(figures(lm.params, lm.timings))


def make_room(question: str, conversation: Conversation, lm: "LM", when_full: str) -> list[int] | None:
    """The ids of the conversation with this question. Where they leave no room for an answer, the flag or the user
    says what goes; None: nothing was asked after all."""
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
    """What the user chooses; Ctrl-C cancels the question, and /quit leaves."""
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

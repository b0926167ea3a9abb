"""Terminal input of `jllama chat`: typed, pasted or piped lines, and a history that is kept between runs."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from jllama.cli import inputs
from jllama.errors import InputError

HISTORY_LINES = 1000


class Leave(Exception):
    """The user ends the conversation."""


class Cancelled(Exception):
    """The user pressed Ctrl-C at a prompt."""


def interactive() -> bool:
    """Whether standard input is a terminal."""
    return sys.stdin is not None and sys.stdin.isatty()


def say(text: str) -> None:
    """Print a message to the user on stderr, apart from the text of the model."""
    print(text, file=sys.stderr, flush=True)


def read_message(prompt: str) -> str:
    """Read the next message: one line, several lines that are pasted at once, or lines continued with a backslash."""
    text = read_line(prompt)
    while text.endswith("\\"):
        try:
            text = text[:-1] + "\n" + read_line("… ")
        except Leave:  # the input ended after a backslash: the message ends here
            text = text[:-1]
    text = text.strip()
    if text and interactive():
        _remember(text)
    return text


def read_line(prompt: str) -> str:
    """Read a line from the user. Raises `Leave` at the end of the input and `Cancelled` at Ctrl-C."""
    if not interactive():
        line = inputs.read_line() if sys.stdin is not None else None
        if line is None:
            raise Leave
        return line
    try:
        return input(prompt)
    except EOFError:
        print()
        raise Leave from None
    except KeyboardInterrupt:
        print()
        raise Cancelled from None
    except UnicodeDecodeError:
        raise InputError("terminal: expected UTF-8 text, found other bytes") from None


def _remember(text: str) -> None:
    import readline

    readline.add_history(" ".join(text.split("\n")))  # the history file has one line per entry


@contextlib.contextmanager
def history(keep: bool) -> Iterator[None]:
    """Enable line editing. With ``keep``, the history of earlier runs is read, and it is written at the end."""
    if not interactive():
        yield
        return
    import readline

    readline.set_auto_history(False)
    readline.parse_and_bind("set enable-bracketed-paste on")  # several pasted lines are one message
    file = state_directory() / "chat_history"
    if keep:
        with contextlib.suppress(OSError):
            readline.read_history_file(file)
    try:
        yield
    finally:
        if keep:
            with contextlib.suppress(OSError):  # the history is optional
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch(mode=0o600)
                readline.set_history_length(HISTORY_LINES)
                readline.write_history_file(file)


def state_directory() -> Path:
    """The directory for state that is kept between runs."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "jllama"

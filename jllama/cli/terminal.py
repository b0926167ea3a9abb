"""The user's side of a conversation: lines typed, pasted or piped, and a history that lasts from run to run."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from jllama.cli import inputs
from jllama.errors import InputError

HISTORY_LINES = 1000


class Leave(Exception):
    """The user has had enough."""


class Cancelled(Exception):
    """Ctrl-C where a line was asked for."""


def interactive() -> bool:
    """Whether somebody types."""
    return sys.stdin is not None and sys.stdin.isatty()


def say(text: str) -> None:
    """To the user, not part of the model's text."""
    print(text, file=sys.stderr, flush=True)


def read_message(prompt: str) -> str:
    """What the user says next: a line, or several that are pasted at once or end with a backslash each but the last."""
    text = read_line(prompt)
    while text.endswith("\\"):
        try:
            text = text[:-1] + "\n" + read_line("… ")
        except Leave:  # the input ends here: so does what was begun
            text = text[:-1]
    text = text.strip()
    if text and interactive():
        _remember(text)
    return text


def read_line(prompt: str) -> str:
    """A line from the user; `Leave` at the end of the input, `Cancelled` at Ctrl-C."""
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

    readline.add_history(" ".join(text.split("\n")))  # the file holds one line an entry


@contextlib.contextmanager
def history(keep: bool) -> Iterator[None]:
    """Editing of lines, with the history of earlier runs where ``keep``; it is written when the conversation ends."""
    if not interactive():
        yield
        return
    import readline

    readline.set_auto_history(False)
    readline.parse_and_bind("set enable-bracketed-paste on")  # what is pasted is one message, whatever lines it has
    file = state_directory() / "chat_history"
    if keep:
        with contextlib.suppress(OSError):
            readline.read_history_file(file)
    try:
        yield
    finally:
        if keep:
            with contextlib.suppress(OSError):  # a conversation needs no history
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch(mode=0o600)
                readline.set_history_length(HISTORY_LINES)
                readline.write_history_file(file)


def state_directory() -> Path:
    """Where a user's programs keep what they remember."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "jllama"

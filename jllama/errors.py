"""Errors that a user can cause: one line, no traceback, exit code 2."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator


class InputError(ValueError):
    """Bad input. The message is one line: the file, field or flag, what was found and what was expected."""


@contextlib.contextmanager
def reported(program: str) -> Iterator[None]:
    """Run a command line's body: an `InputError` becomes one line on stderr and exit code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a letter shows another
    try:
        yield
    except InputError as error:
        sys.exit(_say(f"{program}: error: {error}", 2))
    except KeyboardInterrupt:
        sys.exit(_say(f"{program}: interrupted", 130))
    except BrokenPipeError:  # the reader of our pipe has gone (`| head`): stop without a word
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _say(line: str, code: int) -> int:
    print(" ".join(line.split()), file=sys.stderr)
    return code

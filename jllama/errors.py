"""Errors that a user can cause: one line, no traceback, exit code 2."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator

# What a template or a grammar from elsewhere may raise: its own errors, not an interrupt.
RAISED = (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RuntimeError)
RAISED += (TypeError, ValueError)


class InputError(ValueError):
    """Bad input. The message is one line: the file, field or flag, what was found and what was expected."""


@contextlib.contextmanager
def reported(program: str) -> Iterator[None]:
    """Run the body of a command. An `InputError` becomes one line on stderr and exit code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # print '?' for characters that the terminal cannot encode
    with quiet_pipe():
        try:
            yield
        except InputError as error:
            sys.exit(_report(f"{program}: error: {error}", 2))
        except KeyboardInterrupt:
            sys.exit(_report(f"{program}: interrupted", 130))


@contextlib.contextmanager
def quiet_pipe() -> Iterator[None]:
    """Run a body that prints. If the reader of the pipe has exited (`| head`), stop silently with exit code 141."""
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:  # a descriptor that was closed before the start
                sys.stdout.flush()  # else the interpreter does so at its end, and prints a traceback
    except BrokenPipeError:
        assert sys.stdout is not None
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _report(line: str, code: int) -> int:
    print(" ".join(line.split()), file=sys.stderr)
    return code

"""Reads text from files and standard input. It must be UTF-8 and of bounded size."""

import json
import sys
from pathlib import Path
from typing import Any

from jllama.errors import InputError

MAX_TEXT_BYTES = 1 << 30


def read_text(path: Path) -> str:
    """The text of a file, or of standard input if the path is ``-``."""
    if str(path) == "-":
        return read_stdin()
    try:
        with open(path, "rb") as file:
            return decoded(file.read(MAX_TEXT_BYTES + 1), str(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def read_stdin() -> str:
    """All of standard input."""
    return decoded(sys.stdin.buffer.read(MAX_TEXT_BYTES + 1), "standard input")


def read_line() -> str | None:
    """The next line of standard input without its line end; None at the end of the input."""
    line = sys.stdin.buffer.readline(MAX_TEXT_BYTES + 1)
    return decoded(line, "standard input").rstrip("\r\n") if line else None


def decoded(content: bytes, where: str) -> str:
    """Decode UTF-8, or raise `InputError` with the position of the first invalid byte."""
    if len(content) > MAX_TEXT_BYTES:
        raise InputError(f"{where}: expected at most {MAX_TEXT_BYTES} bytes of text, found more")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        found = f"0x{content[error.start]:02x}"
        raise InputError(f"{where}: byte {error.start}: expected UTF-8 text, found {found}") from None


def without_newline(text: str) -> str:
    """The text without the newline at its end, which editors and `echo` add."""
    return text.removesuffix("\n").removesuffix("\r")


def lines(text: str, where: str) -> list[str]:
    """The prompts of a text with one prompt per line."""
    if not text:
        raise InputError(f"{where}: expected one prompt per line, found nothing")
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def json_lines(text: str, where: str) -> list[str]:
    """The prompts of JSON lines. Each line is a string or an object with a ``prompt``. Blank lines are skipped."""
    prompts = [
        _prompt(line, f"{where}: line {number}") for number, line in enumerate(text.split("\n"), 1) if line.strip()
    ]
    if not prompts:
        raise InputError(f"{where}: expected JSON lines, found nothing")
    return prompts


def _prompt(line: str, where: str) -> str:
    expected = 'a JSON string, or an object with a text "prompt"'
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError):
        raise InputError(f"{where}: expected {expected}, found no JSON") from None
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise InputError(f"{where}: expected {expected}, found {type(value).__name__}")
    try:
        prompt.encode()  # JSON escapes can contain a lone surrogate, which is not valid text
    except UnicodeEncodeError:
        raise InputError(f"{where}: prompt: expected text, found a lone surrogate") from None
    return prompt

"""Limits on untrusted JSON values, checked before recursive code or a tokenizer sees them."""

from typing import Any

MAX_DEPTH = 64  # of nested lists and objects


def nested_within(value: Any, depth: int = MAX_DEPTH) -> bool:
    """Whether lists and objects are nested at most ``depth`` deep."""
    level: list[Any] = [value] if isinstance(value, dict | list) else []
    for _ in range(depth):
        level = [part for v in level for part in (v.values() if isinstance(v, dict) else v)]
        level = [part for part in level if isinstance(part, dict | list)]
        if not level:
            return True
    return False


def is_unicode(text: str) -> bool:
    """Whether a text is free of lone surrogates, which no tokenizer accepts."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return False
    return True

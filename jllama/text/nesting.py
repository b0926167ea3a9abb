"""What a JSON value from elsewhere may hold before code that calls itself, or a tokenizer, sees it."""

from typing import Any

MAX_DEPTH = 64  # of nested lists and objects


def nested_within(value: Any, depth: int = MAX_DEPTH) -> bool:
    """Whether lists and objects are nested at most so deep."""
    level: list[Any] = [value] if isinstance(value, dict | list) else []
    for _ in range(depth):
        level = [part for v in level for part in (v.values() if isinstance(v, dict) else v)]
        level = [part for part in level if isinstance(part, dict | list)]
        if not level:
            return True
    return False


def is_unicode(text: str) -> bool:
    """Whether a text holds no half of a surrogate pair, which no tokenizer takes."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return False
    return True

"""Token ids through llama2.c's text interface.

`run` takes a text and prints a text. Here its tokenizer has one character per token. So the text is the ids, and no
real tokenizer is timed or can differ.
"""

import struct
from pathlib import Path

# From here on every code point is encoded in four bytes, and there are enough for any Llama-2 vocabulary.
FIRST = 0x20000


def write_tokenizer(path: Path, vocab_size: int, space_id: int) -> None:
    """A tokenizer file for `run`. `run` puts a space before every prompt; ``space_id``, the prompt's second id, is that
    space."""
    pieces = [" " if i == space_id else chr(FIRST + i) for i in range(vocab_size)]
    with open(path, "wb") as file:
        file.write(struct.pack("i", 4))
        for piece in (p.encode() for p in pieces):
            file.write(struct.pack("fi", 0.0, len(piece)) + piece)


def to_text(ids: list[int], space_id: int) -> str:
    """The prompt text for ``ids``. `run` adds the first two ids by itself."""
    return "".join(" " if i == space_id else chr(FIRST + i) for i in ids[2:])


def from_text(text: str, space_id: int, first_is_space: bool) -> list[int]:
    """The ids that `run` printed. It drops a space after the beginning-of-sequence id; ``first_is_space`` adds it
    again."""
    ids = [space_id if c == " " else ord(c) - FIRST for c in text.rstrip("\n")]
    return [space_id, *ids] if first_is_space else ids

"""Control tokens, which begin and end turns and texts. A chat template may write them, but a user's text may not."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

# Names of tokens that are treated as control tokens even if a file marks them as ordinary.
_SHAPES = re.compile(
    r"<\|.+\|>|<｜.+｜>|</?s>|<(start|end)_of_turn>|\[/?(INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_\w+)\]"
)


@dataclass(frozen=True)
class ControlToken:
    """A control token. ``text`` is its name."""

    text: str
    id: int
    lstrip: bool = False  # white space before the name is removed
    rstrip: bool = False  # white space after the name is removed


def looks_like_control(text: str) -> bool:
    """Whether a token with this name is a control token, even if its file does not mark it as one."""
    return _SHAPES.fullmatch(text) is not None


class ControlTokens:
    """A tokenizer's control tokens, such as ``<|eot_id|>``, and where their names occur in a text."""

    def __init__(self, tokens: Iterable[ControlToken]) -> None:
        # Longer names come first, so that a name wins over its own prefix.
        self.tokens = tuple(sorted((t for t in tokens if t.text), key=lambda t: -len(t.text)))
        self.ids = frozenset(token.id for token in self.tokens)
        self._by_text = {token.text: token.id for token in self.tokens}
        names = (
            rf"{r'\s*' if t.lstrip else ''}(?P<n{i}>{re.escape(t.text)}){r'\s*' if t.rstrip else ''}"
            for i, t in enumerate(self.tokens)
        )
        self._pattern = re.compile("|".join(names)) if self.tokens else None
        texts = [t.text for t in self.tokens]
        self._begins = frozenset(text[:n] for text in texts for n in range(1, len(text)))
        self._ends = frozenset(text[n:] for text in texts for n in range(1, len(text)))
        self._longest = max(map(len, texts), default=0)
        self.edges = frozenset(letter for text in texts for letter in (text[0], text[-1]))

    def split(self, text: str) -> Iterator[str | int]:
        """Split a text at the names of control tokens. Yields the text between names, and the ids for names."""
        at = 0
        for match in () if self._pattern is None else self._pattern.finditer(text):
            if match.start() > at:
                yield text[at : match.start()]
            yield self._by_text[match[match.lastgroup or 0]]
            at = match.end()
        if at < len(text):
            yield text[at:]

    def named_in(self, text: str) -> bool:
        """Whether a text contains the name of a control token."""
        return self._pattern is not None and self._pattern.search(text) is not None

    def could_name(self, text: str) -> bool:
        """Whether a text contains the name of a control token, or could form one together with adjacent text."""
        head, tail = text.lstrip(), text.rstrip()
        lengths = range(1, min(len(text), self._longest) + 1)
        return self.named_in(text) or any(head[:n] in self._ends or tail[-n:] in self._begins for n in lengths)

    def name_of(self, token: int) -> str | None:
        """The name of a control token; None for other ids."""
        return next((t.text for t in self.tokens if t.id == token), None)

    def broken(self, text: str) -> list[str]:
        """Split a text so that no piece contains a name: every name is split after its first character."""
        if self._pattern is None:
            return [text]
        cuts = [0]
        for match in self._pattern.finditer(text):
            cuts.append(match.start(match.lastgroup or 0) + 1)
        return [text[begin:end] for begin, end in zip(cuts, [*cuts[1:], len(text)], strict=True) if begin < end]

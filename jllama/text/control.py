"""Control tokens: the ids that begin and end turns and texts, which a template writes and a user may not."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

# Names of control tokens that some files call ordinary ones.
_SHAPES = re.compile(
    r"<\|.+\|>|<｜.+｜>|</?s>|<(start|end)_of_turn>|\[/?(INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_\w+)\]"
)


@dataclass(frozen=True)
class ControlToken:
    """A token that only its id can stand for; ``lstrip`` and ``rstrip``: it takes the white space beside its name."""

    text: str
    id: int
    lstrip: bool = False
    rstrip: bool = False


def looks_like_control(text: str) -> bool:
    """Whether a token of that name is a control token whatever its file says."""
    return _SHAPES.fullmatch(text) is not None


class ControlTokens:
    """The control tokens of one tokenizer, and the places where a text names them."""

    def __init__(self, tokens: Iterable[ControlToken]) -> None:
        # Of two names that begin alike, the longer one is meant.
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
        """The text as it stands between the names, and the ids of those that are named."""
        at = 0
        for match in () if self._pattern is None else self._pattern.finditer(text):
            if match.start() > at:
                yield text[at : match.start()]
            yield self._by_text[match[match.lastgroup or 0]]
            at = match.end()
        if at < len(text):
            yield text[at:]

    def named_in(self, text: str) -> bool:
        """Whether a text holds the name of any."""
        return self._pattern is not None and self._pattern.search(text) is not None

    def could_name(self, text: str) -> bool:
        """Whether a text holds the name of any, or could be a part of one together with what stands beside it."""
        head, tail = text.lstrip(), text.rstrip()
        lengths = range(1, min(len(text), self._longest) + 1)
        return self.named_in(text) or any(head[:n] in self._ends or tail[-n:] in self._begins for n in lengths)

    def name_of(self, token: int) -> str | None:
        """The name of a control token; None for other ids."""
        return next((t.text for t in self.tokens if t.id == token), None)

    def broken(self, text: str) -> list[str]:
        """The text in pieces none of which holds a name: each is cut behind its first letter."""
        if self._pattern is None:
            return [text]
        cuts = [0]
        for match in self._pattern.finditer(text):
            cuts.append(match.start(match.lastgroup or 0) + 1)
        return [text[begin:end] for begin, end in zip(cuts, [*cuts[1:], len(text)], strict=True) if begin < end]

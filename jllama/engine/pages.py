"""Who uses which page of the cache, and what the pages hold. Plain Python: no tensors, no device.

A page is used by one or more sequences, or it is free. A free page keeps its tokens and can be found again, until it
is taken for other tokens, the least recently used page first. A full page is found by a hash of its tokens and of the
page before. The chain of hashes begins with a salt. So a client that does not know the salt can neither share a page
nor learn from response times that the page exists.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

Tokens = Sequence[int]


def root(salt: str) -> bytes:
    """The name that stands before the first page of a chain."""
    return blake2b(salt.encode(), digest_size=16, person=b"jllama-salt").digest()


def link(before: bytes, tokens: Tokens) -> bytes:
    """The name of a full page: a hash of its tokens and of the name of the page before."""
    return blake2b(before + array("q", tokens).tobytes(), digest_size=16).digest()


@dataclass(frozen=True)
class Prefix:
    """The part of a prompt that the pool holds."""

    pages: list[int]  # full pages, to be shared
    chain: list[bytes]  # their names
    tail: int | None = None  # a page that begins with the next tokens of the prompt, to be copied
    tail_tokens: int = 0  # how many tokens of the tail the prompt shares
    fresh: bool = False  # the turn that is being planned writes the tail, so it cannot be copied yet


@dataclass(frozen=True)
class _Content:
    before: bytes  # the name of the page before
    tokens: tuple[int, ...]
    name: bytes | None  # of the page itself, if it is full
    turn: int  # of the scheduler, in which the content was recorded


class Pages:
    """``count`` pages of ``size`` positions. A page is copied only if at least ``worth`` of its tokens are shared. If
    more of a prompt will be fed, a ``multiple`` of tokens counts as shared: so pieces begin where a kernel can."""

    def __init__(self, count: int, size: int, worth: int = 16, multiple: int = 1) -> None:
        self.count, self.size, self.worth, self.multiple = count, size, worth, multiple
        self._users = [0] * count
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(count))  # in the order in which they are taken
        self._content: dict[int, _Content] = {}
        self._by_name: dict[bytes, int] = {}
        self._tails: dict[bytes, dict[int, None]] = {}  # pages with the same first tokens, in the order of their coming

    @property
    def free(self) -> int:
        """How many pages no sequence uses."""
        return len(self._free)

    def needed(self, positions: int) -> int:
        """How many pages ``positions`` positions need."""
        return -(-positions // self.size)

    def find(self, tokens: Tokens, salt: str, turn: int, *, goes_on: bool = False) -> Prefix:
        """The longest prefix of ``tokens`` that the pool holds. ``turn`` is the scheduler's current turn. ``goes_on``:
        whether the prompt has more tokens to be fed, which are not looked for."""
        pages: list[int] = []
        chain: list[bytes] = []
        name = root(salt)
        while (at := len(pages) * self.size) + self.size <= len(tokens):
            part = tuple(tokens[at : at + self.size])
            after = link(name, part)
            page = self._by_name.get(after)
            if page is None or self._content[page].tokens != part:
                break
            name = after
            pages.append(page)
            chain.append(name)
        rest = tuple(tokens[at : at + self.size])
        best, shared = None, 0
        for page in self._tails.get(link(name, rest[: self.worth]), ()):
            n = _common(self._content[page].tokens, rest)
            if goes_on or at + n < len(tokens):
                n = n // self.multiple * self.multiple
            if n > max(shared, self.worth - 1):
                best, shared = page, n
        if best is None:
            return Prefix(pages, chain)
        return Prefix(pages, chain, best, shared, fresh=self._content[best].turn >= turn)

    def use(self, pages: Sequence[int]) -> None:
        """Add a user to each page."""
        for page in pages:
            self._users[page] += 1
            self._free.pop(page, None)

    def take(self, count: int) -> list[int]:
        """Take ``count`` free pages for one user. Their contents are forgotten."""
        assert count <= self.free, "the scheduler asks only for what there is"
        taken = [self._free.popitem(last=False)[0] for _ in range(count)]
        for page in taken:
            self._forget(page)
            self._users[page] = 1
        return taken

    def give_back(self, pages: Sequence[int]) -> None:
        """Remove a user from each of a sequence's pages. The end of a chain becomes free before its beginning."""
        for page in reversed(pages):
            self._users[page] -= 1
            assert self._users[page] >= 0, "a page was given back twice"
            if self._users[page] == 0:
                self._free[page] = None
                if page not in self._content:
                    self._free.move_to_end(page, last=False)

    def remember(self, page: int, before: bytes, tokens: Tokens, turn: int) -> bytes | None:
        """Record the tokens that a page holds from its beginning on. Returns its name, if it is full. If another page
        has the same name, lookups keep finding that one."""
        held = self._content.get(page)
        if held is not None and len(held.tokens) >= len(tokens):
            return held.name
        name = link(before, tokens) if len(tokens) == self.size else None
        self._forget(page)
        if name is None or name not in self._by_name:
            self._content[page] = _Content(before, tuple(tokens), name, turn)
            self._tails.setdefault(link(before, tokens[: self.worth]), {})[page] = None
            if name is not None:
                self._by_name[name] = page
        return name

    def forget_all(self) -> None:
        """Forget the contents of all pages: the weights have changed."""
        self._content.clear()
        self._by_name.clear()
        self._tails.clear()

    def _forget(self, page: int) -> None:
        content = self._content.pop(page, None)
        if content is None:
            return
        key = link(content.before, content.tokens[: self.worth])
        del self._tails[key][page]
        if not self._tails[key]:
            del self._tails[key]
        if content.name is not None:
            del self._by_name[content.name]


def _common(a: Tokens, b: Tokens) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))

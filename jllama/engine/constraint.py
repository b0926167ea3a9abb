"""Constraints: which tokens may come next in a request, as one mask a token.

The masks are made on the host, in threads, while the device computes the logits that they are for.
"""

import os
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Protocol

import numpy as np

from jllama.errors import RAISED

THREADS = 8  # at most, for the masks of one step


class Matcher(Protocol):
    """Where one text stands in its grammar."""

    def mask(self) -> np.ndarray:
        """The tokens that may come next: [ceil(vocabulary / 32)] uint32; token t is bit ``t % 32`` of word ``t // 32``.
        A mask without any token is a dead end, which ends the request."""
        ...

    def accept(self, token: int) -> None:
        """Advance by one token."""
        ...

    @property
    def done(self) -> bool:
        """Whether the text is complete and nothing may follow."""
        ...


class Constraint(Protocol):
    """A grammar. Any number of requests may have the same one."""

    def matcher(self) -> Matcher:
        """A matcher at the beginning of a new text."""
        ...


class Progress:
    """The matcher of a request, which follows the tokens that have come. If the matcher raises, its request ends with
    ``error``, and other requests are not affected."""

    def __init__(self, constraint: Constraint, prompt: int) -> None:
        self._matcher, self._known = constraint.matcher(), prompt
        self.error: str | None = None

    def follow(self, tokens: Sequence[int]) -> "Progress":
        """Advance to the end of ``tokens``, which begin with the prompt."""
        with self._checked():
            while self._known < len(tokens) and self.error is None:
                self._matcher.accept(tokens[self._known])
                self._known += 1
        return self

    def mask(self) -> np.ndarray:
        """The tokens that may come next, as in `Matcher`."""
        if self.error is None:
            with self._checked():
                return self._matcher.mask()
        return np.zeros(1, np.uint32)

    @property
    def done(self) -> bool:
        """Whether the text is complete and nothing may follow."""
        with self._checked():
            return self.error is None and self._matcher.done
        return False

    @contextmanager
    def _checked(self) -> Generator[None]:
        try:
            yield
        except RAISED as error:
            self.error = f"the constraint failed: {type(error).__name__}: {str(error)[:200]!a}"


def masks_of(matchers: Sequence[Progress | None], rows: int, vocab: int) -> np.ndarray:
    """The masks [rows, ceil(vocab / 32)] uint32 of the first rows; a row without a matcher may draw any token."""
    masks = np.full((rows, -(-vocab // 32)), 2**32 - 1, np.uint32)

    def fill(part: list[tuple[int, Progress]]) -> None:
        for i, matcher in part:
            masks[i] = matcher.mask()

    limited = [(i, m) for i, m in enumerate(matchers) if m is not None]
    parts = [part for n in range(THREADS) if (part := limited[n::THREADS])]
    if len(parts) < 2 or (os.cpu_count() or 1) < 3:
        fill(limited)
    else:
        list(_threads().map(fill, parts))
    return masks


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS, thread_name_prefix="masks")

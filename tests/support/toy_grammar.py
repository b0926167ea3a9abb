"""A grammar without a library: after each token, some tokens may come."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

BEGIN = -1


@dataclass(frozen=True)
class Walk:
    """After a token of ``after``, its tokens may come; a text is complete after ``length`` tokens."""

    vocab: int
    after: Mapping[int, Sequence[int]]
    length: int = 1000

    def matcher(self) -> "At":
        return At(self)

    def holds(self, ids: Sequence[int]) -> bool:
        return all(b in self.after[a] for a, b in zip([BEGIN, *ids], ids, strict=False))


class At:
    """Where one text stands."""

    def __init__(self, walk: Walk) -> None:
        self.walk, self.last, self.count = walk, BEGIN, 0

    def mask(self) -> np.ndarray:
        bits = np.zeros(-(-self.walk.vocab // 32) * 32, np.uint8)
        bits[list(self.walk.after.get(self.last, ()))] = 1
        return np.packbits(bits, bitorder="little").view(np.uint32)

    def accept(self, token: int) -> None:
        assert token in self.walk.after[self.last], (token, self.last)
        self.last, self.count = token, self.count + 1

    @property
    def done(self) -> bool:
        return self.count >= self.walk.length


def walk(vocab: int, seed: int, length: int = 1000) -> Walk:
    """A random grammar, in which any token is followed by 1 to 5."""
    rng = random.Random(seed)
    after = {t: sorted(rng.sample(range(3, vocab), rng.choice((1, 2, 5)))) for t in range(BEGIN, vocab)}
    return Walk(vocab, after, length)

"""What a turn launches: how pieces of prompts are divided over programs of a few sizes, and the results."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from jllama.decode import NO_TOKEN, StepOutput
from jllama.engine.scheduler import Piece
from jllama.engine.scheduler import Sequence as Scheduled

LAUNCH = 1  # what a launch of pieces costs beside its pieces, in pieces: one reads all weights for any number of them


@dataclass(frozen=True)
class Drawn:
    """Rows that draw, with their places in ``outputs``, which are in the order of launches."""

    rows: list[tuple[int, Scheduled]]
    outputs: list[StepOutput]  # arrays [steps, places]
    decoded: bool = True  # whether by decode steps; else from the logits of pieces


@dataclass(frozen=True)
class Scored:
    """Pieces that are scored, with their places in ``scores``."""

    pieces: list[tuple[int, Piece]]
    scores: tuple[jax.Array, jax.Array, jax.Array]


@dataclass(frozen=True)
class Launch:
    """Results of a plan, which are there once it has run as far as that."""

    drawn: list[Drawn] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)
    masked: bool = False  # whether the next masks depend on what is drawn
    ends: bool = False  # whether these are the last results of the plan

    @property
    def arrays(self) -> tuple[list[list[StepOutput]], list[tuple[jax.Array, ...]]]:
        """All results."""
        return [group.outputs for group in self.drawn], [group.scores for group in self.scored]


@dataclass
class Tokens:
    """What a turn drew for one row."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)  # for each token: tokens, log-probabilities

    def add(self, ids: list[int], logprobs: list[float], top: tuple[np.ndarray, np.ndarray] | None) -> None:
        """Add what some decode steps drew for one row: a token of each step, and its log-probability. In a step after
        the row's end, the token is `NO_TOKEN`, and nothing is added. ``top`` has the ids of each step's likeliest
        tokens [steps, tokens], and their log-probabilities [steps, tokens]."""
        came = [i for i, token in enumerate(ids) if token != NO_TOKEN]
        self.ids += [ids[i] for i in came]
        self.logprobs += [logprobs[i] for i in came]
        if top is not None:
            tokens, values = top
            self.top += [(tokens[i], values[i]) for i in came]


def tokens_of(launch: Launch, outputs: Sequence[Sequence[StepOutput]]) -> tuple[dict[Scheduled, Tokens], int]:
    """What a launch drew for every row, and how many decode steps drew anything; ``outputs`` are its results, read."""
    found: dict[Scheduled, Tokens] = {}
    steps = 0
    for group, parts in zip(launch.drawn, outputs, strict=True):
        output: Any = jax.tree.map(lambda *part: np.concatenate(part), *parts)
        steps += int((output.tokens != NO_TOKEN).any(axis=1).sum()) if group.decoded else 0
        # Of all places at once: one by one it would be slow.
        ids, logprobs = output.tokens.T.tolist(), output.logprobs.T.tolist()
        for place, sequence in group.rows:
            top = None if output.top is None else (output.top[0][:, place], output.top[1][:, place])
            found.setdefault(sequence, Tokens()).add(ids[place], logprobs[place], top)
    return found, steps


def places[T](parts: Sequence[Sequence[T]], size: int) -> Iterator[tuple[int, T]]:
    """Every item with its index in a program's arrays. A part is what one group of devices runs: it has ``size``
    indices there, and its items take the first of them."""
    return ((part * size + i, item) for part, items in enumerate(parts) for i, item in enumerate(items))


def fitting(known: Sequence[int], parts: Sequence[Sequence[Any]]) -> int:
    """The first size that holds the items of every part."""
    return next(size for size in known if size >= max(map(len, parts)))


def cut[T](known: Sequence[int], parts: Sequence[Sequence[T]]) -> Iterator[tuple[int, list[Sequence[T]]]]:
    """The items of every part in order, divided over launches: the size of each, and its items."""
    at = 0
    for size in launches(tuple(known), max(map(len, parts))):
        yield size, [items[at : at + size] for items in parts]
        at += size


@functools.cache
def launches(known: tuple[int, ...], count: int) -> tuple[int, ...]:
    """The sizes of the launches that run ``count`` pieces at the least cost, largest first: padding costs as much as
    real pieces, and a launch as much as `LAUNCH` more."""
    best: list[tuple[int, int, tuple[int, ...]]] = [(0, 0, ())]  # cost, number of launches, sizes
    for n in range(1, count + 1):
        options = ((best[max(0, n - size)], size) for size in known)
        best.append(min((cost + size + LAUNCH, many + 1, (*of, size)) for (cost, many, of), size in options))
    return tuple(sorted(best[count][2], reverse=True))

"""What a turn launches: the places of its items in the arrays of a program, and the results."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jllama.decode import StepOutput
from jllama.engine.scheduler import Piece
from jllama.engine.scheduler import Sequence as Scheduled
from jllama.engine.steps import Scores


@dataclass(frozen=True)
class Launch:
    """The results of a plan, which are there once it has run."""

    rows: list[tuple[int, Scheduled]]  # the sequences that draw, with their places in the outputs
    outputs: list[StepOutput]  # one for each program, in the order of launches
    pieces: list[tuple[int, Piece]]  # the pieces that are scored, with their places in the scores
    scores: Scores | None
    masked: bool = False  # whether the next masks depend on what is drawn


def places[T](parts: Sequence[Sequence[T]], size: int) -> Iterator[tuple[int, T]]:
    """Every item with its index in a program's arrays. A part is what one group of devices runs: it has ``size``
    indices there, and its items take the first of them."""
    return ((part * size + i, item) for part, items in enumerate(parts) for i, item in enumerate(items))


def fitting(known: Sequence[int], parts: Sequence[Sequence[Any]]) -> int:
    """The first size that holds the items of every part."""
    return next(size for size in known if size >= max(map(len, parts)))

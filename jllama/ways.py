"""The two ways of a decode step, and which one a number of rows takes: the one table that decides it.

A step is one persistent launch of all layers (`jllama.step`), or one launch for each op. The launch needs a kernel for
the model and the device; where there is none, every number of rows goes op by op. `jllama info` and `Engine.ways` show
the way that each number of rows takes, and why.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Way:
    """How steps of up to ``rows`` rows run (of several tokens a row, as many rows more); None: of any number."""

    rows: int | None
    name: Literal["launch", "ops"]
    why: str


# Measured on an H200 with the 7B shape, tokens/s of decode after a prompt of 128 (bench/results/compare.jsonl):
#
# | rows | one launch | ops | runs |
# |---:|---:|---:|---|
# | 1 | 286 bf16 | | 20261127-181825-gpu |
# | 8 | 1,871 to 1,928 bf16 | 1,758 to 1,799 bf16 (XLA's) | 20261121-043545-gpu to 20261127-181825-gpu |
# | 8 | 2,778 to 2,805 int8, 3,560 to 3,604 int4 | | 20261126-0140-gpu to 20261126-1725-gpu |
# | 64 | | 9,666 bf16 | 20261127-200407-gpu |
# | 256 | | 14,015 bf16 | 20261127-200407-gpu |
#
# The launch multiplies tiles of 8 columns, so 9 rows would be two passes over the weights, which ops read once for any
# number of rows. No shape or format is known for which another number is right; a sharded model counts a device's rows.
TABLE = (
    Way(8, "launch", "up to 8 rows, one launch is faster than one for each op"),
    Way(None, "ops", "the one launch of a step takes up to 8 rows"),
)
LAUNCH_ROWS = max(way.rows or 0 for way in TABLE if way.name == "launch")


def way_of(rows: int) -> Way:
    """The way of a step of so many rows."""
    return next(way for way in TABLE if way.rows is None or rows <= way.rows)

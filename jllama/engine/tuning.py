"""The sizes of an engine's launches, which depend on the device."""

from dataclasses import dataclass

from jllama.device import Device
from jllama.ways import LAUNCH_ROWS


@dataclass(frozen=True)
class Tuning:
    """How prompts are cut, how many steps a launch has, and for which numbers of rows and pieces steps are compiled.
    Smaller numbers are padded to the next of these, so that compilations are few."""

    piece: int  # tokens of a piece of a prompt
    # Decode steps a turn: where all rows have just joined or requests keep coming, so that first tokens come soon;
    # while requests wait; while none do. A compiled program has the first number of steps, which divides the others.
    steps: tuple[int, int, int]
    rows: tuple[int, ...]
    pieces: tuple[int, ...]  # of a launch; more are several launches
    budget: int = 512  # tokens of prompts that a turn feeds by default, beside rows that draw
    alone: int = 0  # tokens of prompts that a turn may feed where no row draws that they would delay
    whole: int = 0  # up to so many rows, a long turn is one program


# A row or piece that is padding costs almost as much as a real one, and a compilation some seconds: powers of four.
_CPU = Tuning(piece=32, steps=(4, 4, 16), rows=(1, 4, 16, 64), pieces=(1, 4, 16, 64))

# The host launches a program in some 0.5 ms, while the device runs those before. Up to `LAUNCH_ROWS` a step of a small
# model takes as long as that, and a program is compiled in some 4 seconds: there a long turn is one program. A step of
# more rows takes longer, and compiling does, too: there a program has one step.
# 128 queries are one item of the attention kernel. Up to `LAUNCH_ROWS` are one persistent launch. Above, a step reads
# all weights for any number of rows, and its products have tiles of 64 rows: padding costs little, and a compilation
# of a large model 10 to 30 seconds. Padding of pieces costs as much as real ones, so these are powers of two.
# From 2,048 rows on, products gain nothing by more (two launches of 16 pieces for one of 32). With a budget of 512, two
# prompts of 256 tokens would join in a turn of four steps. Where some 100 rows draw, more texts end than that.
_GPU = Tuning(
    piece=128,
    steps=(1, 4, 16),
    rows=(1, LAUNCH_ROWS, 64, 128),
    pieces=(1, 2, 4, 8, 16),
    budget=4096,
    alone=4096,
    whole=LAUNCH_ROWS,
)


def tuning_for(device: Device) -> Tuning:
    """The sizes for a device."""
    return _CPU if device.platform == "cpu" else _GPU


def sizes(known: tuple[int, ...], most: int) -> list[int]:
    """The sizes up to ``most``: those of ``known`` below it, then doublings of the last one, then ``most`` itself."""
    found, size = [size for size in known if size < most], known[-1]
    while (size := 2 * size) < most:
        found.append(size)
    return [*found, most]

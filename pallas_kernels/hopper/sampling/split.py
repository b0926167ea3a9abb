"""How a row of logits is divided among threads: those of one block, or of a cluster of blocks."""

from dataclasses import dataclass
from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu

from ..common.thread_ops import WARPGROUP_SIZE

WARP_SIZE = 32
WARPS = WARPGROUP_SIZE // WARP_SIZE  # of a warpgroup
MAX_WARPGROUPS = 5  # leaves a thread 96 registers
MAX_NUMBERS = 63  # of a thread
TILE = 8  # JAX 0.11.2 cannot infer the layout of parts whose ``numbers`` are a multiple of this
LARGEST = 262_144  # vocabulary
CLUSTER = 8  # blocks of a row that does not fit in one: the most that every Hopper GPU allows


@dataclass(frozen=True)
class RowSplit:
    """Blocks of a row, warpgroups of a block, and numbers of a thread.

    A row consists of lines of `WARPGROUP_SIZE` logits. A warpgroup's part is ``numbers`` neighbouring lines. The last
    part ends with the row, so it may repeat lines of the part before, see `repeated`."""

    warpgroups: int
    numbers: int
    blocks: int = 1

    @property
    def warps(self) -> int:
        """Warps of a block."""
        return self.warpgroups * WARPS

    @property
    def layout(self) -> Any:
        """[4, 32, numbers] in registers, read from shared memory in pairs if there are an even number a thread."""
        pair = 2 - self.numbers % 2
        return plgpu.Layout.TILED(
            plgpu.Tiling(((WARPS, WARP_SIZE, pair),)), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
        )

    def repeated(self, vocab: int) -> int:
        """How many lines of the last part belong to the part before."""
        return self.blocks * self.warpgroups * self.numbers - vocab // WARPGROUP_SIZE


def split_row(vocab: int) -> RowSplit | None:
    """The fewest warpgroups that hold a row: of one block in equal parts, or of a cluster. None: it is
    not in whole lines, or too large."""
    lines, left = divmod(vocab, WARPGROUP_SIZE)
    if left or not 0 < vocab <= LARGEST:
        return None
    for warpgroups in range(1, MAX_WARPGROUPS + 1):
        numbers, left = divmod(lines, warpgroups)
        if not left and numbers <= MAX_NUMBERS and numbers % TILE:
            return RowSplit(warpgroups, numbers)
    for blocks in (1, CLUSTER):
        for warpgroups in range(1, MAX_WARPGROUPS + 1):
            numbers = -(-lines // (blocks * warpgroups))
            split = RowSplit(warpgroups, numbers + (numbers % TILE == 0), blocks)
            if split.numbers <= min(lines, MAX_NUMBERS) and split.repeated(vocab) < split.numbers:
                return split
    return None

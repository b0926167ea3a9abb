"""Which block of prefill attention computes which items, decided on the host."""

import functools
import heapq

import numpy as np


@functools.lru_cache(maxsize=64)
def schedule(rows: int, q_tiles: int, rows_together: int, blocks: int) -> np.ndarray:
    """The items [blocks, 1 + most] of every block in order, after their number. Unused places are 0.

    Item ``row * q_tiles + tile`` is a tile of the queries of a row. A row is one head of one row of the batch. Each
    item goes to the block that is done first. At most ``rows_together`` rows run together, so that their keys and
    values fit the L2 cache. Among these the longest items go first, and short ones fill the end."""
    together = max(n for n in range(1, rows + 1) if rows % n == 0 and n <= rows_together)
    blocks = min(blocks, rows * q_tiles)
    taken: list[list[int]] = [[] for _ in range(blocks)]
    free = [(0, block) for block in range(blocks)]
    for first in range(0, rows, together):
        for tile in reversed(range(q_tiles)):
            for row in range(first, first + together):
                busy, block = free[0]
                taken[block].append(row * q_tiles + tile)
                heapq.heapreplace(free, (busy + tile + 2, block))  # prologue and epilogue take as long as one tile
    most = max(map(len, taken))
    return np.array([[len(own), *own, *[0] * (most - len(own))] for own in taken], np.int32)

"""Output files. They are written block by block at known offsets. Float blocks are checked for NaN and infinities."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from jllama.formats.source import Tensor

# NaN and infinities have all exponent bits set. For each dtype: the integer type of its bits, the mask without the sign
# bit, and the bits of infinity.
_BITS = {
    "float32": (np.uint32, 0x7FFFFFFF, 0x7F800000),
    "float16": (np.uint16, 0x7FFF, 0x7C00),
    "bfloat16": (np.uint16, 0x7FFF, 0x7F80),
}
_CHUNK = 1 << 17  # elements: small enough to stay in the cache of a core

Progress = Callable[[int], object]  # called with the number of bytes just written


@dataclass
class Watch:
    """Observes all writes: counts bytes for a progress bar, and NaN and infinities for warnings."""

    progress: Progress = lambda nbytes: None
    nan: dict[str, int] = field(default_factory=dict)
    infinite: dict[str, int] = field(default_factory=dict)

    def look(self, where: str, array: np.ndarray) -> None:
        """Count the NaN and infinities of a float array. Other arrays are ignored."""
        kind, mask, limit = _BITS.get(str(array.dtype), (None, 0, 0))
        if kind is None:
            return
        bits = array.reshape(-1).view(kind)
        for begin in range(0, bits.size, _CHUNK):
            magnitude = bits[begin : begin + _CHUNK] & kind(mask)
            if magnitude.max() >= limit:
                self._count(self.nan, where, int((magnitude > limit).sum()))
                self._count(self.infinite, where, int((magnitude == limit).sum()))

    @staticmethod
    def _count(counts: dict[str, int], where: str, number: int) -> None:
        if number:
            counts[where] = counts.get(where, 0) + number

    def warnings(self) -> Iterator[str]:
        """One line for every tensor that holds NaN or infinities."""
        for where in dict.fromkeys([*self.nan, *self.infinite]):
            yield f"{where}: {self.nan.get(where, 0)} NaN and {self.infinite.get(where, 0)} infinite values"


class OutputFile:
    """A new file, written at arbitrary offsets. When it is closed without an error, its content is synced to disk."""

    def __init__(self, path: Path, watch: Watch) -> None:
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._watch = watch

    def __enter__(self) -> "OutputFile":
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        try:
            if kind is None:
                os.fsync(self._handle)
        finally:
            os.close(self._handle)

    def put(self, at: int, data: np.ndarray | bytes) -> None:
        """Write ``data`` at byte ``at``."""
        raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data if isinstance(data, np.ndarray) else data
        rest = memoryview(raw)
        while rest:
            written = os.pwrite(self._handle, rest, at)
            rest, at = rest[written:], at + written
            self._watch.progress(written)

    def put_floats(self, at: int, tensor: Tensor) -> None:
        """Write a float tensor block by block."""
        for begin, end in tensor.blocks():
            rows = tensor.rows(begin, end)
            self._watch.look(tensor.where, rows)
            self.put(at, rows)
            at += rows.nbytes

"""Where tensors are written to: files filled piece by piece at known places, each piece looked through on its way."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from jllama.formats.source import Tensor

# How floats with all exponent bits set, NaN and infinities, are told from the rest: integer type, sign mask, limit.
_BITS = {
    "float32": (np.uint32, 0x7FFFFFFF, 0x7F800000),
    "float16": (np.uint16, 0x7FFF, 0x7C00),
    "bfloat16": (np.uint16, 0x7FFF, 0x7F80),
}
_CHUNK = 1 << 17  # elements: what stays in a core's cache

Progress = Callable[[int], object]  # told how many bytes have been written


@dataclass
class Watch:
    """Sees all that is written: counts bytes for a progress bar, and what is not finite for a warning."""

    progress: Progress = lambda nbytes: None
    nan: dict[str, int] = field(default_factory=dict)
    infinite: dict[str, int] = field(default_factory=dict)

    def look(self, where: str, array: np.ndarray) -> None:
        """Count NaN and infinities of a float array."""
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
        """A line for every tensor that holds what no weight should be."""
        for where in dict.fromkeys([*self.nan, *self.infinite]):
            yield f"{where}: {self.nan.get(where, 0)} NaN and {self.infinite.get(where, 0)} infinite values"


class OutputFile:
    """A new file, written at places, complete on disk once it is closed."""

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
        """Write at byte ``at``."""
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

"""Progress of a long run on stderr: a bar on a terminal, otherwise a line every few seconds."""

import sys
import time
from collections.abc import Iterable

INTERVAL = 10.0  # seconds between two lines


class Progress:
    """Counts up to ``total`` and shows the count. With ``quiet``, nothing is printed."""

    def __init__(self, total: int, unit: str, *, quiet: bool) -> None:
        self._total, self._unit, self._done, self._quiet = total, unit, 0, quiet
        self._began = self._said = time.monotonic()
        self._bar = None
        if not quiet and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit=unit, leave=False, file=sys.stderr)

    def add(self, count: int) -> None:
        """Add ``count`` finished items."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif not self._quiet and (now := time.monotonic()) - self._said >= INTERVAL and self._done < self._total:
            self._said = now
            print(
                f"{self._done} of {self._total} {self._unit}s in {now - self._began:.0f} s", file=sys.stderr, flush=True
            )

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()


def loading_bar(names: Iterable[str], total: int) -> Iterable[str]:
    """Yield the names of a checkpoint's tensors and show the progress."""
    progress = Progress(total, "tensor", quiet=False)
    try:
        for name in names:
            yield name
            progress.add(1)
    finally:
        progress.close()

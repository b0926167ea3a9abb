"""A progress bar for written bytes, and warnings about tensors that are not finite."""

import contextlib
import sys
from collections.abc import Iterator

from jllama.formats.output import Watch


@contextlib.contextmanager
def watched(total: int, program: str, *, quiet: bool = False) -> Iterator[Watch]:
    """Yield a `Watch` that shows a bar on a terminal. At the end, print a warning for tensors that are not finite."""
    from tqdm import tqdm  # imported here, so that --help is fast

    # disable=None shows the bar only on a terminal
    with tqdm(total=total, unit="B", unit_scale=True, disable=True if quiet else None, file=sys.stderr) as bar:
        watch = Watch(progress=bar.update)
        yield watch
    for line in watch.warnings():
        print(f"{program}: warning: {line}", file=sys.stderr)

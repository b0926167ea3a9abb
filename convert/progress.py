"""A progress bar for bytes, and the warnings that come after it."""

import contextlib
import sys
from collections.abc import Iterator

from jllama.formats.output import Watch


@contextlib.contextmanager
def watched(total: int, program: str, *, quiet: bool = False) -> Iterator[Watch]:
    """A `Watch` that shows a bar on a terminal, and at the end says which tensors hold what is not finite."""
    from tqdm import tqdm  # only here: --help need not wait for it

    # disable=None: only where somebody looks
    with tqdm(total=total, unit="B", unit_scale=True, disable=True if quiet else None, file=sys.stderr) as bar:
        watch = Watch(progress=bar.update)
        yield watch
    for line in watch.warnings():
        print(f"{program}: warning: {line}", file=sys.stderr)

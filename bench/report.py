"""``python -m bench.report``: tables and charts from the records, and regressions between commits.

A file has the markers ``<!-- bench:NAME -->`` and ``<!-- /bench -->``. The text between them is replaced by the table
of that name. No number is typed by hand.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.choice import left_out
from bench.record import RESULTS, ROOT, Record, read
from jllama.errors import InputError, reported

MARKER = re.compile(
    r"(?P<open><!-- bench:(?P<name>[a-z0-9-]+) -->\n)(?P<body>.*?)(?P<close><!-- /bench -->)", re.DOTALL
)
FILES = ("README.md", "docs/benchmarks.md")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser("python -m bench.report", description=(__doc__ or "").split("\n")[0])
    p.add_argument("files", nargs="*", help=f"Markdown files with markers (default: {' '.join(FILES)})")
    p.add_argument("--results", default=str(RESULTS), metavar="DIR", help="where the records are")
    p.add_argument(
        "--against", metavar="COMMIT", help="list what is more than 3%% slower than at COMMIT, beyond the noise"
    )
    p.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file is out of date")
    p.add_argument("--list", action="store_true", help="print the names of the tables, and exit")
    return p


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    with reported("bench.report"):
        args = parser().parse_args(argv)
        if args.list:
            from bench.tables import TABLES

            print("\n".join(TABLES))
            return
        try:
            records = list(read(Path(args.results)))
        except ValueError as error:
            raise InputError(str(error)) from None
        if args.against:
            from bench.regressions import against

            lines, worse = against(records, args.against)
            print("\n".join(lines))
            sys.exit(int(worse))
        for line in left_out(records):
            print(line)
        files = _files(args.files)
        if not args.check:
            _draw(records, Path(args.results) / "plots")
        stale = [path for path in files if _update(path, records, write=not args.check)]
        for path in stale:
            print(f"{path}: {'out of date' if args.check else 'updated'}")
        sys.exit(int(args.check and bool(stale)))


def _draw(records: Sequence[Record], folder: Path) -> None:
    from bench import kernel_plots, plots, scaling

    if (why := plots.unavailable()) is not None:
        print(f"no plots: {why}")
        return
    charts = plots.draw, scaling.draw, kernel_plots.draw_kernels
    drawn = [path for draw in charts for path in draw(records, folder)]
    print(f"{len(drawn)} charts in {folder}")


def _files(given: Sequence[str]) -> list[Path]:
    paths = [Path(f) for f in given] or [p for f in FILES if (p := ROOT / f).exists()]
    if missing := [p for p in paths if not p.is_file()]:
        raise InputError(f"{missing[0]}: no such file")
    return paths


def _update(path: Path, records: Sequence[Record], *, write: bool) -> bool:
    """Whether the tables in ``path`` are out of date. With ``write``, update them."""
    text = path.read_text()
    new = fill(text, records, str(path))
    if new != text and write:
        path.write_text(new)
    return new != text


def fill(text: str, records: Sequence[Record], where: str = "text") -> str:
    """``text`` with new tables between the markers."""
    from bench.tables import TABLES

    def table(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise InputError(f"{where}: bench:{name}: expected one of {', '.join(TABLES)}")
        made = TABLES[name](records).replace("](plots/", f"]({os.path.relpath(RESULTS / 'plots', Path(where).parent)}/")
        return f"{match['open']}{made}\n{match['close']}"

    return MARKER.sub(table, text)


if __name__ == "__main__":
    main()

"""Finds figures that became slower between two commits, beyond the noise."""

from collections.abc import Sequence

from bench.measure import spread
from bench.names import is_ours
from bench.record import HIGHER_IS_BETTER, Record

LIMIT = 0.03
KEY = ("suite", "case", "impl", "model", "dtype", "batch", "seq", "context", "metric", "device")
SINGLE_NOISE = 0.25  # noise of figures that are measured once, such as loading or compilation


def against(records: Sequence[Record], commit: str) -> tuple[list[str], bool]:
    """Compare our newest figures with those of ``commit`` (a prefix is enough). Returns one line per figure that
    changed, and whether any is a regression.

    A regression is worse by more than 3 % plus the spread of both sides. The spread is half the distance between the
    quartiles, divided by the median.
    """
    mine = [r for r in records if is_ours(r["impl"]) and r["value"] is not None]
    old = {_key(r): r for r in sorted(mine, key=_when) if r["commit"].startswith(commit)}
    new = {_key(r): r for r in sorted(mine, key=_when) if not r["commit"].startswith(commit)}
    if not old:
        return [f"no records of commit {commit}"], False
    lines, worse = [], False
    for key in sorted(old.keys() & new.keys(), key=str):
        change = slower(old[key], new[key])
        noise = _noise(old[key]) + _noise(new[key])
        if abs(change) <= LIMIT + noise:
            continue
        worse |= change > 0
        verdict = "REGRESSION" if change > 0 else "better"
        where = f"{key[1]} {key[2]} {key[3]} {key[4]} batch {key[5]} seq {key[6]} context {key[7]}, {key[8]}"
        figures = f"{old[key]['value']:.4g} ({old[key]['commit']}) to {new[key]['value']:.4g} ({new[key]['commit']})"
        lines.append(f"{verdict}: {where}: {figures}, {100 * abs(change):.1f} % (noise {100 * noise:.1f} %)")
    shared = len(old.keys() & new.keys())
    lines.append(f"{shared} figures compared with {commit}, {sum(x.startswith('REG') for x in lines)} regressions")
    return lines, worse


def slower(old: Record, new: Record) -> float:
    """By what fraction the new figure is worse than the old; below zero: better. Throughput is turned into time first,
    so that half the throughput counts as twice the time."""
    ratio = new["value"] / old["value"]
    return (1 / ratio if new["metric"] in HIGHER_IS_BETTER else ratio) - 1


def _noise(record: Record) -> float:
    if record["metric"] == "bytes_peak":
        return 0.0
    return spread(record["samples"]) if len(record["samples"]) > 2 else SINGLE_NOISE


def _key(record: Record) -> tuple[object, ...]:
    return tuple(record[k] for k in KEY)


def _when(record: Record) -> str:
    return record["when"]

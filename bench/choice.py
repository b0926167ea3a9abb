"""Which records tables and charts show: for every workload, those of runs that measured us and peers on one machine. A
newer run of ours alone does not replace a run with peers."""

import itertools
from collections.abc import Callable, Iterator, Sequence

from bench.names import CHECKED, is_ours
from bench.record import Record

NEWEST = ("device", "model", "dtype")  # what a chart, and a line under a table, is of
WORKLOAD = ("case", "metric", "batch", "seq")  # without the number of new tokens, on which a rate hardly depends
BITS = {"f32": 32, "bf16": 16, "f16": 16, "int8": 8, "fp8": 8, "int4": 4}  # of a weight, by format

Group = list[Record]


def grouped(records: Sequence[Record], keys: Sequence[str]) -> list[Group]:
    """Group records by ``keys``, in the order of their first record."""
    groups: dict[tuple[object, ...], Group] = {}
    for record in records:
        groups.setdefault(tuple(record[k] for k in keys), []).append(record)
    return list(groups.values())


def latest(records: Sequence[Record], keys: Sequence[str]) -> list[Group]:
    """Group records by ``keys``, and keep only the newest run of each group. So a group's records were measured side by
    side."""
    groups = grouped(records, keys)
    newest = [max(rows, key=lambda r: r["when"])["run"] for rows in groups]
    return [[r for r in rows if r["run"] == run] for rows, run in zip(groups, newest, strict=True)]


def newest(records: Sequence[Record]) -> list[Group]:
    """The records to show, as groups of one device, model and format of weights: of every workload the figures that
    `side_by_side` gives, ours first. A group has fp8, which only peers have, beside our int8."""
    groups: dict[tuple[str, ...], Group] = {}
    for workload in _workloads(records):
        for r in side_by_side(workload):
            dtype = "int8" if r["dtype"] == "fp8" else r["dtype"]
            groups.setdefault((r["device"], r["model"], dtype), []).append(r)
    return [sorted(group, key=lambda r: not is_ours(r["impl"])) for group in groups.values()]


def figures(records: Sequence[Record]) -> Group:
    """Records that have a figure. Runs with a ``note`` are rehearsals; they count only where there is no other."""

    def owner(record: Record) -> tuple[object, ...]:
        return tuple(record[k] for k in NEWEST)

    found = [r for r in records if r["value"] is not None]
    proper = {owner(r) for r in found if "note" not in r}
    return [r for r in found if "note" not in r or owner(r) not in proper]


def kind_of(record: Record) -> tuple[str, str]:
    """The subject of a figure: an implementation in a format of weights."""
    return record["impl"], record["dtype"]


def bits(record: Record) -> int:
    """The bits of a weight."""
    return BITS[record["dtype"].partition("-")[0]]


def held_both(run: Group) -> bool:
    """Whether a run has both our figures and figures of peers."""
    return len({is_ours(r["impl"]) for r in run}) == 2


def side_by_side(records: Sequence[Record], kind: Callable[[Record], object] = kind_of) -> Group:
    """The figures of one workload to show, the newest run first.

    First come runs that held us and peers. The newest of them counts whole. An older one counts with what no newer one
    had. Where that is a peer, our figures of the same run in as many bits come with it: cards differ, so a peer is
    compared with us on its own card. Last come formats of our weights that no such run had, from their newest run.
    Figures of peers in runs without us are not shown.
    """
    # Measured twice in one run (by two commands on one machine), the second figure counts.
    runs = [list({kind_of(r): r for r in run}.values()) for run in grouped(records, ("run",))]
    runs.sort(key=lambda run: max(r["when"] for r in run), reverse=True)
    shown: Group = []
    for run in filter(held_both, runs):
        new = [r for r in run if kind(r) not in {kind(s) for s in shown}]
        widths = {bits(r) for r in new if not is_ours(r["impl"])}
        shown += [r for r in run if r in new or (is_ours(r["impl"]) and bits(r) in widths)]
    for run in itertools.filterfalse(held_both, runs):
        formats = {s["dtype"] for s in shown if is_ours(s["impl"])}
        shown += [r for r in run if is_ours(r["impl"]) and r["dtype"] not in formats]
    return shown


def left_out(records: Sequence[Record]) -> Iterator[str]:
    """One line for every run of ours whose figures are newer than those shown, because it held no peer."""
    rates = [r for r in records if r["suite"] == "compare" and r["case"] in CHECKED and r["metric"] == "tokens_per_s"]
    newer: Group = []
    for workload in _workloads(rates):
        ours = [r for r in side_by_side(workload) if is_ours(r["impl"])]
        newer += [r for r in workload if is_ours(r["impl"]) and r["when"] > max(r["when"] for r in ours)]
    for run in grouped(newer, ("run", "commit", "model")):
        loads = ", ".join(f"{r['case']} {r['dtype']} {r['batch']} x {r['seq']}" for r in run)
        first = run[0]
        yield f"not shown: run {first['run']} at {first['commit']}, newer but without peers: {first['model']} {loads}"


def _workloads(records: Sequence[Record]) -> list[Group]:
    return grouped(figures(records), ("device", "model", *WORKLOAD))

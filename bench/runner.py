"""What `bench.compare` does once its arguments are read: in which order things are run, and what is shown of them."""

import argparse
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from bench.comparison import Comparison, results
from bench.entries import Entry, entries, say
from bench.names import NEWEST, is_ours, latest
from bench.process import Budget
from bench.record import Record
from bench.rows import table

WARMING = 0.6  # of the time that is left, where all warm up together: so that there is time to measure

Part = tuple[Comparison, Entry]


def run(settings: argparse.Namespace) -> int:
    """Every model in every dtype; 1 where one of our own backends failed."""
    settings.clock = Budget(settings.budget)
    records: list[Record] = []
    with ExitStack() as still_open:
        if settings.order == "warm-together":
            comparisons = [still_open.enter_context(c) for c in _comparisons(settings)]
            together(comparisons, settings.clock)
            records += [r for c in comparisons for r in c.records]
        else:
            for comparison in _comparisons(settings):
                with comparison:
                    one_by_one(comparison, turns=(settings.order or comparison.default_order) == "turns")
                records += comparison.records
    _show(settings, records)
    return int(any(is_ours(r["impl"]) and r.get("failed") for r in records))


def _comparisons(settings: argparse.Namespace) -> Iterator[Comparison]:
    """Each when it is asked for, ready to begin."""
    who: list[Entry] = []
    for preset in settings.preset.split(",") if settings.preset else [None]:
        for dtype in settings.dtype or [None]:
            made = Comparison(settings, preset, dtype)
            who = who or entries(settings, made.platform)
            made.begin(who)
            yield made


def one_by_one(comparison: Comparison, *, turns: bool) -> None:
    """One implementation after the other; or in turns, run by run, so that what else the machine does hits all."""
    for group in [comparison.entries] if turns else [[e] for e in comparison.entries]:
        for entry in group:
            comparison.open(entry)
        comparison.measure(group)
        if turns:
            comparison.measure_ceilings_again()
        comparison.record(group)


def together(comparisons: Sequence[Comparison], clock: Budget) -> None:
    """Open, and run cold and warm, as many implementations at the same time as the device holds, for compiling takes
    most of a session; then time them one by one. What is measured once, cold, is measured beside the others'."""
    parts = [part for c in zip(*(c.parts for c in comparisons), strict=True) for part in c]
    held = sum(c.reference_bytes for c in comparisons)
    all_waves = list(waves(parts, min(c.memory for c in comparisons) - held))
    for number, wave in enumerate(all_waves):
        with clock.part(WARMING / (len(all_waves) - number)), ThreadPoolExecutor(len(wave)) as pool:
            list(pool.map(_warm_up, wave))
        for comparison, entry in wave:
            comparison.measure([entry])
            comparison.record([entry])


def waves(parts: Sequence[Part], room: float) -> Iterator[list[Part]]:
    """Cut ``parts`` into runs of those that fit into ``room`` bytes together; one that never does comes alone."""
    wave: list[Part] = []
    left = room
    for comparison, entry in parts:
        needs = comparison.needs(entry)
        if wave and needs > left:
            yield wave
            wave, left = [], room
        wave.append((comparison, entry))
        left -= needs
    if wave:
        yield wave


def _warm_up(part: Part) -> None:
    comparison, entry = part
    comparison.open(entry)
    for load in comparison.loads_of(entry):
        comparison.warm_up(entry, load)


def _show(settings: argparse.Namespace, records: list[Record]) -> None:
    print(table(records))
    first = records[0]
    commit = f"{first['commit']}{' (changed)' if first['dirty'] else ''}"
    runs = ", ".join(dict.fromkeys(r["run"] for r in records))
    print(f"\nrun {runs} at {commit}: {len(records)} records in {results(settings)}")
    if settings.plots == "-":
        return
    from bench import plots

    if (why := plots.unavailable()) is not None:
        say(f"no plots: {why}")
        return
    folder = Path(settings.plots) if settings.plots else results(settings) / "plots"
    for mine in latest(records, NEWEST):
        for path in plots.compare_plots(mine, folder):
            print(f"plot: {path}")

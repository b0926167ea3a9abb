"""Runs `bench.compare` once its arguments are parsed: the order of the runs, and the output."""

import argparse
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from bench.choice import NEWEST, latest
from bench.comparison import Comparison, results
from bench.entries import Entry, entries, say
from bench.names import is_ours
from bench.process import Budget
from bench.record import Record
from bench.rows import table
from jllama.errors import InputError

WARMING = 0.6  # part of the remaining time that warming up may take where all warm up together

Part = tuple[Comparison, Entry]


def run(settings: argparse.Namespace) -> int:
    """Run every model in every dtype. Returns 1 if one of our own backends failed."""
    settings.clock, settings.ceilings, settings.run = Budget(settings.budget), {}, None
    records: list[Record] = []
    with ExitStack() as still_open:
        if settings.order == "warm-together":
            comparisons = [still_open.enter_context(c) for c in _comparisons(settings)]
            warm_together(comparisons, settings.clock)
            records += [r for c in comparisons for r in c.records]
        else:
            for comparison in _comparisons(settings):
                with comparison:
                    one_by_one(comparison, turns=comparison.order == "turns")
                records += comparison.records
    _show(settings, records)
    return int(any(is_ours(r["impl"]) and r.get("failed") for r in records))


def _comparisons(settings: argparse.Namespace) -> Iterator[Comparison]:
    """A comparison for each model, dtype and mesh. It is made when its turn comes: only one may use the device."""
    who: list[Entry] = []
    presets = settings.preset.split(",") if settings.preset else [None]
    for preset, dtype, shape in itertools.product(presets, settings.dtype or [None], settings.meshes):
        made = Comparison(settings, preset, dtype, shape)
        if not made.loads:  # a line has said why
            with made:
                continue
        who = who or entries(settings, made.platform)
        made.add_entries(who)
        yield made


def one_by_one(comparison: Comparison, *, turns: bool) -> None:
    """Run one implementation after the other, or in turns, run by run, so that other load affects all alike."""
    for group in [comparison.entries] if turns else [[e] for e in comparison.entries]:
        for entry in group:
            comparison.open(entry)
        comparison.measure(group)
        if turns:
            comparison.measure_ceilings_again()
        comparison.record(group)


def warm_together(comparisons: Sequence[Comparison], clock: Budget) -> None:
    """Open and warm up as many implementations at the same time as fit on the device, because compiling takes most of a
    session. Then time them one by one. Cold figures are therefore measured while others run."""
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
    """Split ``parts`` into groups that fit into ``room`` bytes at once. One that does not fit gets its own group."""
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
    if not records:
        raise InputError("expected a workload that can run; the lines above say why none can")
    print(table(records))
    first = records[0]
    commit = f"{first['commit']}{' (changed)' if first['dirty'] else ''}"
    runs = ", ".join(dict.fromkeys(r["run"] for r in records))
    print(f"\nrun {runs} at {commit}: {len(records)} records in {results(settings)}")
    if settings.plots == "-":
        return
    from bench import plots, scaling

    if (why := plots.unavailable()) is not None:
        say(f"no plots: {why}")
        return
    folder = Path(settings.plots) if settings.plots else results(settings) / "plots"
    of_one = (path for mine in latest(records, NEWEST) for path in plots.compare_plots(mine, folder))
    for path in of_one if settings.meshes == [None] else scaling.draw(records, folder):
        print(f"plot: {path}")

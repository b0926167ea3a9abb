"""``python -m bench.load``: engines under mixed traffic, ours and vLLM's, with the same requests.

Each engine runs in a process of its own, which steps it: no server and no text. The traffic is ``mixed`` (prompts of
log-normal lengths, new tokens uniform) and ``shared`` (the same, with several samples of each prompt and a prefix that
all prompts share); each all at once, and as a Poisson process at 80 % of what the first engine reached all at once.
"""

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.compare import names, pythons
from bench.mixed import FIGURES, arrivals, times
from bench.names import OURS, markdown, name_of
from bench.record import RESULTS, Record, Run, append
from bench.traffic import CAPACITY, Traffic, repeated
from jllama.errors import InputError, reported

MIXES = ("mixed", "shared")
ENGINES = {"vllm": "vllm_traffic", "engine": "ours_traffic"}  # ours last: the first one's rate is everybody's load
# By default the traffic on a GPU, and a small one on a CPU. Tokens of prompts a turn: as vLLM's server takes.
SIZES: dict[str, dict[str, int]] = {
    "gpu": dict(requests=1000, slots=256, prompt=256, longest=1024, least=16, most=512, prefix=1000, budget=8192),
    "cpu": dict(requests=24, slots=4, prompt=24, longest=96, least=4, most=24, prefix=100, budget=512),
}
FILE = "traffic.jsonl"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser("python -m bench.load", description=(__doc__ or "").split("\n")[0])
    add_traffic_flags(p)
    p.add_argument("--engines", default=None, help=f"any of {','.join(ENGINES)} (default: both on a GPU, else ours)")
    p.add_argument("--mixes", default=",".join(MIXES), help=f"any of {','.join(MIXES)} (default: both)")
    p.add_argument("--samples", type=int, default=8, metavar="N", help="samples of each prompt of shared (default: 8)")
    p.add_argument("--prefix", type=int, metavar="N", help="tokens that all prompts of shared begin with")
    p.add_argument("--at-once", action="store_true", help="leave out the Poisson arrivals")
    p.add_argument(
        "--peer-python", action="append", default=[], metavar="PEER=PATH", help="run a peer in another Python"
    )
    return p


def add_traffic_flags(p: argparse.ArgumentParser) -> None:
    """The flags that every program under traffic has."""
    model = p.add_mutually_exclusive_group()
    model.add_argument("--model", metavar="PATH", help="a checkpoint directory (default: the embedded demo model)")
    model.add_argument("--preset", metavar="NAME", help="random weights of this shape, for example 7b")
    p.add_argument("--dtype", choices=("f32", "bf16", "f16"), help="of the weights (default: f32 on a CPU, else bf16)")
    p.add_argument("--requests", type=int, metavar="N", help="texts to draw (default: 1000 on a GPU, else 24)")
    p.add_argument(
        "--arrivals", type=int, metavar="N", help="texts that arrive as a Poisson process (default: as many)"
    )
    p.add_argument("--slots", type=int, metavar="N", help="texts that are drawn at a time (default: 256 on a GPU)")
    p.add_argument("--prompt", type=int, metavar="N", help="the median length of a prompt (default: 256 on a GPU)")
    p.add_argument("--longest", type=int, metavar="N", help="of a prompt (default: 1024 on a GPU)")
    p.add_argument("--least", type=int, metavar="N", help="new tokens (default: 16 on a GPU)")
    p.add_argument("--most", type=int, metavar="N", help="new tokens (default: 512 on a GPU)")
    help_budget = "tokens of prompts a turn (default: 8192 on a GPU; of jllama serve: its own)"
    p.add_argument("--budget", type=int, metavar="N", help=help_budget)
    p.add_argument("--temperature", type=float, default=1.0, help="0: the likeliest token (default: 1)")
    p.add_argument("--runs", type=int, default=1, help="measured runs of each traffic (default: 1)")
    p.add_argument("--time-limit", type=float, default=600, metavar="S", help="of each step (default: 600)")
    p.add_argument("--cache-dir", default=None, help="folder for what is compiled (default: the user's cache folder)")
    p.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where records are appended")


def main(argv: list[str] | None = None) -> None:
    """Run the command line; exits with 1 where our engine failed."""
    with reported("bench.load"):
        args = parser().parse_args(argv)
        mixes, python = names("--mixes", args.mixes, MIXES), pythons(args.peer_python)
        engines = None if args.engines is None else names("--engines", args.engines, tuple(ENGINES))
        check_numbers(args)
        failed = run(args, mixes, engines, python)
    sys.exit(int(failed))


def check_numbers(args: argparse.Namespace) -> None:
    """Raise `InputError` for a number that cannot be meant."""
    least = {"runs": 1, "samples": 1, "prefix": 0, "longest": 2, "temperature": 0}
    counts = ("requests", "arrivals", "slots", "pages", "prompt", "longest", "least", "most", "budget")
    for flag in (*counts, "runs", "samples", "prefix"):
        if (found := getattr(args, flag, None)) is not None and found < least.get(flag, 1):
            raise InputError(f"--{flag}: expected at least {least.get(flag, 1)}, found {found}")


def traffic_of(args: argparse.Namespace, platform: str) -> tuple[Traffic, int, int]:
    """The mixed traffic of the flags, the slots, and the budget of a turn."""
    given = {name: getattr(args, name, None) for name in SIZES["cpu"]}
    sizes = SIZES["cpu" if platform == "cpu" else "gpu"] | {k: v for k, v in given.items() if v is not None}
    args.prefix = sizes.pop("prefix")
    slots, budget = sizes.pop("slots"), sizes.pop("budget")
    if sizes["least"] > sizes["most"]:
        raise InputError(f"--least: expected at most {sizes['most']} (--most), found {sizes['least']}")
    return Traffic("mixed", temperature=args.temperature, **sizes), slots, budget


@dataclass(frozen=True)
class Place:
    """What all engines of a run share: the device, and the model."""

    run: Run
    platform: str
    model: str  # its name
    path: str
    dtype: str
    shape: dict[str, Any]
    compiled: str  # the folder for what is compiled

    def job(self, traffic: Traffic, slots: int, budget: int) -> dict[str, Any]:
        """What an engine is opened with that has room for a traffic."""
        if traffic.context > (room := self.shape["max_seq_len"]):
            raise InputError(f"--longest: {self.model} has room for {room} tokens, found {traffic.context} in all")
        sizes = {"batch": slots, "max_len": traffic.context, "budget": budget, "context": room}
        how = {"model": self.path, "dtype": self.dtype, "platform": self.platform, "compiled": self.compiled}
        shape = {name: self.shape[name] for name in ("config", "vocab_size", "bos_id")}
        return {**sizes, **how, **shape, "backend": "auto", "traffic": dataclasses.asdict(traffic)}


def prepare(args: argparse.Namespace) -> Place:
    """Find the device and the model."""
    from bench.models import cache_folder, model
    from bench.record import start_run
    from bench.reference import Reference

    compiled = str(cache_folder(args.cache_dir) / "compiled")
    about = Reference(Path(compiled))
    hello, platform = about.hello, about.hello["platform"]
    dtype = args.dtype or ("f32" if platform == "cpu" else "bf16")
    name, path = model(args, about, args.preset, dtype)
    shape = about.ask("shape", 60, model=path)
    about.rest()  # the engines have the device to themselves
    return Place(start_run(hello["device"], hello["versions"], {}), platform, name, path, dtype, shape, compiled)


def run(args: argparse.Namespace, mixes: list[str], engines: list[str] | None, python: dict[str, str]) -> bool:
    """Measure every engine, print the table, and append the records. Returns whether ours failed."""
    args.in_memory = True
    place = prepare(args)
    mixed, slots, budget = traffic_of(args, place.platform)
    shared = dataclasses.replace(mixed, name="shared", samples=args.samples, prefix=args.prefix)
    job = place.job(shared if "shared" in mixes else mixed, slots, budget)
    records: list[Record] = []
    rates: dict[str, float] = {}
    for engine in engines or (["engine"] if place.platform == "cpu" else list(ENGINES)):
        loads = [traffic for traffic in (mixed, shared) if traffic.name in mixes]
        for traffic, how in measured(engine, python, job, loads, rates, args):
            append(args.results / FILE, made := list(records_of(place, engine, traffic, how, slots)))
            records += made
    print(table(records))
    print(f"\nrun {place.run.run}: {len(records)} records in {args.results}")
    return any(r["value"] is None and r["impl"] in OURS for r in records)


def measured(
    engine: str,
    python: dict[str, str],
    job: dict[str, Any],
    loads: Sequence[Traffic],
    rates: dict[str, float],
    args: argparse.Namespace,
) -> Iterator[tuple[Traffic, dict[str, Any]]]:
    """What one engine does under each traffic: the summaries of its runs, or why there are none. ``rates`` are the
    requests a second that the first engine finished all at once, by traffic."""
    from bench.entries import say
    from bench.process import PeerFailed, Worker, find_python

    where, why = find_python(ENGINES[engine], python)
    if where is None:
        yield from ((traffic, {"why": why}) for traffic in loads)
        return
    with Worker(ENGINES[engine], where, alone=True) as worker:
        try:
            opened = worker.ask("open", args.time_limit, job=job)
        except PeerFailed as error:
            yield from ((traffic, {"why": str(error)}) for traffic in loads)
            return
        say(f"{engine}: ready after {opened['load_s']:.0f} s")

        def runs(traffic: Traffic) -> dict[str, Any]:
            each = [dataclasses.asdict(one) for one in repeated(traffic, args.runs)]
            try:
                done = [worker.ask("traffic", args.time_limit, args=one) for one in each]
            except PeerFailed as error:
                return {"why": str(error)}
            say(f"{engine}: {traffic.name}: {statistics.median(rates_of(done)):,.0f} tokens/s")
            return opened | {"runs": done}

        for traffic in loads:
            yield traffic, (found := runs(traffic))
            if "runs" in found:
                finished = statistics.median(r["texts"] / r["seconds"] for r in found["runs"])
                rates.setdefault(traffic.name, CAPACITY * finished)
            if traffic.name in rates and not args.at_once:
                yield (later := traffic.at_rate(rates[traffic.name], args.arrivals)), runs(later)


def rates_of(runs: Sequence[Mapping[str, Any]]) -> list[float]:
    """New tokens a second of every run."""
    return [r["tokens"] / r["seconds"] for r in runs]


def records_of(place: Place, impl: str, traffic: Traffic, found: Mapping[str, Any], slots: int) -> Iterator[Record]:
    """The rate, and the times in seconds: ``value`` is the median of the runs' medians, ``p99`` that of theirs."""
    run = place.run
    base: dict[str, Any] = dict(suite="traffic", impl=impl, model=place.model, dtype=place.dtype, batch=slots)
    base |= dict(seq=traffic.prefix + traffic.prompt, context=traffic.context, floor=None)
    base |= dict(traffic=dataclasses.asdict(traffic), settings=found.get("settings", {}))
    more = {"versions": {**run.versions, **found.get("versions", {})}}
    if not (runs := found.get("runs")):
        nothing = dict(metric="tokens_per_s", value=None, samples=[], why=found["why"])
        yield run.record(case=traffic.name, **base, **nothing) | more
        return
    rates, counted = rates_of(runs), [r.get("counted", {}) for r in runs]
    rate = dict(metric="tokens_per_s", value=statistics.median(rates), samples=rates, counted=counted)
    yield run.record(case=traffic.name, **base, **rate) | more
    for figure in FIGURES:
        stats = [r[figure] for r in runs if r[figure] is not None]
        medians, case = [s["p50"] for s in stats], f"{traffic.name}, {figure}"
        if not stats:
            nothing = dict(metric="s", value=None, samples=[], why="all tokens of every text came together")
            yield run.record(case=case, **base, **nothing) | more
            continue
        times = dict(metric="s", value=statistics.median(medians), samples=medians, stats=stats)
        yield run.record(case=case, p99=statistics.median(s["p99"] for s in stats), **base, **times) | more


def table(records: Sequence[Record]) -> str:
    """One row per traffic and implementation; times in milliseconds, p50 / p99."""
    rows = []
    for r in sorted((r for r in records if r["metric"] == "tokens_per_s"), key=lambda r: r["case"]):
        start = [r["case"], arrivals(r["traffic"]), name_of(r["impl"])]
        rows.append([*start, r["why"] if r["value"] is None else f"{r['value']:,.0f}", *times(r, records)])
    return markdown(("traffic", "requests/s", "implementation", "tokens/s", *FIGURES.values()), rows)


if __name__ == "__main__":
    main()

"""``python -m bench.serve``: a server of OpenAI's API under mixed traffic, over HTTP.

It starts ``jllama serve``, or takes the URL of a server that runs. The traffic is that of `bench.load`: all at once,
which gives the rate at saturation, then as a Poisson process at 80 % of that. Of ``jllama serve`` it also measures what
HTTP costs: the rate at 64 streams beside that of the same engine in a process that steps it.
"""

import argparse
import contextlib
import dataclasses
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bench.load import FILE, Place, add_traffic_flags, check_numbers, prepare, rates_of, records_of, table, traffic_of
from bench.record import Record, append
from bench.traffic import CAPACITY, Traffic, draw, rehearsals, repeated
from jllama.errors import InputError, reported

NAME = "bench"  # the served model's
REHEARSED = 64  # new tokens of the texts before those that are timed: so many that all run at a time
STREAM_RUNS = 3  # of the streams, which are short, and whose rates differ by little


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser("python -m bench.serve", description=(__doc__ or "").split("\n")[0])
    add_traffic_flags(p)
    p.add_argument("--url", help="measure the server at this address, which has --slots (default: start jllama serve)")
    p.add_argument("--impl", default="vllm-serve", help="with --url: its name in the records (default: vllm-serve)")
    p.add_argument("--impl-version", metavar="N", help="with --url: the server's version, for the records")
    p.add_argument("--served-name", default=NAME, metavar="NAME", help="with --url: the model's name there")
    p.add_argument("--api-key", help="with --url: the server's key")
    p.add_argument("--pages", type=int, metavar="N", help="of jllama's cache (default: as many as fit)")
    p.add_argument("--flags", default="", help="more flags of jllama serve, for example --flags='--quant int8'")
    p.add_argument(
        "--also", metavar="COMMAND", help="run this at the end, another client; {url} is the server's address"
    )
    p.add_argument("--rate", type=float, metavar="N", help="requests a second (default: 80 %% of the saturated rate)")
    p.add_argument("--streams", type=int, default=64, metavar="N", help="at which HTTP's cost is taken (default: 64)")
    return p


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    with reported("bench.serve"):
        args = parser().parse_args(argv)
        check_numbers(args)
        run(args)


def run(args: argparse.Namespace) -> None:
    """Measure, print the table, and append the records."""
    args.in_memory = False  # a server reads a checkpoint
    place = prepare(args)
    mixed, slots, _ = traffic_of(args, place.platform)
    budget = args.budget or default_budget(place.platform)
    job = place.job(mixed, slots, budget) | {"pages": args.pages}
    # As many streams as asked for, all of one length, so that all run from the first step to the last.
    even = dict(requests=min(args.streams, slots), longest=mixed.prompt, least=mixed.most)
    streams = dataclasses.replace(mixed, name="streams", **even)
    impl = args.impl if args.url else "serve"
    versions = {impl: args.impl_version} if args.url and args.impl_version else {}
    records: list[Record] = []

    def keep(made: Iterable[Record]) -> None:
        append(args.results / FILE, made := list(made))
        records.extend(made)

    if args.url is None:  # first: what it compiles is there when the server starts
        keep(alone(args, place, job, streams))
    with served(args, job) if args.url is None else contextlib.nullcontext(args.url) as url:
        for asks in rehearsals(mixed, slots, budget, REHEARSED):
            drive(args, url, asks)

        def measure(traffic: Traffic, runs: int) -> float:
            done = [asked(args, url, one, place) for one in repeated(traffic, runs)]
            found = {"runs": done, "settings": {"flags": args.flags}, "versions": versions}
            over_http = dataclasses.replace(traffic, name=f"http-{traffic.name}")
            keep(records_of(place, impl, over_http, found, slots))
            return statistics.median(run["texts"] / run["seconds"] for run in done)

        saturated = measure(mixed, args.runs)
        measure(mixed.at_rate(args.rate or CAPACITY * saturated, args.arrivals), args.runs)
        measure(streams, STREAM_RUNS)
        if args.also:
            subprocess.run(shlex.split(args.also.replace("{url}", url)), check=False)
    print(table(records))
    if args.url is None:
        rate = {r["impl"]: r["value"] or math.nan for r in records if r["case"] == "http-streams"}
        print(f"\nHTTP costs {100 * (1 - rate['serve'] / rate['engine']):.1f} % at {streams.requests} streams")
    print(f"\nrun {place.run.run}: {len(records)} records in {args.results}")


def default_budget(platform: str) -> int:
    """The tokens of prompts that a turn of `jllama serve` feeds by default. Asks for no device: the server has it."""
    from jllama.engine.tuning import tuning_for

    return tuning_for(SimpleNamespace(platform=platform)).budget


def drive(args: argparse.Namespace, url: str, asks: Any) -> Any:
    """The timeline of prompts."""
    from bench import client

    return client.drive(url, args.served_name, asks, args.temperature, args.api_key)


def asked(args: argparse.Namespace, url: str, traffic: Traffic, place: Place) -> dict[str, Any]:
    """The summary of one run."""
    from bench.entries import say

    found = drive(args, url, draw(traffic, place.shape["vocab_size"], place.shape["bos_id"])).summary()
    say(f"{traffic.name}: {rates_of([found])[0]:,.0f} tokens/s")
    return found


def alone(args: argparse.Namespace, place: Place, job: dict[str, Any], streams: Traffic) -> list[Record]:
    """The same streams in a process that steps the engine itself."""
    from bench.entries import say
    from bench.process import PeerFailed, Worker

    with Worker("ours_traffic") as worker:
        try:
            found = worker.ask("open", args.time_limit, job=job)
            each = repeated(streams, STREAM_RUNS)
            found["runs"] = [worker.ask("traffic", args.time_limit, args=dataclasses.asdict(one)) for one in each]
        except PeerFailed as error:
            found = {"why": str(error)}
            say(f"the engine alone: {error}")
    traffic = dataclasses.replace(streams, name="http-streams")  # beside those over HTTP in tables
    return list(records_of(place, "engine", traffic, found, job["batch"]))


@contextlib.contextmanager
def served(args: argparse.Namespace, job: dict[str, Any]) -> Iterator[str]:
    """``jllama serve`` from its ready line to its end; the URL."""
    args.served_name = NAME
    dtype = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}[job["dtype"]]
    command = [sys.executable, "-m", "jllama", "serve", "--model", job["model"], "--port", "0", "--dtype", dtype]
    command += ["--served-model-name", NAME, "--slots", str(job["batch"]), "--max-seq-len", str(job["max_len"])]
    command += ["--budget", str(job["budget"]), "--no-access-log", "--quiet", "--compilation-cache", job["compiled"]]
    command += [*([] if job.get("pages") is None else ["--pages", str(job["pages"])]), *shlex.split(args.flags)]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(os.environ.get("JLLAMA_BENCH_LOGS", folder)) / "jllama-serve.log"
        with log.open("wb") as stderr:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr)
        try:
            yield _ready(process, log, args.time_limit)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _ready(process: subprocess.Popen[bytes], log: Path, limit_s: float) -> str:
    until = time.monotonic() + limit_s
    while (ready := re.search(r"ready at (http://\S+)\n", log.read_text(errors="replace"))) is None:
        if process.poll() is not None or time.monotonic() > until:
            said = log.read_text(errors="replace").strip().splitlines()
            raise InputError(f"jllama serve: expected its ready line, found {said[-1] if said else 'nothing'}")
        time.sleep(0.05)
    return ready[1]


if __name__ == "__main__":
    main()

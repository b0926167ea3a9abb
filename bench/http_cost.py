"""``python -m bench.http_cost``: what HTTP costs a server whose device is faked, so that it runs on any machine.

The engine, its thread and the server are real. In place of compiled steps there is a clock: a decode step ends
``--step-ms`` after the one before it, and its tokens are random. So the difference between the engine alone and the
server is the host's: the event loop, which shares Python's interpreter lock with the engine's thread. The client is a
process of its own.
"""

import argparse
import asyncio
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bench.peers.ours_traffic import Server
from bench.traffic import Ask, Traffic, draw, drive
from jllama.decode import NO_TOKEN, StepOutput
from jllama.engine.engine import Engine
from jllama.engine.tuning import Tuning
from jllama.errors import reported
from jllama.kernels import Choice, Recorded
from jllama.text.lm import LM

TEMPERATURE = 1.0
RAN = Recorded((("decode_step", Choice("fake", "a clock")),))


@dataclass
class Result:
    """An array that can be read at ``at``, as one that a device computes."""

    array: np.ndarray
    at: float

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if (left := self.at - time.perf_counter()) > 0:
            time.sleep(left)
        return self.array

    def copy_to_host_async(self) -> None:
        """Nothing: it is on the host."""


class Clock:
    """Takes the place of an engine's compiled steps. Every text has ``new`` tokens. The host holds the interpreter lock
    for ``host_s`` at each launch, as a dispatch does."""

    def __init__(self, engine: Engine, *, new: int, step_s: float, piece_s: float, host_s: float) -> None:
        self._step_s, self._piece_s, self._host_s, self._new = step_s, piece_s, host_s, new
        self._state, self._vocab, self._ready = engine._device._state, engine.params.config.vocab_size, 0.0
        self._left, self._random = np.zeros(engine.slots + 1, np.int64), np.random.default_rng(0)
        engine._device._run = self.run

    def run(self, program: tuple[str, int, str], step: Any, *arguments: Any, **static: Any) -> Any:
        """What `jllama.engine.device.Device` expects of a step."""
        name, size, _ = program
        busy = time.perf_counter() + self._host_s
        while time.perf_counter() < busy:
            pass
        if name == "feed":
            self._after(size * self._piece_s)
            return (self._state, None), RAN
        if name == "first":
            self._left[arguments[2]] = self._new
            return (self._state, self._drawn(arguments[2])), RAN
        if name == "decode":
            self._after(self._step_s)
            return (self._state, self._drawn(arguments[2])), RAN
        return self._state

    def _after(self, seconds: float) -> None:
        self._ready = max(self._ready, time.perf_counter()) + seconds

    def _drawn(self, slots: np.ndarray) -> Any:
        self._left[slots] -= 1
        tokens = np.where(self._left[slots] >= 0, self._random.integers(3, self._vocab, slots.size), NO_TOKEN)
        logprobs = np.full((1, slots.size), -1.0, np.float32)
        return StepOutput(Result(tokens[None].astype(np.int32), self._ready), Result(logprobs, self._ready))  # pyright: ignore[reportArgumentType]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser("python -m bench.http_cost", description=(__doc__ or "").split("\n")[0])
    p.add_argument("--streams", type=int, default=64, metavar="N")
    p.add_argument("--new", type=int, default=512, metavar="N", help="tokens of a text")
    p.add_argument("--prompt", type=int, default=96, metavar="N", help="tokens of a prompt")
    p.add_argument("--step-ms", type=float, default=8.0, metavar="MS", help="of a decode step")
    p.add_argument("--piece-ms", type=float, default=3.0, metavar="MS", help="of 128 tokens of a prompt")
    p.add_argument("--host-ms", type=float, default=1.0, metavar="MS", help="of a launch on the host")
    p.add_argument("--interval", type=float, metavar="SECONDS", help="of `jllama serve --stream-interval`")
    p.add_argument("--steps", type=int, default=1, metavar="N", help="decode steps a turn")
    return p


def made(args: argparse.Namespace, lm: LM) -> Engine:
    """An engine on the clock."""
    streams, longest = args.streams, 2 * args.prompt + args.new + 1
    sizes = tuple(n for n in (1, 8, 64, 128) if n < streams)
    tuning = Tuning(128, (1, min(4, args.steps), args.steps), (*sizes, streams), (1, 2, 4, 8, 16), 4096, 4096)
    pages = streams * (longest // 64 + 2)
    engine = Engine(lm.params, slots=streams, pages=pages, max_len=longest, tuning=tuning)
    Clock(engine, new=args.new, step_s=args.step_ms / 1e3, piece_s=args.piece_ms / 1e3, host_s=args.host_ms / 1e3)
    return engine


def asks_of(args: argparse.Namespace, lm: LM, name: str) -> list[Ask]:
    """The prompts, all at once."""
    traffic = Traffic(name, args.streams, args.prompt, 2 * args.prompt, args.new, args.new)
    return draw(traffic, lm.params.config.vocab_size, lm.params.config.bos_id)


def alone(engine: Engine, asks: list[Ask]) -> dict[str, Any]:
    """The texts from an engine that this thread steps."""
    cpu = time.thread_time()
    timeline = drive(Server(engine, TEMPERATURE), asks)
    return timeline.summary() | {"engine_cpu": time.thread_time() - cpu}


def asked(url: str, asks: list[Ask]) -> dict[str, Any]:
    """The texts over HTTP: called in another process."""
    from bench import client

    cpu = time.process_time()
    timeline = client.drive(url, "demo", asks, TEMPERATURE)
    events = sum(map(len, timeline.came))
    return timeline.summary() | {"client_cpu": time.process_time() - cpu, "events": events}


async def over_http(args: argparse.Namespace, lm: LM, engine: Engine, pool: ProcessPoolExecutor) -> dict[str, Any]:
    """The texts from a server in this thread."""
    from jllama.serve.bridge import EngineThread
    from jllama.serve.model import Model
    from jllama.serve.routes import Service, create_app
    from jllama.serve.server import bind, http_server, prepare_interpreter, url_of
    from jllama.serve.settings import Settings

    thread, loop = EngineThread(engine), asyncio.get_running_loop()
    settings = Settings(names=("demo",), access_log=False)
    if args.interval is not None:
        settings = replace(settings, stream_interval=args.interval)
    service = Service(Model.of(lm, engine.max_len), thread, settings, slots=args.streams)
    server, bound = http_server(create_app(service)), bind("127.0.0.1", 0)
    thread.start()
    prepare_interpreter()
    serving = loop.create_task(server.serve([bound]))
    while not server.started:
        await asyncio.sleep(0.01)
    ident = thread._thread.ident
    assert ident is not None
    clock = time.pthread_getcpuclockid(ident)
    url = url_of(bound)
    await loop.run_in_executor(pool, asked, url, asks_of(args, lm, "warm")[:1])
    cpu, engine_cpu = time.thread_time(), time.clock_gettime(clock)
    found = await loop.run_in_executor(pool, asked, url, asks_of(args, lm, "http"))
    found |= {"loop_cpu": time.thread_time() - cpu, "engine_cpu": time.clock_gettime(clock) - engine_cpu}
    server.should_exit = True
    await serving
    thread.stop()
    return found


def line(name: str, found: dict[str, Any]) -> str:
    """What a run has found."""
    tokens, between, first = found["tokens"], found["between"], found["first"]
    text = f"{name}: {tokens / found['seconds']:,.0f} tokens/s; first token {1e3 * first['p50']:.0f} ms, p99 "
    text += f"{1e3 * first['p99']:.0f}; between tokens {1e3 * between['p50']:.1f} ms, p99 {1e3 * between['p99']:.1f}"
    if "events" in found:
        text += f"; {found['events']:,} events"
    for part in ("engine", "loop", "client"):
        if (cpu := found.get(f"{part}_cpu")) is not None:
            text += f"; {part} {1e6 * cpu / tokens:.1f} us a token ({100 * cpu / found['seconds']:.0f} %)"
    if "events" in found:
        text += f", loop {1e6 * found['loop_cpu'] / found['events']:.1f} us an event"
    return text


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    with reported("bench.http_cost"):
        args = parser().parse_args(argv)
        from jllama import DEMO

        lm = LM.load(DEMO)
        found = alone(made(args, lm), asks_of(args, lm, "alone"))
        print(line("engine", found), flush=True)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            http = asyncio.run(over_http(args, lm, made(args, lm), pool))
        print(line("http", http), flush=True)
        print(f"HTTP costs {100 * (1 - found['seconds'] / http['seconds']):.1f} % at {args.streams} streams")


if __name__ == "__main__":
    main()

"""A thousand clients that stream at a time, processes of them killed in the middle, and whether anything is lost.

    python tests/support/load.py --seconds 600

starts ``jllama serve`` with the embedded model. Every answer must be the text that the model gives alone for its prompt
and seed. At the end no page may be held, no connection be open, and the process must not have grown. The exit code is 1
if anything is wrong.
"""

import argparse
import asyncio
import contextlib
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hostile_http import KEY

from bench.client import events
from jllama.errors import InputError

PROMPTS = (
    "Once upon a time",
    "The cat",
    "One day a girl",
    "Tom and Lily",
    "In the forest",
    "A big red ball",
    "It was",
    "",
)
WAIT = 120.0  # seconds for an answer
MAX_GROWTH = 0.05  # of the process's memory, from the middle of the run to its end: what an allocator keeps
SETTLES = 60.0  # seconds until what killed clients asked for must be free


def jobs(
    count: int,
    tokens: int,
    alone: Callable[[dict[str, Any]], str],
    settings: Sequence[dict[str, Any]] = ({}, {"top_p": 0.9}, {"top_k": 20}, {"presence_penalty": 0.5}),
) -> list[dict[str, Any]]:
    """Requests, each with its text ``alone``: greedy, drawn, with some settings, with a stop text."""
    made = []
    for i in range(count):
        how: dict[str, Any] = dict(seed=i, temperature=(0.0, 0.8, 1.0)[i % 3])
        how |= settings[i % len(settings)]
        how |= {"stop": "."} if i % 5 == 0 else {}
        prompt = PROMPTS[i % len(PROMPTS)] + " and" * (i % 7)
        body = {"prompt": prompt, "max_tokens": tokens, **how}
        made.append({"body": body | {"stream": True}, "text": alone(body)})
    return made


def of_the_model(body: dict[str, Any]) -> str:
    """What the model says to a request, without a server or an engine."""
    from serving import demo

    how = {name: value for name, value in body.items() if name not in ("prompt", "max_tokens")}
    return demo().generate(body["prompt"], max_new_tokens=body["max_tokens"], **how).text


@dataclass
class Load:
    """What a run found."""

    done: Counter[str] = field(default_factory=Counter)  # "ok", "tokens", "killed", and what went wrong
    wrong: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)  # seconds to the first event of some answers
    memory: list[float] = field(default_factory=list)  # bytes, at equal distances
    seconds: float = 0.0

    def check_memory(self) -> None:
        """Whether the process grew in the second half of the run."""
        middle, end = (self.memory[len(self.memory) // 2], self.memory[-1]) if self.memory else (1, 1)
        if end > middle * (1 + MAX_GROWTH):
            self.wrong.append(f"the process grew from {middle / 2**20:.0f} to {end / 2**20:.0f} MiB")

    def text(self) -> str:
        """For a reader."""
        ok, tokens = self.done["ok"], self.done["tokens"]
        lines = [
            f"{ok} answers, {tokens} events in {self.seconds:.0f} s; {self.done['killed']} client processes killed"
        ]
        if self.first:
            cuts = statistics.quantiles(self.first, n=100)
            lines += [f"first event: p50 {cuts[49]:.2f} s, p99 {cuts[98]:.2f} s"]
        lines += ["memory in MiB: " + " ".join(f"{size / 2**20:.0f}" for size in self.memory)]
        return "\n".join([*lines, f"{len(self.wrong)} wrong", *self.wrong[:20]])


async def run(port: int, file: Path, load: Load, *, processes: int, clients: int, seconds: float, kill: float) -> None:
    """Let processes of so many clients ask what ``file`` holds. Every ``kill`` seconds one of them is killed, and
    another takes its place."""
    from attack import figures

    begin, numbers = time.monotonic(), iter(range(10**6))
    running: dict[asyncio.subprocess.Process, asyncio.Task[None]] = {}

    async def start() -> None:
        command = [sys.executable, __file__, "--client", str(port), str(file), str(clients), str(next(numbers))]
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        running[process] = asyncio.create_task(read(process))

    async def read(process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            with contextlib.suppress(ValueError):  # a line that was cut by the kill
                part = json.loads(line)
                load.done.update(part["done"])
                load.first += part["first"]
                load.wrong += part["wrong"]

    for _ in range(processes):
        await start()
    while (left := begin + seconds - time.monotonic()) > 0:
        await asyncio.sleep(min(left, kill))
        load.memory.append((await asyncio.to_thread(figures, port))["process_resident_memory_bytes"])
        if left > kill:
            victim = random.choice(list(running))
            victim.kill()
            await victim.wait()
            await running.pop(victim)
            load.done["killed"] += 1
            await start()
    for process, reading in running.items():
        process.send_signal(signal.SIGTERM)
        if await asyncio.wait_for(process.wait(), WAIT) != 0:
            load.wrong.append("a client's process failed")
        await reading
    load.seconds = time.monotonic() - begin


def settled(port: int, files: float) -> list[str]:
    """What is not as before when nobody asks for anything: rows, pages, connections."""
    from attack import figures, leftovers

    held, end = leftovers(port, SETTLES), time.monotonic() + SETTLES
    while (now := figures(port)["process_open_fds"]) > files and time.monotonic() < end:
        time.sleep(0.2)
    return held + ([f"{now:g} open files, expected {files:g} as before"] if now > files else [])


class Client:
    """Many clients in one process, each on a connection of its own."""

    def __init__(self, port: int, jobs: list[dict[str, Any]], seed: int) -> None:
        self.port, self.jobs, self.random = port, jobs, random.Random(seed)
        self.stopping = False
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.first: list[float] = []

    async def run(self, clients: int) -> None:
        """Ask until a signal comes; then finish."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._stop)
        telling = asyncio.create_task(self._tell())
        await asyncio.gather(*(self._one() for _ in range(clients)))
        telling.cancel()
        self._print()

    def _stop(self) -> None:
        self.stopping = True

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(0.5)
            self._print()

    def _print(self) -> None:
        print(json.dumps({"done": self.done, "wrong": self.wrong, "first": self.first}), flush=True)
        self.done, self.wrong, self.first = Counter(), [], []

    async def _one(self) -> None:
        while not self.stopping:
            job = self.random.choice(self.jobs)
            try:
                async with asyncio.timeout(WAIT):
                    text, events = await self._ask(job["body"])
            except (InputError, TimeoutError) as error:
                self.wrong.append(f"lost: {type(error).__name__}: {error}: {job['body']}")
                continue
            self.done.update({"ok": 1, "tokens": events})
            if text != job["text"]:
                self.wrong.append(f"another text: {text!r}, expected {job['text']!r}: {job['body']}")

    async def _ask(self, body: dict[str, Any]) -> tuple[str, int]:
        begin, parts = time.monotonic(), []
        async for event in events(f"http://127.0.0.1:{self.port}", json.dumps(body).encode(), KEY):
            if not parts and self.random.random() < 0.1:
                self.first.append(round(time.monotonic() - begin, 3))
            parts.append(event["choices"][0]["text"])
        return "".join(parts), len(parts)


def main() -> int:
    """Run against a process. Returns the exit code."""
    from attack import Process, answer, complaints, figures

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--clients", type=int, default=250, help="in each process")
    parser.add_argument("--kill", type=float, default=5, help="seconds between two processes that are killed")
    parser.add_argument("--slots", default="16")
    args = parser.parse_args()
    load = Load()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "jobs.json"
        file.write_text(json.dumps(jobs(64, 24, of_the_model)))
        server = Process(folder, "--slots", args.slots, "--max-queue", "4096", key=KEY)
        try:
            before, files = asyncio.run(answer(server.port)), figures(server.port)["process_open_fds"]
            how = dict(processes=args.processes, clients=args.clients, seconds=args.seconds, kill=args.kill)
            asyncio.run(run(server.port, file, load, **how))
            load.wrong += settled(server.port, files) + complaints(server.err)
            load.check_memory()
            if asyncio.run(answer(server.port)) != before:
                load.wrong.append("at the end a normal request gets another text")
        finally:
            server.kill()
    print(load.text())
    return 1 if load.wrong else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--client"]:
        port, file, clients, seed = sys.argv[2:]
        made = Client(int(port), json.loads(Path(file).read_text()), int(seed))
        asyncio.run(made.run(int(clients)))
    else:
        sys.exit(main())

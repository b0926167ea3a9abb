"""Thousands of hostile requests to a server's process, and whether it still is what it was.

    python tests/support/attack.py --shots 10000

starts ``jllama serve`` with the embedded model, attacks it, and says what it found; the exit code is 1 if anything is
wrong. ``--only`` takes one kind of shot, ``--number`` repeats a single one and prints its answer.
"""

import argparse
import asyncio
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
from hostile_http import KEY, KINDS, NO_ANSWER, Shot, request, shot
from process import Process
from prometheus_client.parser import text_string_to_metric_families

from jllama.text.grammars import CACHE_BYTES

CLIENTS = 16  # at a time
KEPT = 4 << 20  # bytes of an answer that are looked at
CHECK_EVERY = 100  # shots, a normal request
# What the process may grow by in the last three quarters of an attack: compiled grammars are kept up to so many bytes.
# Without grammars it grows by some MiB at most.
MAX_GROWTH = CACHE_BYTES
TEMPLATE = Path(__file__).parents[1] / "data" / "chat" / "tools.jinja"
HEADERS = {"authorization": f"Bearer {KEY}"}
NORMAL = {"prompt": "Once upon a time", "max_tokens": 12, "temperature": 1.0, "seed": 7, "n": 2, "logprobs": 1}
LEAKS = re.compile(rb'Traceback|File "|site-packages|\.py\b|\bline \d+, in |0x[0-9a-f]{8}|root:x:')
MESSAGE = re.compile(rb'"message":"([^"]{,60})')
STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")


@dataclass
class Report:
    """What an attack found."""

    answers: dict[str, Counter[int]] = field(default_factory=dict)  # of every kind, how many of each status
    wrong: list[str] = field(default_factory=list)
    memory: list[tuple[int, int]] = field(default_factory=list)  # shots so far, bytes of the process
    slowest: list[tuple[float, str]] = field(default_factory=list)  # seconds to an answer, and whose
    messages: dict[str, Counter[bytes]] = field(default_factory=dict)  # of every kind, what the errors said

    def check_memory(self) -> None:
        """Whether the process grew, once it had seen every kind of shot."""
        sizes = [size for _, size in self.memory]
        if sizes and (grown := sizes[-1] - sizes[len(sizes) // 4]) > MAX_GROWTH:
            self.wrong.append(f"the process grew by {grown >> 20} MiB, expected at most {MAX_GROWTH >> 20}")

    def text(self) -> str:
        """For a reader."""
        lines = [
            f"{kind:17}" + "  ".join(f"{s or 'none'}: {n}" for s, n in sorted(found.items()))
            for kind, found in sorted(self.answers.items())
        ]
        lines += ["slowest: " + ", ".join(f"{name} {seconds:.1f} s" for seconds, name in sorted(self.slowest)[:-8:-1])]
        lines += ["memory in MiB: " + ", ".join(f"{at}: {size >> 20}" for at, size in self.memory)]
        return "\n".join([*lines, f"{len(self.wrong)} wrong", *self.wrong[:40]])


async def fire(port: int, one: Shot) -> bytes:
    """Everything that a shot gets back."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=KEPT)
    received = bytearray()

    async def read() -> None:
        while len(received) < KEPT and (part := await reader.read(1 << 16)):
            received.extend(part)

    try:
        for i, part in enumerate(one.parts):
            if i:
                await asyncio.sleep(one.pause)
            writer.write(part)
            await asyncio.wait_for(writer.drain(), one.patience or 1)
        if one.end == "half":
            writer.write_eof()
        await asyncio.wait_for(read(), one.patience)
    except TimeoutError:
        if one.end == "read":
            return bytes(received) + b"(no end)"
    except OSError:  # the server has closed: what it said before may be lost
        pass
    finally:
        if one.end == "reset":
            writer.transport.abort()
        writer.close()
    return bytes(received)


def judge(one: Shot, received: bytes) -> tuple[list[int], str]:
    """The statuses of the answers, and what is wrong with them."""
    found = [int(status) for status in STATUS.findall(received)] or [NO_ANSWER]
    final = [status for status in found if status != 100]
    if any(status >= 500 and status != 501 for status in final):
        return found, "the server failed"
    if one.statuses and not set(final) <= set(one.statuses):
        return found, f"expected one of {one.statuses}"
    if len(final) > one.answers:
        return found, f"expected at most {one.answers} answers"
    if leak := LEAKS.search(received):
        return found, f"tells {leak[0]!r}"
    if b"/smuggled" in received:
        return found, "answers what was smuggled"
    if received.endswith(b"(no end)"):
        return found, "never ends"
    if final[-1] >= 400 and len(received) > 4000:
        return found, f"an error of {len(received)} bytes"
    return found, ""


async def attack(port: int, numbers: list[int], seed: int, report: Report, only: str | None = None) -> None:
    """Fire shots, so many clients at a time; between them, a normal request and a look at the memory."""
    normal, left = await answer(port), iter(numbers)
    done = 0

    async def client() -> None:
        nonlocal done
        for number in left:
            one = shot(seed, number)
            if only is None or one.kind == only:
                begin = time.monotonic()
                received = await fire(port, one)
                seconds = time.monotonic() - begin
                statuses, wrong = judge(one, received)
                report.answers.setdefault(one.kind, Counter()).update(statuses[:1])
                report.messages.setdefault(one.kind, Counter()).update(MESSAGE.findall(received)[:1])
                if one.end == "read" and seconds > 2:
                    report.slowest.append((seconds, f"{one.kind} {number}"))
                if wrong:
                    report.wrong.append(f"{one.kind} {number}: {wrong}, found {statuses}: {received[-300:]!r}")
            done += 1
            so_far = done
            if so_far % CHECK_EVERY == 0 and await answer(port) != normal:
                report.wrong.append(f"after {so_far} shots a normal request gets another text")
            if so_far % (5 * CHECK_EVERY) == 0:
                size = (await asyncio.to_thread(figures, port))["process_resident_memory_bytes"]
                report.memory.append((so_far, int(size)))

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    if await answer(port) != normal:
        report.wrong.append("at the end a normal request gets another text")


async def answer(port: int) -> list[str]:
    """What the server says to a normal request."""
    received = await fire(port, Shot("normal", (request("/v1/completions", json.dumps(NORMAL).encode()),)))
    body = received.partition(b"\r\n\r\n")[2]
    return [choice["text"] for choice in json.loads(body)["choices"]]


def figures(port: int) -> dict[str, float]:
    """The figures that have no label but the model's name."""
    text = httpx2.get(f"http://127.0.0.1:{port}/metrics", headers=HEADERS).text
    families = text_string_to_metric_families(text)
    return {s.name: s.value for family in families for s in family.samples if set(s.labels) <= {"model_name"}}


def leftovers(port: int, seconds: float = 60) -> list[str]:
    """What of the engine is still in use when nobody asks for anything."""
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    end = time.monotonic() + seconds
    while True:
        now = figures(port)
        held = [f"{name} is {now[name]:g}, expected 0" for name in names if now[name]]
        if not held or time.monotonic() > end:
            return held
        time.sleep(0.2)


def complaints(err: str) -> list[str]:
    """What a server's stderr holds of errors: the last of each kind in full."""
    parts = re.split(r"^(?=Traceback|ERROR)", err, flags=re.MULTILINE)[1:]
    kinds = {part.strip().rpartition("\n")[2]: part for part in parts}
    return [f"stderr: {len(parts)} errors, such as\n{part[-1800:]}" for part in kinds.values()]


def main() -> int:
    """Attack a process. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shots", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--times", type=int, default=1, help="how often to fire all of them")
    parser.add_argument("--only", choices=sorted({make(random.Random(0)).kind for make in KINDS}))
    parser.add_argument("--messages", action="store_true", help="also print what the errors said")
    parser.add_argument("--number", type=int, help="fire this one only, and print its answer")
    args = parser.parse_args()
    report, begin = Report(), time.monotonic()
    with tempfile.TemporaryDirectory() as cache:
        server = Process(cache, "--chat-template", str(TEMPLATE), key=KEY, warm=args.number is None)
        try:
            if args.number is not None:
                one = shot(args.seed, args.number)
                print(one, asyncio.run(fire(server.port, one)).decode(errors="replace"), sep="\n\n")
                return 0
            try:
                asyncio.run(attack(server.port, [*range(args.shots)] * args.times, args.seed, report, args.only))
                report.wrong += leftovers(server.port)
            except OSError as error:
                report.wrong.append(f"the server has gone: {error}")
            server.process.terminate()
            if (code := server.end()) != 0:
                report.wrong.append(f"exit code {code}")
            report.wrong = complaints(server.err) + report.wrong
            report.check_memory()
        finally:
            server.kill()
    if args.messages:
        for kind, found in sorted(report.messages.items()):
            lines = (f"  {count:4} {message.decode(errors='replace')}" for message, count in found.most_common())
            print(kind, *lines, sep="\n")
    print(report.text(), f"{time.monotonic() - begin:.0f} s", sep="\n")
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())

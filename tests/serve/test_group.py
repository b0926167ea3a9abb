"""Progress that is held and joined: nothing is lost, and a row's first and last progress never wait."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from serving import demo

from jllama.serve.bridge import LATE, Group, Progress, joined
from jllama.serve.errors import ApiError
from jllama.serve.metrics import LABELS, TOKEN_SECONDS, TokenGaps
from jllama.serve.model import Model
from jllama.serve.parameters import completion_run
from jllama.serve.running import Delta, Running
from jllama.serve.schema import CompletionBody


def part(row: int, *ids: int, finish: Any = None, **more: Any) -> Progress:
    return Progress(row, [*ids], [-float(i) for i in ids], [{i: -float(i)} for i in ids], finish, **more)


def test_results_of_a_row_are_joined_in_order_and_its_failure_comes_after_them() -> None:
    parts = [part(1, 7), part(0, 1, 2), part(1, 8, 9, finish="length"), part(0, 3), part(0, finish="error", error="no")]
    assert joined(parts) == [
        part(1, 7, 8, 9, finish="length"),
        part(0, 1, 2, 3),
        part(0, finish="error", error="no"),
    ]


class Held:
    """A group of one or two rows, on a clock that the test sets. It holds progress for a second."""

    def __init__(self, loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(loop, "time", lambda: self.now)
        self.group = Group([], lambda: 1.0)

    def put(self, at: float, *parts: Progress) -> None:
        self.now = 100.0 + at
        for one in parts:
            self.group.put(one)

    async def taken(self) -> list[Progress] | None:
        """What can be taken at once; None: nothing. The event loop runs its timers meanwhile."""
        take = asyncio.ensure_future(self.group.take())
        for _ in range(4):
            await asyncio.sleep(0)
        if take.done():
            return take.result()
        take.cancel()
        await asyncio.gather(take, return_exceptions=True)
        return None


def on_a_clock(monkeypatch: pytest.MonkeyPatch, test: Callable[[Held], Any]) -> None:
    async def run() -> None:
        with monkeypatch.context() as patch:
            await test(Held(asyncio.get_running_loop(), patch))

    asyncio.run(run())


def test_first_and_last_progress_come_at_once_and_the_rest_together_after_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def check(held: Held) -> None:
        held.put(0.0, part(0, 1))
        assert await held.taken() == [part(0, 1)]
        held.put(0.3, part(0, 2))
        held.put(0.9, part(0, 3))
        assert await held.taken() is None
        held.put(1.1, part(0, 4), part(1, 5))  # another row's first, too
        assert await held.taken() == [part(0, 2, 3, 4), part(1, 5)]
        held.put(1.2, part(0, 6), part(1, 7))
        assert await held.taken() is None
        held.put(1.3, part(0, 8, finish="stop"))
        assert await held.taken() == [part(0, 6, 8, finish="stop"), part(1, 7)]
        held.put(1.4, part(1, finish="error", error="died"))
        assert await held.taken() == [part(1, finish="error", error="died")]

    on_a_clock(monkeypatch, check)


def test_what_is_held_comes_out_without_further_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check(held: Held) -> None:
        held.put(0.0, part(0, 1))
        assert await held.taken() == [part(0, 1)]
        held.put(0.2, part(0, 2))
        held.put(1.01, part(0, 3))
        assert await held.taken() == [part(0, 2, 3)]
        held.put(1.02, part(0, 4))
        held.now += LATE  # the timer of the first hold
        assert await held.taken() is None
        held.now = 102.02 + LATE
        assert await held.taken() == [part(0, 4)]

    on_a_clock(monkeypatch, check)


class Engine:
    """Takes everything, and remembers what was aborted."""

    alive = True

    def __init__(self) -> None:
        self.aborted: list[int | None] = []

    def submit(self, group: Group) -> None:
        group.accepted.set_result(None)

    def abort(self, group: Group, row: int | None = None) -> None:
        self.aborted.append(row)


def deltas(body: dict[str, Any], *parts: Progress) -> tuple[list[Delta], str | None, Running, Engine]:
    """What a request gives for progress that has all arrived before it is taken; the error at its end, if any."""
    model, engine = Model.of(demo(), 256), Engine()

    async def ask() -> tuple[list[Delta], str | None, Running]:
        run = completion_run(CompletionBody.model_validate({"prompt": "Then", "max_tokens": 32} | body), model, "")
        running, found, error = Running(run, model, engine), [], None  # pyright: ignore[reportArgumentType]
        await running.start()
        for one in parts:
            running.group.put(one)
        try:
            async for some in running.deltas():
                found += some
        except ApiError as failed:
            error = failed.message
        return found, error, running

    return *asyncio.run(ask()), engine


def test_text_that_was_drawn_before_a_failure_is_sent_before_the_error() -> None:
    ids = demo().tokenizer.encode(" there was a cat", bos=False)
    found, error, *_ = deltas({}, *(part(0, i) for i in ids), part(0, finish="error", error="NaN"))
    assert ("".join(delta.text for delta in found).strip(), error) == ("there was a cat", "NaN")


def test_a_stop_string_within_joined_progress_ends_the_row_where_it_stands() -> None:
    ids = demo().tokenizer.encode(" there was a cat and a dog", bos=False)
    (delta,), error, running, engine = deltas({"stop": "a cat", "logprobs": 0}, *(part(0, i) for i in ids))
    assert (delta.text.strip(), delta.finish, error) == ("there was", "stop", None)
    before = running.completion_tokens
    assert before == len(demo().tokenizer.encode(" there was a cat", bos=False))
    assert [token.id for token in delta.tokens] == ids[: len(delta.tokens)]
    assert engine.aborted == [0]


def test_gaps_are_counted_as_prometheus_counts_them() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    gaps = TokenGaps("m")
    ours.register(gaps)
    text = "Between two tokens of a row."
    other = Histogram("vllm:inter_token_latency_seconds", text, LABELS, buckets=TOKEN_SECONDS, registry=theirs)
    for seconds, count in ((0.0005, 3), (0.005, 2), (0.0051, 1), (7.0, 4)):
        gaps.add(seconds, count)
        for _ in range(count):
            other.labels("m").observe(seconds)
    lines = [line for line in generate_latest(theirs).decode().splitlines() if "_created" not in line]
    assert generate_latest(ours).decode().splitlines() == lines

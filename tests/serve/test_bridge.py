"""The engine's thread when things go wrong: a device that fails, weights that are broken, a bug."""

import asyncio
import threading
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import tiny
from jax.errors import JaxRuntimeError

from jllama import Engine, Request
from jllama.engine.device import Launch
from jllama.engine.scheduler import Plan
from jllama.errors import InputError
from jllama.serve.bridge import EngineThread, Group, Progress

REQUEST = Request(tiny.prompt(5), 12, stop_ids=())


def made() -> Engine:
    return Engine(tiny.model(), slots=2, pages=16, max_len=256, budget=64)


@pytest.fixture(scope="module")
def alone() -> list[int]:
    """What the request gets from an engine of its own."""
    return made().generate([REQUEST.prompt], max_new_tokens=12, stop_ids=())[0].ids


def serve(engine: Engine, *groups: int) -> tuple[list[list[Progress]], EngineThread]:
    """Give groups of so many rows to an engine's thread; all that comes until each row has ended."""
    thread = EngineThread(engine)

    async def one(rows: int) -> list[Progress]:
        group = Group([REQUEST] * rows)
        thread.submit(group)
        await group.accepted
        found: list[Progress] = []
        while sum(progress.finish is not None for progress in found) < rows:
            found += await asyncio.wait_for(group.take(), 60)
        return found

    async def all_of_them() -> list[list[Progress]]:
        return await asyncio.gather(*map(one, groups))

    thread.start()
    try:
        return asyncio.run(all_of_them()), thread
    finally:
        thread.stop()


def ids(found: list[Progress], row: int = 0) -> list[int]:
    return [i for progress in found if progress.row == row for i in progress.ids]


def failing(engine: Engine, times: int, error: Exception) -> Engine:
    """An engine whose next launches with two rows fail."""
    launch, left = engine._device.launch, iter(range(times))

    def broken(plans: list[Plan], *more: Any) -> Launch:
        if sum(len(plan.rows) for plan in plans) == 2 and next(left, None) is not None:
            raise error
        return launch(plans, *more)

    engine._device.launch = broken
    return engine


OUT_OF_MEMORY = JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nand more")


def test_a_step_that_fails_ends_the_newest_row_only(alone: list[int]) -> None:
    (first, second), thread = serve(failing(made(), 1, OUT_OF_MEMORY), 1, 1)
    assert ids(first) == alone
    assert first[-1].finish == "length"
    assert second[-1].finish == "error"
    assert second[-1].error == "the device failed: RESOURCE_EXHAUSTED: Out of memory"
    assert thread.statistics.running == 0


def test_rows_of_one_request_are_ended_one_by_one(alone: list[int]) -> None:
    ((found,), _) = serve(failing(made(), 2, OUT_OF_MEMORY), 3)
    ends = {progress.row: progress.finish for progress in found if progress.finish}
    assert sorted(ends.values()) == ["error", "error", "length"]
    well = next(row for row, finish in ends.items() if finish == "length")
    assert ids(found, well) == alone


def test_weights_that_give_nan_end_their_requests_not_the_thread(alone: list[int]) -> None:
    engine = made()
    good = engine.params
    engine.params = jax.tree.map(lambda w: jnp.full_like(w, jnp.nan), good)
    thread = EngineThread(engine)
    thread.start()

    async def ask() -> list[Progress]:
        group, found = Group([REQUEST]), []
        thread.submit(group)
        while not found or found[-1].finish is None:
            found += await asyncio.wait_for(group.take(), 60)
        return found

    (broken,) = asyncio.run(ask())
    assert (broken.finish, "NaN" in (broken.error or "")) == ("error", True)
    engine.params = good
    assert ids(asyncio.run(ask())) == alone
    thread.stop()


def test_a_request_that_the_engine_refuses_takes_its_group_with_it() -> None:
    thread = EngineThread(made())
    thread.start()

    async def ask() -> None:
        group = Group([REQUEST, Request([10**6], 4)])
        thread.submit(group)
        with pytest.raises(InputError, match="prompt: expected token ids"):
            await group.accepted

    asyncio.run(ask())
    thread.stop()
    assert not thread._engine.busy


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """What ends threads."""
    seen: list[type] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: seen.append(args.exc_type))
    return seen


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), OUT_OF_MEMORY], ids=["bug", "device"])
def test_an_error_that_nobody_can_be_blamed_for_ends_the_server(hook: list[type], error: Exception) -> None:
    engine, died = made(), threading.Event()

    def step() -> list:
        raise error

    engine.step = step
    thread = EngineThread(engine, died.set)
    thread.start()

    async def ask() -> Progress:
        group = Group([REQUEST])
        thread.submit(group)
        return (await asyncio.wait_for(group.take(), 60))[-1]

    assert asyncio.run(ask()).finish == "error"
    assert died.wait(30)
    thread.stop()
    assert hook == [type(error)]
    assert not thread.alive

    async def ask_again() -> None:
        group = Group([REQUEST])
        thread.submit(group)
        with pytest.raises(InputError, match="the engine has died"):
            await group.accepted

    asyncio.run(ask_again())

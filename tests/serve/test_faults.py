"""What fails ends one request, not the server; and where the engine itself dies, the process says so and ends."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.errors import JaxRuntimeError
from serving import SLOTS, Live, demo

from jllama import DEMO, LM, Engine
from jllama.serve import start
from jllama.serve.bridge import EngineThread
from jllama.serve.server import DIED, bind, url_of
from jllama.serve.settings import Settings

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
LONG = {"prompt": "Once", "temperature": 0, "max_tokens": 120, "ignore_eos": True}
SHORT = {"prompt": "A cat", "temperature": 0, "max_tokens": 6}


def made() -> Engine:
    return Engine(demo().params, slots=SLOTS, max_len=demo().max_len, budget=64)


@pytest.fixture
def frail(make_live: Callable[..., Live]) -> Iterator[tuple[Live, Engine]]:
    """A server with an engine of its own, in which something can be broken."""
    engine = made()
    thread = EngineThread(engine)
    thread.start()
    yield make_live(thread=thread), engine
    thread.stop()


def text_of(body: dict[str, Any]) -> str:
    return demo().generate(body["prompt"], max_new_tokens=body["max_tokens"], ignore_eos=True).text


def beside_a_long_one(live: Live, body: dict[str, Any], status: int) -> dict[str, Any]:
    """The answer to a request that comes while another runs, which must get its whole text."""
    found: list[str] = []

    def stream() -> None:
        for chunk in live.events(COMPLETIONS, LONG):
            found.append(chunk["choices"][0]["text"])
            begun.set()

    begun = threading.Event()
    other = threading.Thread(target=stream)
    other.start()
    assert begun.wait(60)
    answer = live.post(COMPLETIONS, body)
    other.join()
    assert answer.status_code == status, answer.text
    assert "".join(found) == text_of(LONG)
    assert live.complete(SHORT["prompt"], max_tokens=6)["choices"][0]["text"] == text_of(SHORT)
    return answer.json()


def test_a_step_without_memory_ends_the_newest_request(frail: tuple[Live, Engine]) -> None:
    live, engine = frail
    launch, left = engine._device.launch, iter([JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nand more")])

    def broken(plans: Any, *more: Any) -> Any:
        if sum(len(plan.rows) for plan in plans) == 2 and (error := next(left, None)) is not None:
            raise error
        return launch(plans, *more)

    engine._device.launch = broken
    error = beside_a_long_one(live, SHORT | {"max_tokens": 90, "ignore_eos": True}, 500)["error"]
    assert error["message"] == "the device failed: RESOURCE_EXHAUSTED: Out of memory"
    assert error["type"] == "server_error"


def test_a_row_of_nan_ends_its_request(frail: tuple[Live, Engine]) -> None:
    live, engine = frail
    check = engine._broken

    def broken(sequence: Any, logprobs: np.ndarray) -> bool:
        return check(sequence, np.full_like(logprobs, np.nan) if sequence.limit == 90 else logprobs)

    engine._broken = broken
    error = beside_a_long_one(live, SHORT | {"max_tokens": 90, "ignore_eos": True}, 500)["error"]
    assert "NaN" in error["message"]


def test_weights_of_nan_fail_in_an_event_of_a_stream(frail: tuple[Live, Engine]) -> None:
    live, engine = frail
    good = engine.params
    engine.params = jax.tree.map(lambda w: jnp.full_like(w, jnp.nan), good)
    *_, last = live.events(COMPLETIONS, SHORT)
    assert "NaN" in last["error"]["message"]
    engine.params = good
    assert live.complete(SHORT["prompt"], max_tokens=6)["choices"][0]["text"] == text_of(SHORT)


def test_a_grammar_that_raises_ends_its_request(frail: tuple[Live, Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    live, _ = frail

    class Faulty:
        done = False

        def matcher(self) -> "Faulty":
            return self

        def mask(self) -> np.ndarray:
            raise KeyError("a bug")

        def accept(self, token: int) -> None: ...

    monkeypatch.setattr(live.service.model.grammars, "compile", lambda *_: Faulty())
    error = beside_a_long_one(live, SHORT | {"structured_outputs": {"regex": "a"}}, 500)["error"]
    assert error["message"].startswith("the constraint failed: KeyError")


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ 1 // 0 }}",
        "{{ messages[9].content.more }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ 'x' * 10**10 }}",
    ],
)
def test_a_template_that_raises_ends_its_request(make_live: Callable[..., Live], tmp_path: Path, template: str) -> None:
    (tmp_path / "own.jinja").write_text(template)
    live = make_live(LM.load(DEMO, chat_template=tmp_path / "own.jinja"))
    error = live.refused(CHAT, {"messages": [{"role": "user", "content": "Hello"}]})
    assert error["param"] == "messages"
    assert live.complete(SHORT["prompt"], max_tokens=6)["choices"][0]["text"] == text_of(SHORT)


def test_the_end_of_the_engine_is_the_end_of_the_process(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The process is this one: signals are handled in its main thread."""
    engine, died = made(), []
    monkeypatch.setattr(threading, "excepthook", lambda args: died.append(args.exc_type))
    step = engine.step

    def broken() -> Any:
        if engine.statistics.new_tokens > 8:
            raise ZeroDivisionError("a bug")
        return step()

    engine.step = broken
    answers: list[Any] = []
    with bind("127.0.0.1", 0) as bound:

        def ask() -> None:
            with (
                httpx2.Client(transport=httpx2.HTTPTransport(retries=5)) as client,  # the server may not listen yet
                client.stream("POST", f"{url_of(bound)}{COMPLETIONS}", json=LONG | {"stream": True}) as answer,
            ):
                answers.extend(line for line in answer.iter_lines() if line)

        async def serve(*args: Any) -> int:
            asyncio.get_running_loop().run_in_executor(None, ask)
            return await before(*args)

        before = start.serve
        monkeypatch.setattr(start, "serve", serve)
        assert start.run(demo(), engine, Settings(access_log=False), bound, slots=SLOTS) == DIED == 70
    assert died == [ZeroDivisionError]
    assert "the engine has died; the server ends" in capfd.readouterr().err
    *texts, failed, end = answers
    assert texts
    assert json.loads(failed.removeprefix("data: "))["error"]["message"] == "the engine has died; the server ends"
    assert end == "data: [DONE]"

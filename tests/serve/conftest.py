"""One engine on the embedded model for all tests of the server, and servers over it, in this process, on real
sockets."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("httpx2", reason="needs the package httpx2 (make setup)")

import browser as browsers
from serving import SLOTS, Live, demo

from jllama import LM, Engine
from jllama.serve.bridge import EngineThread
from jllama.serve.model import Model
from jllama.serve.routes import Service
from jllama.serve.settings import Settings


@pytest.fixture(scope="session")
def engine() -> Iterator[EngineThread]:
    """The engine's thread. Few slots and a small budget: few programs to compile."""
    lm = demo()
    thread = EngineThread(Engine(lm.params, slots=SLOTS, max_len=lm.max_len, budget=64))
    thread.start()
    yield thread
    thread.stop()


@pytest.fixture(scope="session")
def make_live(engine: EngineThread) -> Iterator[Callable[..., Live]]:
    """Start a server with some settings; of the embedded model, unless another is given."""
    made: list[Live] = []

    def make(lm: LM | None = None, thread: EngineThread = engine, **settings: Any) -> Live:
        lm = lm or demo()
        given = Settings(**{"names": ("demo", "alias"), "access_log": False} | settings)
        live = Live(Service(Model.of(lm, lm.max_len), thread, given, slots=SLOTS))
        made.append(live)
        return live

    yield make
    for live in made:
        live.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, no longer than one module: Playwright's event loop runs in this thread while it is open."""
    with browsers.browser() as found:
        yield found


@pytest.fixture(scope="session")
def live(make_live: Callable[..., Live]) -> Live:
    """A server as it is by default."""
    return make_live()

"""Runs the server on a loaded model."""

import asyncio
import signal
import socket
from collections.abc import Callable

from jllama.engine import shared
from jllama.engine.engine import Engine
from jllama.engine.request import Request, SamplingSettings
from jllama.engine.shared import Leader
from jllama.engine.steps import KINDS
from jllama.serve.bridge import EngineThread
from jllama.serve.model import Model
from jllama.serve.routes import Service
from jllama.serve.server import keep_loaded, serve
from jllama.serve.settings import Settings
from jllama.text.lm import LM


def run(
    lm: LM,
    engine: Engine,
    settings: Settings,
    bound: socket.socket,
    *,
    slots: int,
    tell: Callable[[bytes], None] | None = None,
) -> int:
    """Serve a model until it ends. Returns the exit code. ``tell``: where several processes run the model, how this
    one, process 0, sends bytes to the others, which are in `follow`."""
    leader = None if tell is None else Leader(engine, tell)
    thread = EngineThread(leader or engine)
    service = Service(Model.of(lm, engine.max_len), thread, settings, slots=slots)
    try:
        code = asyncio.run(serve(service, bound))
    finally:
        thread.stop()
    if leader is not None and not code:  # with an error, this process leaves, and the others notice
        leader.close()
    return code


def follow(lm: LM, engine: Engine, hear: Callable[[], bytes]) -> None:
    """Run the model in a process that is not the first, until process 0 ends."""
    for number in (signal.SIGINT, signal.SIGTERM):  # process 0 decides when: it lets running requests finish
        signal.signal(number, signal.SIG_IGN)
    keep_loaded()  # a long collection in one process stops the devices of all
    shared.follow(engine, hear, Model.of(lm, engine.max_len).grammars.of)


def compile_ahead(engine: Engine, *, progress: bool) -> None:
    """Compile every program that requests can need, so that no client waits for it."""
    engine.warm_up(KINDS, constraints=True, progress=progress)
    everything = SamplingSettings(temperature=1.0, top_p=0.9, presence_penalty=0.1, top_logprobs=1)
    bos = engine.params.config.bos_id
    handle = engine.submit(Request((bos,), 1, everything, salt="warm up"))  # also what only such a row needs
    while not handle.finished:
        engine.step()

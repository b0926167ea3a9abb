"""Runs the server on a loaded model."""

import asyncio
import socket

from jllama.engine.engine import Engine
from jllama.engine.request import Request, SamplingSettings
from jllama.engine.steps import KINDS
from jllama.serve.bridge import EngineThread
from jllama.serve.model import Model
from jllama.serve.routes import Service
from jllama.serve.server import serve
from jllama.serve.settings import Settings
from jllama.text.lm import LM


def run(lm: LM, engine: Engine, settings: Settings, bound: socket.socket, *, slots: int) -> int:
    """Serve a model until it ends. Returns the exit code."""
    thread = EngineThread(engine)
    service = Service(Model.of(lm, engine.max_len), thread, settings, slots=slots)
    try:
        return asyncio.run(serve(service, bound))
    finally:
        thread.stop()


def compile_ahead(engine: Engine, *, progress: bool) -> None:
    """Compile every program that requests can need, so that no client waits for it."""
    engine.warm_up(KINDS, constraints=True, progress=progress)
    everything = SamplingSettings(temperature=1.0, top_p=0.9, presence_penalty=0.1, top_logprobs=1)
    bos = engine.params.config.bos_id
    handle = engine.submit(Request((bos,), 1, everything, salt="warm up"))  # also what only such a row needs
    while not handle.finished:
        engine.step()

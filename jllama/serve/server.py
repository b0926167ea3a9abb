"""The server's process: its socket, its signals, and the order in which parts start and stop."""

import asyncio
import contextlib
import gc
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Generator

import uvicorn
from starlette.types import ASGIApp

from jllama.errors import InputError
from jllama.serve.connection import Connection
from jllama.serve.routes import Service, create_app

DIED = 70  # exit code if the engine's thread has ended with an error
BACKLOG = 2048
MAX_FILES = 1 << 16
SEND_BUFFER = 128 << 10  # bytes that the system keeps for a client that does not read; its own default is megabytes
SWITCH_S = 0.0005  # for which a thread that computes keeps the interpreter's lock from others; Python's own is 0.005
KEEP_ALIVE = 75  # seconds; longer than proxies keep idle connections, usually 60
HEADER_BYTES = 32 << 10


class HttpServer(uvicorn.Server):
    """Uvicorn without signal handlers of its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """None: `serve` has handlers."""
        yield


def http_server(app: ASGIApp) -> HttpServer:
    """Uvicorn for the application. It logs errors only; the access log is ours."""
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="off",
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE,
        h11_max_incomplete_event_size=HEADER_BYTES,
    )
    return HttpServer(config)


def say(text: str) -> None:
    """Print a line to stderr, for the operator."""
    print(f"jllama serve: {text}", file=sys.stderr, flush=True)


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet. So an occupied port is an error before anything is loaded."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise InputError(f"--host: expected an address or a name, found {host}: {error.strerror}") from None
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)  # connections inherit it
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise InputError(f"--host, --port: cannot bind {host} port {port}: {error.strerror}") from None
    return bound


def url_of(bound: socket.socket) -> str:
    """The URL of a server on this socket."""
    host, port = bound.getsockname()[:2]
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{name}:{port}"


async def serve(service: Service, bound: socket.socket) -> int:
    """Serve on a socket until a signal arrives, or the engine fails. Returns the exit code."""
    loop, server, code = asyncio.get_running_loop(), http_server(create_app(service)), 0
    gate = service.gate

    def end() -> None:
        server.should_exit = True

    def on_signal(number: int) -> None:
        if gate.draining:
            say("ends at once")
            os._exit(128 + number)  # do not wait: a thread may be in the middle of a launch
        gate.draining = True
        say(f"finishes {gate.rows} texts, takes no new requests; a second signal ends at once")
        drains.append(loop.create_task(_drained(service, end)))

    def on_death() -> None:
        nonlocal code
        code = DIED
        say("the engine has died; the server ends")
        loop.call_soon_threadsafe(end)

    drains: list[asyncio.Task[None]] = []
    service.engine.on_death = on_death
    service.engine.start()
    _allow_files()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    prepare_interpreter()
    running = loop.create_task(server.serve([bound]))
    while not server.started and not running.done():
        await asyncio.sleep(0.01)
    if server.started:
        say(f"ready at {url_of(bound)}")
    await running
    return code


def prepare_interpreter() -> None:
    """Settings of Python for a process in which an engine's thread and an event loop take turns.

    The engine's thread needs the interpreter's lock for some milliseconds each time that the device has finished a
    step. So the event loop must not keep it for long. Neither must the garbage collector: all that has been loaded and
    compiled so far stays, and to look through it took 0.1 s at a time."""
    sys.setswitchinterval(SWITCH_S)
    keep_loaded()


def keep_loaded() -> None:
    """Take everything that is in memory now from the garbage collector's sight."""
    gc.collect()
    gc.freeze()


def _allow_files() -> None:
    """Raise the soft limit of open files, usually 1024: each client's connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


async def _drained(service: Service, end: Callable[[], None]) -> None:
    await service.gate.empty.wait()
    end()

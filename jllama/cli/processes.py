"""One command run by several processes, each with some of the devices: ``--coordinator``.

Every process runs the same program on the same input, which process 0 reads and tells the others. Only process 0
prints. A process that ends too early leaves the others waiting for it inside a computation, for ever. So each process
has a thread that watches a connection to process 0, and process 0 has one to each: when one closes or falls silent, all
end with a message that names the process.
"""

import argparse
import hmac
import json
import os
import queue
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import jax
import numpy as np

from jllama.cli import cluster
from jllama.cli.cluster import leave
from jllama.cli.runtime import set_up
from jllama.errors import InputError

BEAT = 2.0  # seconds between two signs of life
SILENCE = 15.0  # after so many seconds without one, a process counts as ended
_ALIVE, _DONE, _ENDED, _TOLD = b"a", b"d", b"e", b"t"
_GRACE = 0.5  # seconds: as soon as process 0 is gone, jax aborts the others, which should have ended by then
_INDEX = 2  # bytes of a process's number
# _ENDED is followed by a process's number; _TOLD by 4 bytes, a number, and so many more.


class Channel:
    """The connections between process 0 and each of the others."""

    def __init__(self, peers: dict[int, socket.socket]) -> None:
        self.peers = peers
        self._lock = threading.Lock()  # two threads' messages must not mix
        self._leaving = threading.Lock()
        self._heard: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        for connection in peers.values():  # a message is small, and waits for no other
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def tell(self, what: bytes) -> None:
        """In process 0: send bytes to all others, which `hear` them in this order."""
        self.send(_TOLD + len(what).to_bytes(4) + what)

    def hear(self) -> bytes:
        """In the others: wait for the next bytes that process 0 tells."""
        return self._heard.get()

    def send(self, message: bytes) -> None:
        """Send a message to all."""
        with self._lock:
            for connection in self.peers.values():
                try:
                    connection.sendall(message)
                except OSError:  # that one has ended: the thread that listens to it says so
                    continue

    def leave(self, code: int, message: str, who: int | None = None) -> NoReturn:
        """End this process, after all others have heard who has ended first: this one, or ``who``."""
        with self._leaving:  # only the first thread that comes here says why; then the process is gone
            self.send(_ENDED + (jax.process_index() if who is None else who).to_bytes(_INDEX))
            time.sleep(_GRACE)
            leave(code, message)

    def listen(self, connection: socket.socket) -> bytes:
        """Take what arrives. Returns at the first message that is neither a sign of life nor told."""
        while (message := _receive(connection, 1)) in (_ALIVE, _TOLD):
            if message == _TOLD:
                size = int.from_bytes(_receive(connection, 4))
                self._heard.put(_receive(connection, size))
        return message


def from_first[T](read: Callable[[], T]) -> T:
    """What ``read`` gives in process 0, a value that JSON can hold, in every process."""
    if jax.process_count() == 1:
        return read()
    from jax.experimental import multihost_utils

    text = json.dumps(read()).encode() if jax.process_index() == 0 else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.frombuffer(text.ljust(size, b"\0"), np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())


@contextmanager
def together(args: argparse.Namespace) -> Iterator[Channel | None]:
    """Run the body of a command in all processes that the flags name; in this one alone without ``--coordinator``, and
    then there is no channel."""
    cluster.check(args)
    if args.coordinator is None:
        yield None
        return
    set_up(args, quiet=True)  # `open_model` comes after the first use of a device, which is to join
    host = cluster.join(args)
    _divert(args)
    channel: Channel | None = None
    # A process must not leave by the normal way while others compute: jax would wait for them.
    try:
        channel = _watch(host, cluster.alike(args))
        yield channel
        channel.send(_DONE)
        return
    except InputError as error:
        code, reason = 2, f"jllama: error: process {jax.process_index()}: {error}"
    except jax.errors.JaxRuntimeError:
        code, reason = 1, traceback.format_exc()
        time.sleep(SILENCE + 2 * BEAT)  # if another process has ended, the thread that watches it says so first
    except KeyboardInterrupt:
        code, reason = 130, "jllama: interrupted"
    except BrokenPipeError:  # the reader of the pipe has ended, such as `head`
        code, reason = 141, ""
    except BaseException:
        code, reason = 1, traceback.format_exc()
    if channel is None:
        leave(code, reason)
    channel.leave(code, reason)


def _divert(args: argparse.Namespace) -> None:
    """Keep stdout for what process 0 prints. Libraries such as gloo write to descriptor 1: that becomes stderr."""
    first = jax.process_index() == 0
    out = os.dup(1) if first else os.open(os.devnull, os.O_WRONLY)
    sys.stdout = os.fdopen(out, "w", errors="replace")
    os.dup2(2, 1)
    args.quiet = args.quiet or not first


def _watch(host: str | None, alike: dict[str, Any]) -> Channel:
    """Connect every process to process 0, and watch every connection. ``alike`` must be the same in all."""
    index, count = jax.process_index(), jax.process_count()
    server = socket.create_server(("", 0)) if index == 0 else None
    names = [host] if host else list(dict.fromkeys((socket.gethostname(), socket.getfqdn())))
    port = 0 if server is None else server.getsockname()[1]
    names, port, token, expected = from_first(lambda: (names, port, secrets.token_hex(16), alike))
    if server is None:
        to_first = _connect(names, port)
        to_first.sendall(token.encode() + index.to_bytes(_INDEX))
        for name, value in expected.items():
            if alike[name] != value:
                raise InputError(f"{name}: expected {value}, as in process 0, found {alike[name]}")
        return _start({0: to_first})
    peers: dict[int, socket.socket] = {}
    server.settimeout(60)
    while len(peers) < count - 1:
        try:
            connection, _ = server.accept()
        except TimeoutError:
            missing = ", ".join(str(i) for i in range(1, count) if i not in peers)
            raise InputError(f"--coordinator: expected connections to port {port}, found none of {missing}") from None
        connection.settimeout(5)
        hello = _receive(connection, len(token) + _INDEX)
        if hmac.compare_digest(hello[:-_INDEX], token.encode()):
            peers[int.from_bytes(hello[-_INDEX:])] = connection
        else:
            connection.close()
    server.close()
    return _start(peers)


def _connect(names: list[str], port: int) -> socket.socket:
    """A connection to process 0, whose host has these names."""
    found = ""
    for name in names:
        try:
            return socket.create_connection((name, port), timeout=30)
        except OSError as error:
            found = f"{name} port {port}: {error}"
    raise InputError(f"--coordinator: expected to reach process 0, found {found}")


def _receive(connection: socket.socket, count: int) -> bytes:
    """So many bytes, or fewer if the connection ends or is silent for too long."""
    found = b""
    try:
        while len(found) < count and (more := connection.recv(count - len(found))):
            found += more
    except OSError:
        pass
    return found.ljust(count, b"\0") if count > 1 else found


def _start(peers: dict[int, socket.socket]) -> Channel:
    channel = Channel(peers)

    def end(index: int) -> None:
        reason = f"process {index} of {jax.process_count()} has ended, so all others end, too"
        channel.leave(3, f"jllama: error: {reason}", who=index)

    def listen(index: int, connection: socket.socket) -> None:
        connection.settimeout(SILENCE)
        message = channel.listen(connection)
        if message == _ENDED:
            end(int.from_bytes(_receive(connection, _INDEX)))
        if message != _DONE:
            end(index)

    def beat() -> None:
        while True:
            channel.send(_ALIVE)
            time.sleep(BEAT)

    for index, connection in peers.items():
        threading.Thread(target=listen, args=(index, connection), daemon=True).start()
    threading.Thread(target=beat, daemon=True).start()
    return channel

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
from typing import NoReturn

import jax
import numpy as np

from jllama.errors import InputError

BEAT = 2.0  # seconds between two signs of life
SILENCE = 15.0  # after so many seconds without one, a process counts as ended
_ALIVE, _DONE, _ENDED, _TOLD = b"a", b"d", b"e", b"t"
# _ENDED is followed by one byte: which process; _TOLD by 4 bytes, a number, and so many more.


class Channel:
    """The connections between process 0 and each of the others."""

    def __init__(self, peers: dict[int, socket.socket]) -> None:
        self.peers = peers
        self._lock = threading.Lock()  # two threads' messages must not mix
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

    def listen(self, connection: socket.socket) -> bytes:
        """Take what arrives. Returns at the first message that is neither a sign of life nor told."""
        while (message := _receive(connection, 1)) in (_ALIVE, _TOLD):
            if message == _TOLD:
                size = int.from_bytes(_receive(connection, 4))
                self._heard.put(_receive(connection, size))
        return message


def _join(args: argparse.Namespace) -> Channel:
    """Join the processes, before any device is used."""
    _initialize(args)
    first = jax.process_index() == 0
    # Libraries such as gloo write to descriptor 1: that becomes stderr, and stdout gets a descriptor of its own.
    sys.stdout = os.fdopen(os.dup(1), "w") if first else open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    os.dup2(2, 1)
    args.quiet = args.quiet or not first
    return _watch(None if args.coordinator == "auto" else args.coordinator.rpartition(":")[0])


def _initialize(args: argparse.Namespace) -> None:
    if args.coordinator == "auto":
        try:
            jax.distributed.initialize()
        except (ValueError, RuntimeError) as error:
            raise InputError(f"--coordinator auto: expected a cluster that jax detects, found none: {error}") from None
        return
    host, _, port = args.coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise InputError(f"--coordinator: expected HOST:PORT or auto, found {args.coordinator!r}")
    count, index = args.num_processes, args.process_id
    if count is None or index is None or not 0 <= index < count or count > 255:
        found = f"{count} and {index}"
        raise InputError(
            f"--coordinator: expected --num-processes and a --process-id from 0 to one less, found {found}"
        )
    try:
        jax.distributed.initialize(args.coordinator, count, index, initialization_timeout=60)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"--coordinator {args.coordinator}: {error}") from None


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
    if args.coordinator is None:
        if args.num_processes is not None or args.process_id is not None:
            raise InputError("--num-processes, --process-id: expected --coordinator with them, found none")
        yield None
        return
    channel = _join(args)
    try:
        yield channel
    # A process must not leave by the normal way while others compute: jax would wait for them.
    except InputError as error:
        leave(2, f"jllama: error: process {jax.process_index()}: {error}")
    except jax.errors.JaxRuntimeError:
        reason = traceback.format_exc()
        time.sleep(SILENCE + 2 * BEAT)  # if another process has ended, the thread that watches it says so first
        leave(1, reason)
    except BaseException:
        leave(1, traceback.format_exc())
    channel.send(_DONE)


def leave(code: int, message: str) -> NoReturn:
    """End this process now, without waiting for others."""
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


def _watch(host: str | None) -> Channel:
    """Connect every process to process 0, and watch every connection."""
    first = jax.process_index() == 0
    server = socket.create_server(("", 0)) if first else None
    own = (host or socket.gethostname(), 0 if server is None else server.getsockname()[1], secrets.token_hex(16))
    where, port, token = from_first(lambda: own)
    if server is None:
        to_first = socket.create_connection((where, port), timeout=60)
        to_first.sendall(token.encode() + bytes([jax.process_index()]))
        return _start({0: to_first})
    peers: dict[int, socket.socket] = {}
    server.settimeout(60)
    while len(peers) < jax.process_count() - 1:
        connection, _ = server.accept()
        connection.settimeout(5)
        hello = _receive(connection, len(token) + 1)
        if hmac.compare_digest(hello[:-1], token.encode()):
            peers[hello[-1]] = connection
        else:
            connection.close()
    server.close()
    return _start(peers)


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
        channel.send(_ENDED + bytes([index]))
        leave(3, f"jllama: error: process {index} of {jax.process_count()} has ended, so all others end, too")

    def listen(index: int, connection: socket.socket) -> None:
        connection.settimeout(SILENCE)
        message = channel.listen(connection)
        if message == _ENDED:
            end(_receive(connection, 1)[0])
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

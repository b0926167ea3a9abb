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
_ALIVE, _DONE, _ENDED = b"a", b"d", b"e"  # _ENDED is followed by one byte: which process


def _join(args: argparse.Namespace) -> Callable[[], None]:
    """Join the processes, before any device is used. Returns what to call when all is done."""
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
def together(args: argparse.Namespace) -> Iterator[None]:
    """Run the body of a command in all processes that the flags name; in this one alone without ``--coordinator``."""
    if args.coordinator is None:
        if args.num_processes is not None or args.process_id is not None:
            raise InputError("--num-processes, --process-id: expected --coordinator with them, found none")
        yield
        return
    done = _join(args)
    try:
        yield
    # A process must not leave by the normal way while others compute: jax would wait for them.
    except InputError as error:
        _leave(2, f"jllama: error: process {jax.process_index()}: {error}")
    except jax.errors.JaxRuntimeError:
        reason = traceback.format_exc()
        time.sleep(SILENCE + 2 * BEAT)  # if another process has ended, the thread that watches it says so first
        _leave(1, reason)
    except BaseException:
        _leave(1, traceback.format_exc())
    done()


def _leave(code: int, message: str) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


def _watch(host: str | None) -> Callable[[], None]:
    """Connect every process to process 0, and watch every connection. Returns what to call when all is done."""
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


def _start(peers: dict[int, socket.socket]) -> Callable[[], None]:
    def tell(message: bytes) -> None:
        for connection in peers.values():
            try:
                connection.sendall(message)
            except OSError:  # that one has ended: the thread that listens to it says so
                continue

    def end(index: int) -> None:
        tell(_ENDED + bytes([index]))
        _leave(3, f"jllama: error: process {index} of {jax.process_count()} has ended, so all others end, too")

    def listen(index: int, connection: socket.socket) -> None:
        connection.settimeout(SILENCE)
        while (message := _receive(connection, 1)) == _ALIVE:
            pass
        if message == _ENDED:
            end(_receive(connection, 1)[0])
        if message != _DONE:
            end(index)

    def beat() -> None:
        while True:
            tell(_ALIVE)
            time.sleep(BEAT)

    for index, connection in peers.items():
        threading.Thread(target=listen, args=(index, connection), daemon=True).start()
    threading.Thread(target=beat, daemon=True).start()
    return lambda: tell(_DONE)

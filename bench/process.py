"""The parent's side of a peer: start its process, send requests with a time limit, and survive its failures."""

import contextlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from bench.record import CHECKOUT, ROOT


class PeerFailed(Exception):
    """The peer crashed, hung, ran out of memory or raised. The message appears in its row."""


class PeerUnsupported(PeerFailed):
    """The peer does not support the request. This is no failure."""


class Budget:
    """The seconds that a run, or a part of it, may take. `check` raises once they are spent, so the rest is skipped and
    its rows say so."""

    def __init__(self, seconds: float | None = None, whose: str = "the budget") -> None:
        self.seconds, self.whose = seconds, whose
        self._until = math.inf if seconds is None else time.monotonic() + seconds

    @contextlib.contextmanager
    def part(self, share: float) -> Iterator[None]:
        """Inside the ``with`` block, limit the time to this share of the remaining time."""
        whole, now = self._until, time.monotonic()
        self._until = now + share * (whole - now)
        try:
            yield
        finally:
            self._until = whole

    def check(self) -> None:
        """Raise `PeerUnsupported` where there is no time left."""
        if time.monotonic() > self._until:
            raise PeerUnsupported(f"not run: {self.whose} of {self.seconds:g} s was spent")


class Worker:
    """A running peer. After a crash or a hang its process is gone, and every further request raises `PeerFailed`.
    ``alone`` says that no other process uses the device meanwhile."""

    def __init__(self, peer: str, python: str = sys.executable, *, alone: bool = False) -> None:
        self.peer, self.python = peer, python
        self._stderr = _log(peer)
        self._buffer = b""
        self._dead: str | None = None
        self.spawned = time.perf_counter()
        self._process = subprocess.Popen(
            # Without a checkout the working folder is site-packages; -P keeps it off another interpreter's path.
            [python, *([] if CHECKOUT else ["-P"]), "-m", "bench.peers._worker", peer],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            cwd=ROOT,
            env=_environment(alone),
            start_new_session=True,  # so that a hang takes its children with it
        )

    def ask(self, do: str, limit_s: float, **fields: Any) -> dict[str, Any]:
        """Send a request and wait for its reply, at most ``limit_s`` seconds."""
        if self._dead is not None:
            raise PeerFailed(self._dead)
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **fields}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            self._bury()
        reply = self._receive(time.monotonic() + limit_s, limit_s)
        if "unsupported" in reply:
            raise PeerUnsupported(reply["unsupported"])
        if "error" in reply:
            raise PeerFailed(reply["error"])
        return reply

    def _receive(self, until: float, limit_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        while b"\n" not in self._buffer:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                self._dead = f"no answer within {limit_s:g} s"
                self.close()
                raise PeerFailed(self._dead)
            data = os.read(self._process.stdout.fileno(), 1 << 16)
            if not data:
                self._bury()
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def _bury(self) -> None:
        """The process has ended: raise `PeerFailed` with its exit code or signal, and its last line of stderr."""
        code = self._process.wait()
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        self._dead = f"process {how}" + (f": {lines[-1][:200]}" if lines else "")
        self.close()
        raise PeerFailed(self._dead)

    @property
    def dead(self) -> str | None:
        """Why the process has ended; None while it runs."""
        return self._dead

    def close(self) -> None:
        """End the process and its children."""
        self._dead = self._dead or "closed"
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._stderr.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def find_python(peer: str, given: dict[str, str], limit_s: float = 60) -> tuple[str | None, str | None]:
    """The interpreter that has the peer, or why none has: the one in ``given``, this one, or that of ``.venv-peers``.

    ``given`` maps a peer's name, or the part before its first underscore, to a path.
    """
    explicit = given.get(peer) or given.get(peer.split("_")[0])
    shared = ROOT / ".venv-peers" / "bin" / "python"
    candidates = [explicit] if explicit else [sys.executable, *([str(shared)] if shared.exists() else [])]
    why = None
    for python in candidates:
        try:
            with Worker(peer, python) as worker:
                answer = worker.ask("available", limit_s)["why"]
        except (PeerFailed, OSError) as error:
            answer = f"{Path(python).name} cannot ask: {error}"
        if answer is None:
            return python, None
        why = why or answer
    return None, why


def _log(peer: str) -> IO[bytes]:
    """Where a peer's stderr goes: a file that ends with the process, or one in the folder that ``JLLAMA_BENCH_LOGS``
    names."""
    folder = os.environ.get("JLLAMA_BENCH_LOGS")
    if folder is None:
        return tempfile.TemporaryFile()
    Path(folder).mkdir(parents=True, exist_ok=True)
    return tempfile.NamedTemporaryFile(prefix=f"{peer}-", suffix=".log", dir=folder, delete=False)


def _environment(alone: bool) -> dict[str, str]:
    quiet = {
        # By default JAX reserves most of a device's memory when it starts. Processes that share a device must not do
        # so: the first would leave nothing to the others. A process that has the device to itself should. Without this
        # reserve, JAX takes memory from the device in pieces, whenever an array needs some. Making random weights needs
        # many arrays for a moment. Their memory is free afterwards, but in small pieces, and the cache needs two large
        # ones.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "true" if alone else "false",
        # The rest is for what JAX does not allocate from its reserve: kernels, graphs, NCCL's buffers.
        "XLA_PYTHON_CLIENT_MEM_FRACTION": ".9",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    if "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        quiet["PJRT_NPROC"] = "32"  # devices of a CPU wait for one another in one pool of threads
    paths = [*([str(ROOT)] if CHECKOUT else []), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**quiet, **os.environ, "PYTHONPATH": os.pathsep.join(paths)}

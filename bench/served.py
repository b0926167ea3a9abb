"""An implementation of operations: a process that runs cases, round by round (see `bench.peers.Rounds`)."""

import argparse
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import opcases, peers
from bench.entries import say
from bench.opcases import Case
from bench.process import PeerFailed, PeerUnsupported, Worker, find_python


@dataclass
class Served:
    """One implementation. Its process starts with the first case, and again after it has died."""

    impl: str
    name: str
    python: str | None
    why: str | None  # why there is no interpreter that has it
    job: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)
    worker: Worker | None = None
    reply: dict[str, Any] = field(default_factory=dict)  # the case's result: samples, or why there are none

    def begin(self, settings: argparse.Namespace, case: Case, expected: Path) -> None:
        """Set the case to run next."""
        self._settings, self._case = settings, case
        self._args = dict(case=case, expected=str(expected), warmup=settings.warmup, iterations=settings.iterations)
        self._do = "begin"
        self.reply = {"why": self.why, "failed": False} if self.python is None else {}

    def go_on(self) -> None:
        """Run the case's next round, unless the case is done."""
        if self.reply:
            return
        try:
            self.reply = self._next_round() or {}
        except PeerFailed as error:
            self.reply = {"why": str(error), "failed": not isinstance(error, PeerUnsupported)}
        if self.reply:
            case, samples = self._case, self.reply.get("samples")
            figure = f"{1e3 * statistics.median(samples):.4f} ms" if samples else self.reply["why"]
            say(f"{self.impl}: {case['name']} batch {case['batch']} at {case['context']}: {figure}")

    def give_up(self, why: str) -> None:
        """End the case with a reason: its result cannot be checked."""
        self.reply = self.reply or {"why": why, "failed": False}

    def close(self) -> None:
        """End the process, if there is one."""
        if self.worker is not None:
            self.worker.close()

    def _next_round(self) -> dict[str, Any] | None:
        do, self._do = self._do, "go on"
        if do == "begin":
            self._settings.clock.check()
        reply = self._alive().ask(do, self._settings.time_limit, args=self._args)["result"]
        if reply and not reply["samples"]:
            limit = opcases.TOLERANCE[self._case["dtype"]]
            reply |= {"why": f"error {reply['error_vs_reference']:.1e} above {limit:.0e}", "failed": True}
        return reply

    def _alive(self) -> Worker:
        if self.worker is None or self.worker.dead is not None:
            self.worker = Worker(self.name, str(self.python))
            self.versions = self.worker.ask("open", 120, job=self.job)["versions"]
        return self.worker


def implementations(settings: argparse.Namespace, platform: str) -> list[Served]:
    """Our backends, then the requested peers."""
    wanted = [(b, "op_ours", b) for b in settings.backends]
    wanted += [(peers.load(name).name, name, "") for name in settings.peers]
    served = []
    for impl, name, backend in wanted:
        python, why = find_python(name, settings.peer_python)
        if python is None:
            say(f"{impl}: {why}")
        served.append(Served(impl, name, python, why, {"backend": backend, "platform": platform}))
    return served

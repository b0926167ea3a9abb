"""The implementations of a comparison: our backends and the installed peers."""

import argparse
import sys
from dataclasses import dataclass, field, replace
from typing import Any

from bench import peers
from bench.meshes import Shape
from bench.names import OURS
from bench.process import Budget, PeerFailed, PeerUnsupported, Worker, find_python
from bench.workloads import Workload


@dataclass
class Entry:
    """One implementation in a comparison: its peer, its Python, and its outcome for every workload."""

    impl: str
    peer: str
    backend: str
    python: str | None
    why: str | None = None  # why there is no result
    failed: bool = False  # whether that is a failure, not a limitation
    dtype: str = ""  # the format of its weights, where that is not the run's
    whole_device: bool = False  # see `bench.peers.Peer`
    divides: bool = False  # likewise
    worker: Worker | None = None
    opened: dict[str, Any] = field(default_factory=dict)
    outcomes: dict[Workload, dict[str, Any]] = field(default_factory=dict)
    clock: Budget = field(default_factory=Budget)

    @property
    def ours(self) -> bool:
        """Whether this is one of our own backends."""
        return self.impl in OURS

    def fresh(self, shape: Shape | None = None) -> "Entry":
        """A copy that has not run yet, for one device or for a mesh."""
        why = self.why
        if shape is not None and why is None and not self.ours:
            why = "it has no tensor parallel" if shape.tp > 1 and not self.divides else why
            why = "it has no data parallel here" if shape.dp > 1 else why
            if why is not None:
                say(f"  {self.impl}: {why}: left out with {shape.name}")
        return replace(self, why=why, worker=None, opened={}, outcomes={}, clock=Budget())

    def guard(self, load: Workload | None, do: Any) -> None:
        """Call ``do`` with this entry. A failure is noted in the workload's outcome, and the run goes on."""
        try:
            do(self)
        except (PeerFailed, OSError) as error:
            say(f"  {self.impl}: {error}")
            unsupported = isinstance(error, PeerUnsupported)
            gone = self.worker is None or self.worker.dead is not None
            if load is not None and not (unsupported and self.outcomes.get(load, {}).get("runs")):
                self.outcomes[load] = {"why": str(error), "failed": not unsupported}
            if load is None or gone:
                self.why, self.failed = str(error), not unsupported

    def score(self, prompt: list[int], ids: list[int]) -> list[float]:
        """`bench.reference.Score` of one of our backends, with its own weights as the reference."""
        assert self.worker is not None
        return self.worker.ask("score", 300, args={"prompt": prompt, "ids": ids})["gaps"]

    def close(self) -> None:
        """End its process."""
        if self.worker is not None:
            self.worker.close()


def say(text: str) -> None:
    """Print progress to stderr; stdout is for the table."""
    print(text, file=sys.stderr, flush=True)


def entries(settings: argparse.Namespace, platform: str) -> list[Entry]:
    """Our backends first, then the requested peers in their order."""
    backends = settings.backends
    if backends is None:
        backends = ["xla"] if platform == "cpu" else ["xla", "pallas"]
    engine = {"engine": ("ours_engine", "auto")}
    found = [Entry(b, *engine.get(b, ("ours", b)), sys.executable) for b in backends]
    for name in settings.peers:
        peer = peers.load(name)
        python, why = find_python(name, settings.peer_python)
        if settings.in_memory and not peer.draws:
            why = "it reads weights from disk: leave out --in-memory"
        takes: dict[str, Any] = dict(whole_device=peer.whole_device, divides=peer.divides)
        found.append(Entry(peer.name, name, "", python, why, dtype=peer.dtype, **takes))
    return found


def list_peers(settings: argparse.Namespace) -> int:
    """Print every peer and whether it was found, or why not."""
    for kind in ("model", "ops"):
        for name in peers.discover(kind):
            python, why = find_python(name, settings.peer_python)
            print(f"{peers.load(name).name:16} {kind:6} {'found' if python else why}")
    return 0

"""Peers: implementations to compare with. Each is one file, found by `discover`, and runs in its own process.

A peer's file defines ``PEER``. Nothing heavy is imported before its ``open`` is called: the file itself must import
in any Python from 3.11 on, with numpy as the only dependency.
"""

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Protocol


class NotSupported(Exception):
    """The peer cannot do what is asked. The message says why and appears in the peer's row. This is no failure."""


@dataclass(frozen=True)
class Output:
    """What a model generated: ``ids`` of each row, seconds to the first token, and from there to the last."""

    ids: list[list[int]]
    first_s: float
    decode_s: float
    steps: int | None = None  # decode steps in ``decode_s`` (None: one fewer than ids)


class Model(Protocol):
    """A loaded model."""

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Output:
        """Continue every prompt greedily by exactly ``new_tokens``. End-of-sequence does not stop it."""
        ...

    def peak_bytes(self) -> int:
        """The peak memory of the device (on a CPU: of the process)."""
        ...

    # A model may also have ``settings``, a dictionary of what its library chose, for the record.


# A case runs in four rounds: prepare, estimate the time, check and compile the timed calls, time. In the first and the
# third, which compile, other implementations may use the device; in the second and the last none does.
Rounds = Generator[None, None, dict[str, Any]]


class Ops(Protocol):
    """A library of operations."""

    def run(self, case: dict[str, Any], expected: str, warmup: int, iterations: int) -> Rounds:
        """Time ``case``, and check its result against the array file ``expected``. Returns ``error_vs_reference``,
        ``samples`` (empty where the error is too large) and more keys for the record."""
        ...


@dataclass(frozen=True)
class Peer:
    """One implementation. ``open(job)`` gives a `Model` (kind ``"model"``) or an `Ops` (kind ``"ops"``)."""

    name: str
    kind: str
    available: Callable[[], str | None]  # None, or why it cannot run and how to install it
    open: Callable[[dict[str, Any]], Any]
    packages: tuple[str, ...] = ()  # packages whose versions the record names
    dtype: str = ""  # the format of its weights, where that is not the run's
    draws: bool = False  # whether it makes random weights itself, from ``job["config"]``
    whole_device: bool = False  # whether it takes the device's memory for itself, whatever the model needs
    divides: bool = False  # whether it divides a model over ``job["tp"]`` devices


def discover(kind: str) -> list[str]:
    """The names of the files in this folder that hold a peer of that kind, in order."""
    files = sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    return [name for name in files if load(name).kind == kind]


def wanted(asked: str, kind: str) -> list[str]:
    """The file names for ``all``, ``none`` or names of that kind. A name may also be the dotted path of a module that
    holds a `PEER`. Raises ValueError for an unknown name."""
    known = {load(name).name: name for name in discover(kind)}
    if asked in ("all", "none"):
        return list(known.values()) if asked == "all" else []
    for name in asked.split(","):
        if name not in known and ("." not in name or not _importable(name)):
            raise ValueError(f"expected all, none or any of {', '.join(known)}, found {name!r}")
    return [known.get(name, name) for name in asked.split(",")]


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def load(name: str) -> Peer:
    """The peer of the file ``name``, or of any importable module that has a ``PEER``."""
    module = importlib.import_module(name if "." in name else f"{__name__}.{name}")
    return module.PEER


def missing(*modules: str, install: str) -> str | None:
    """Why the peer cannot run, if one of ``modules`` is not installed, else None. Imports none of them."""
    absent = [m for m in modules if importlib.util.find_spec(m) is None]
    return f"{' and '.join(absent)} not installed ({install})" if absent else None

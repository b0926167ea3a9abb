"""One model in one dtype, run by several implementations: opened, warmed up and checked, timed, recorded."""

import argparse
import dataclasses
import functools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.entries import Entry, say
from bench.measure import wait_quiet
from bench.meshes import Shape
from bench.models import cache_folder, model
from bench.process import Budget, PeerFailed, Worker
from bench.record import RESULTS, Record, Run, append, start_run
from bench.reference import UNCHECKED, Reference, verify
from bench.roofline import best_of, cache_bytes, weight_bytes
from bench.rows import records_of
from bench.workloads import DRAWN, Workload, grid, prompts

HEADROOM = 1.5  # times the weights: memory of an implementation, without its cache


class Comparison:
    """What the implementations share: reference, workloads, ceilings. Ceilings are measured before any model loads."""

    def __init__(
        self, settings: argparse.Namespace, preset: str | None, dtype: str | None, shape: Shape | None = None
    ) -> None:
        self.settings, self.shape = settings, shape
        self.reference = Reference(cache_folder(settings.cache_dir) / "compiled")
        self.platform: str = self.reference.hello["platform"]
        self.dtype = dtype or ("f32" if self.platform == "cpu" else "bf16")
        self.name, self.path = model(settings, self.reference, preset, self.dtype)
        self.drawn = self.path.startswith(DRAWN)
        mesh = dataclasses.asdict(shape) if shape else {}
        sizes = self.reference.ask("shape", 60, model=self.path, **mesh)
        self.dims: dict[str, int] = sizes["dims"]
        self.entries: list[Entry] = []
        self.records: list[Record] = []
        self.loads: list[Workload] = []
        if sizes["refused"]:
            say(f"{self.name}: {sizes['refused']}: left out")
            return
        self._plan(sizes, mesh)
        self.weights = round(sizes["n_params"] * (4 if self.dtype == "f32" else 2))
        hello = self.reference.hello
        self.run: Run = start_run(hello["device"], hello["versions"], self._ceilings(), settings.run if shape else None)
        settings.run = self.run.run
        where = f"{self.run.device}, {shape.name}" if shape else self.run.device
        say(f"{self.name} {self.dtype} on {where}: run {self.run.run}, {len(self.loads)} workloads")

    def add_entries(self, who: Sequence[Entry]) -> None:
        """Add the implementations, and load the reference's weights, which check their tokens. Where every process
        makes the weights itself, our own implementations check their tokens with their own weights, and the reference
        leaves the device."""
        self.entries = [entry.fresh(self.shape) for entry in who]
        if self.drawn:
            self.reference.rest()
        else:
            self.reference.open(self.job)

    def __enter__(self) -> "Comparison":
        return self

    def __exit__(self, *_: object) -> None:
        self.reference.worker.close()

    @property
    def order(self) -> str:
        """The order of runs: by default in turns on a CPU, where all implementations can be open at once."""
        return self.settings.order or ("turns" if self.platform == "cpu" else "one-by-one")

    @property
    def memory(self) -> float:
        """Bytes of the device's memory; infinite on a CPU."""
        return self.reference.hello["memory"] or math.inf

    @property
    def parts(self) -> list[tuple["Comparison", Entry]]:
        """This comparison paired with each of its implementations."""
        return [(self, entry) for entry in self.entries]

    def _plan(self, shape: dict[str, Any], mesh: dict[str, int]) -> None:
        """The workloads, their prompts, and the job that implementations are opened with."""
        ask = functools.partial(self.reference.ask, "encode", 60, model=self.path, text="Once upon a time,")
        text = None if self.settings.preset else ask()["ids"]
        s = self.settings
        lengths = s.prompt_len or [len(text) if text else 8]
        loads = grid(s.batch, lengths, s.new_tokens, s.prefill, s.context, sampled=s.sampled)
        # The last token that a row draws is never fed back.
        self.loads = [w for w in loads if w.context - 1 <= shape["max_seq_len"]]
        if left := len(loads) - len(self.loads):
            say(f"{self.name}: skipping {left} workloads past its context of {shape['max_seq_len']}")
        groups = mesh.get("dp", 1)
        if uneven := [w for w in self.loads if w.batch % groups]:
            say(f"{self.name}: --dp {groups} does not divide {uneven[0].batch} rows: skipping {len(uneven)} workloads")
            self.loads = [w for w in self.loads if w not in uneven]
        if not self.loads:
            return
        self.inputs = {w: prompts(w, shape["vocab_size"], shape["bos_id"], text) for w in self.loads}
        self.job = mesh | {
            "model": self.path,
            "dtype": self.dtype,
            "platform": self.platform,
            "batch": max(w.batch for w in self.loads),
            "max_len": max(w.context for w in self.loads) + 128,
            "sampled": s.sampled,
            "tokens": max(w.batch * w.context for w in self.loads),
            "config": shape["config"],
            # Cache length in tokens, by batch.
            "rooms": {str(w.batch): max(o.context + 128 for o in self.loads if o.batch == w.batch) for w in self.loads},
            "context": shape["max_seq_len"],
            "vocab_size": shape["vocab_size"],
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        }

    def _ceilings(self) -> dict[str, float]:
        """The ceilings for the run's dtype. Those of a GPU are measured once for all comparisons of a command: they
        do not depend on the weights."""
        if self.platform == "cpu":
            return self.reference.ceilings(self.dtype, self.weights)
        kind = self.dtype if self.dtype in ("f32", "f16") else "bf16"
        if kind not in self.settings.ceilings:
            self.settings.ceilings[kind] = self.reference.ceilings(self.dtype, self.weights)
        return self.settings.ceilings[kind]

    def loads_of(self, entry: Entry) -> list[Workload]:
        """The workloads of an implementation. Peers get greedy ones only, because their tokens can be checked."""
        return [w for w in self.loads if entry.ours or not w.sampled]

    def measure_ceilings_again(self) -> None:
        """Measure again after the run and keep the better figures, because the machine may have been busy before."""
        self.run = dataclasses.replace(self.run, ceilings=best_of(self.run.ceilings, self._ceilings()))

    @property
    def reference_bytes(self) -> float:
        """Bytes that the reference holds on the device."""
        return 0.0 if self.drawn else HEADROOM * weight_bytes(self.dims, self.dtype)

    def needs(self, entry: Entry) -> float:
        """An estimate of the device memory that an implementation needs, in bytes."""
        if entry.why is not None:
            return 0.0
        if entry.whole_device:
            return math.inf
        cache = max(cache_bytes(self.dims, self.dtype, w.batch, w.context) for w in self.loads)
        devices = self.shape or Shape()
        return HEADROOM * weight_bytes(self.dims, self.dtype) / devices.tp + cache / devices.devices

    def open(self, entry: Entry) -> None:
        """Start an implementation, if it is installed."""
        if entry.why is None:
            entry.guard(None, self._open)

    def warm_up(self, entry: Entry, load: Workload) -> None:
        """Run a workload cold and warm, and check its tokens, unless that was done before."""
        if entry.why is None and load not in entry.outcomes:
            entry.guard(load, functools.partial(self._warm_up, load=load))

    def measure(self, group: list[Entry]) -> None:
        """Time the workloads of open implementations, in turns, then close all of them."""
        for entry in group:
            entry.clock = Budget(self.settings.share, "a peer's share")
        for load in self.loads:
            takers = [e for e in group if load in self.loads_of(e)]
            for entry in (e for e in takers if e.why is None):
                if not entry.ours and "why" not in entry.outcomes.get(load, {}):
                    entry.guard(load, lambda e: e.clock.check())
                self.warm_up(entry, load)
            for _ in range(self.settings.runs):
                for entry in (e for e in takers if e.why is None and "why" not in e.outcomes.get(load, {})):
                    entry.guard(load, functools.partial(self._timed, load=load))
        for entry in group:
            entry.close()

    def record(self, group: list[Entry]) -> None:
        """Append what was measured to the records at once, so that an interrupted run loses nothing."""
        where = self.run, self.name, self.dtype, self.dims, self.shape
        made = [r | {"order": self.order} for e in group for r in records_of(e, self.loads_of(e), *where)]
        append(results(self.settings) / f"{'mesh' if self.shape else 'compare'}.jsonl", made)
        self.records += made

    def _open(self, entry: Entry) -> None:
        assert entry.python is not None
        self.settings.clock.check()
        say(f"  {entry.impl} {self.dtype}: opening")
        limit_s = self.settings.time_limit
        # The peer is alone on the device if peers run one by one and the reference's process has ended. `add_entries`
        # ends it where every peer makes random weights of its own.
        entry.worker = Worker(entry.peer, entry.python, alone=self.drawn and self.order == "one-by-one")
        entry.worker.ask(
            "available", limit_s
        )  # imports nothing heavy, so that the next request times the peer's own start
        entry.opened = entry.worker.ask("open", max(limit_s, 300), job=self.job | {"backend": entry.backend})
        if self.drawn:
            entry.opened.pop("load_s", None)  # it is the time to make random weights, not to load them

    def _generate(self, entry: Entry, load: Workload) -> dict[str, Any]:
        assert entry.worker is not None
        self.settings.clock.check()
        fields = {"prompts": self.inputs[load], "new_tokens": load.new_tokens, "sampled": load.sampled}
        return entry.worker.ask("generate", self.settings.time_limit, **fields)

    def _timed(self, entry: Entry, load: Workload) -> None:
        idle = wait_quiet(self.settings.wait_quiet)
        entry.outcomes[load]["runs"].append(self._generate(entry, load) | {"idle": idle})

    def _warm_up(self, entry: Entry, load: Workload) -> None:
        """A cold run, which compiles, a second run for what compiles late, and the check of the tokens."""
        checked_here = self.drawn and bool(entry.outcomes)
        outcome = entry.outcomes[load] = {"runs": []}
        outcome["cold"] = self._generate(entry, load)
        warm = outcome["warm"] = self._generate(entry, load)
        if checked_here:  # an earlier check in the same process raised the peak
            del warm["peak_bytes"]
        check = outcome["check"] = UNCHECKED if load.sampled else self._check(entry, load, warm["ids"])
        if entry.ours and entry.worker is not None:
            outcome["choices"] = entry.worker.ask("chosen", 60)["choices"]
        note = "not checked" if check["agreement"] is None else f"{check['agreement']:.1%} of tokens agree"
        steps = load.new_tokens - 1
        speed = load.batch * (steps / warm["decode_s"] if steps else load.prompt_len / warm["first_s"])
        what = f"{entry.impl} {self.dtype}: {load.case} batch {load.batch} prompt {load.prompt_len}"
        say(f"  {what}: about {speed:,.0f} tokens/s, {note}")
        if not check["passed"]:
            raise PeerFailed(f"its tokens differ: {note}, the worst {check['worst']:.2f} standard deviations off")

    def _check(self, entry: Entry, load: Workload, ids: list[list[int]]) -> dict[str, Any]:
        if not self.drawn:
            return verify(self.reference.score, self.dtype, self.inputs[load], ids)
        if not entry.ours:  # its random weights are others
            return UNCHECKED
        try:
            return verify(entry.score, self.dtype, self.inputs[load], ids)
        except PeerFailed as error:  # weights that fill the device may leave no memory for the check
            say(f"  {entry.impl}: {error}")
            return UNCHECKED


def results(settings: argparse.Namespace) -> Path:
    """The folder for records."""
    return Path(settings.results) if settings.results else RESULTS

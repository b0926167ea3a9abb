"""Launches: turns plans into small numpy arrays, and runs compiled steps with them on the state."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from tqdm import tqdm

from jllama.config import Backend
from jllama.decode import StepOutput
from jllama.engine import masked, steps
from jllama.engine.constraint import Progress, masks_of
from jllama.engine.launch import Drawn, Launch, Scored, cut, fitting, places
from jllama.engine.memory import in_memory
from jllama.engine.request import Request
from jllama.engine.scheduler import Piece, Plan
from jllama.engine.scheduler import Sequence as Scheduled
from jllama.engine.state import EngineState, extra_settings, init_extras, init_state, on_devices, rows_of
from jllama.engine.tuning import Tuning, sizes
from jllama.kernels import Choice, Recorded, known
from jllama.mesh.layout import DATA, axis_size
from jllama.params import Params

COPIES = 16  # pages a launch
COMPILERS = 16  # threads, at most

Requests = dict[Scheduled, Request]
Matchers = dict[Scheduled, Progress]


class Device:
    """The state of ``slots`` rows over a pool of ``pages``, or ``fewer`` where so many find no room, and the weights of
    every step.

    On a mesh, each part along the axis ``data`` has ``slots`` rows and ``pages`` pages of its own. The arrays of a
    launch have the same number of places for each part, one part after the other. Slots and pages are numbered from 0
    in each part."""

    def __init__(
        self,
        params: Params,
        *,
        slots: int,
        pages: int,
        fewer: bool,
        width: int,
        max_len: int,
        pieces: int,
        tuning: Tuning,
        backend: Backend,
    ) -> None:
        self.params, self.slots = params, slots
        self.mesh, self.parts = params.mesh, axis_size(params.mesh, DATA)
        self.max_len, self.tuning, self.backend = max_len, tuning, backend
        self.programs: set[tuple[str, int, str]] = set()  # used so far: name, rows or pieces, kind
        self.backends: dict[str, dict[str, Choice]] = {}  # of "prefill" and "decode": the choice for every op
        self.ways: dict[int, Choice] = {}  # of each number of rows that has been compiled: how its step runs
        self._compile: Callable[[jax.stages.Lowered], None] | None = None  # while steps are compiled ahead
        self._static = {"backend": backend, "arch": known(params)}
        pieces = min(pieces, tuning.pieces[-1])  # more are several launches
        self._width, self._of_pieces, self._of_rows = width, sizes(tuning.pieces, pieces), sizes(tuning.rows, slots)
        self.pages, self._state = in_memory(self._empty, pages, fewer=fewer)
        self._logits: jax.Array | None = None  # [slots, vocabulary]: of next tokens, while there are constraints

    @property
    def lost(self) -> bool:
        """Whether an error or interrupt fell between a donation and its result."""
        return self._state.k.is_deleted()

    def reset(self, *, extras: bool = False) -> None:
        """Empty the cache and all slots."""
        for array in jax.tree.leaves(self._state):
            array.delete()  # memory may not hold the old cache beside the new one
        _, self._state = in_memory(self._empty, self.pages, fewer=False)
        self._logits = None
        if extras:
            self.add_extras()

    def _empty(self, pages: int) -> EngineState:
        sizes = self.slots * self.parts, pages * self.parts
        return init_state(self.params.config, *sizes, self.params.dtype, mesh=self.mesh)

    def add_extras(self) -> None:
        """Allocate what only requests of the kind "full" need, at the first of them."""
        if self._state.extras is None:
            extras = init_extras(self.params.config, self.slots * self.parts)
            self._state = on_devices(replace(self._state, extras=extras), self.mesh)

    def launch(self, plans: Sequence[Plan], requests: Requests, matchers: Matchers) -> list[Launch]:
        """Launch the plans of all parts, without waiting for any result. First tokens, which are there before the
        decode steps, come in a launch of their own. ``matchers`` has an entry for each row with a constraint."""
        names = ("copies", "pieces", "joins", "rows", "ahead")
        copies, pieces, joins, rows, ahead = ([getattr(plan, name) for plan in plans] for name in names)
        for at in range(0, max(map(len, copies)), COPIES):
            self._copy([part[at : at + COPIES] for part in copies])
        masked, fed = any(plan.rows and not plan.steps for plan in plans), []
        first, launched = Launch(masked=masked), Launch(masked=masked, ends=True)
        for size, part in cut(self._of_pieces, pieces) if any(pieces) else ():
            scored = [(i, p) for i, p in places(part, size) if p.sequence.limit == 0]
            logits, scores = self._feed(part, size, bool(scored))
            fed.append((part, size, logits))
            if scores is not None:
                launched.scored.append(Scored(scored, scores))
        if any(joins):
            self._join(joins, requests)
        for part, size, logits in fed:
            if firsts := [(i, p.sequence) for i, p in places(part, size) if p.ends]:
                output = self._first(part, size, logits, self._kind(firsts, requests))
                first.drawn.append(Drawn(firsts, [output], decoded=False))
        if any(rows):
            size = fitting(self._of_rows, rows)
            drawing = list(places(rows, size))
            kind = self._kind(drawing, requests)
            outputs = self._decode(rows, size, kind, [plan.steps for plan in plans])
            if masked:
                one_by_one = [plan.rows if not plan.steps else [] for plan in plans]
                outputs.append(self._draw(one_by_one, size, kind, matchers))
            launched.drawn.append(Drawn(drawing, outputs))
        if any(ahead):
            self._look_ahead(ahead, fitting(self._of_rows, ahead))
        both = [first, launched] if first.drawn else [launched]
        if jax.process_count() == 1:
            for array in jax.tree.leaves([one.arrays for one in both]):
                array.copy_to_host_async()
        return both

    def _kind(self, rows: Sequence[tuple[int, Scheduled]], requests: Requests) -> str:
        """The simplest kind of drawing that serves all these rows."""
        return max((requests[s].sampling.kind for _, s in rows), key=steps.KINDS.index)

    def warm_up(self, kinds: Sequence[str], *, constraints: bool, scores: bool, progress: bool) -> None:
        """Compile every step for every number of rows, and run each once without any real row. Python lowers one
        program after the other, while threads compile those before."""
        jobs = self._every_step(kinds, constraints=constraints, scores=scores)
        alone = jax.process_count() == 1  # several processes must do the same in the same order
        workers = min(COMPILERS, os.cpu_count() or 1) if alone else 1
        with (
            tqdm(total=len(jobs), unit="program", disable=not progress) as bar,
            ThreadPoolExecutor(workers, thread_name_prefix="compile") as pool,
        ):
            compiling: list[Future[Any]] = []
            state, logits = self._state, self._known_logits() if constraints else self._logits
            self._compile = lambda lowered: compiling.append(pool.submit(lowered.compile))
            try:
                for job in jobs:
                    job()
                    self._state, self._logits = state, logits  # nothing has run
                for one in as_completed(compiling):
                    one.result()
                    bar.update()
            finally:
                pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C, those that wait need not be compiled
                self._compile = None
                self._state, self._logits = state, logits
            for job in jobs:
                job()

    def _every_step(self, kinds: Sequence[str], *, constraints: bool, scores: bool) -> list[Callable[[], Any]]:
        """A launch without any real row, for every program."""
        nothing: list[list[Any]] = [[] for _ in range(self.parts)]
        jobs: list[Callable[[], Any]] = [partial(self._copy, nothing), partial(self._join, nothing, {})]
        for size in self._of_pieces:
            jobs += [partial(self._feed, nothing, size, scored) for scored in ((False, True) if scores else (False,))]
            logits = self._zeros(size)
            jobs += [partial(self._first, nothing, size, logits, kind) for kind in kinds]
        for size in self._of_rows:
            for kind in kinds:
                counts = [[unit] * self.parts for unit in self._units(size)]
                jobs += [partial(self._decode, nothing, size, kind, count) for count in counts]
                jobs += [partial(self._draw, nothing, size, kind, {})] if constraints else []
            jobs += [partial(self._look_ahead, nothing, size)] if constraints else []
        return jobs

    def _run(self, program: tuple[str, int, str], step: Any, *arguments: Any, **static: Any) -> Any:
        """The results of a compiled step, or only their shapes, while steps are being compiled ahead."""
        self.programs.add(program)
        if self._compile is None:
            return step(*arguments, **static)
        lowered = step.lower(*arguments, **static)
        self._compile(lowered)
        return lowered.out_info

    def _copy(self, parts: list[list[tuple[int, int]]]) -> None:
        total = COPIES * self.parts
        source, target = np.zeros(total, np.int32), np.full(total, self.pages, np.int32)
        for i, (a, b) in places(parts, COPIES):
            source[i], target[i] = a, b
        self._state = self._run(("copy", COPIES, ""), steps.jit_copy, self._state, source, target, mesh=self.mesh)

    def _feed(self, parts: Sequence[Sequence[Piece]], size: int, scored: bool) -> tuple[jax.Array, steps.Scores | None]:
        total = size * self.parts
        tokens = np.zeros((total, self.tuning.piece + 1), np.int32)
        start, count = np.zeros(total, np.int32), np.zeros(total, np.int32)
        for i, p in places(parts, size):
            real = p.sequence.tokens[p.start : p.start + p.count + 1]
            tokens[i, : len(real)], start[i], count[i] = real, p.start, p.count
        table = self._table([[p.sequence for p in pieces] for pieces in parts], size)
        where, scores = (self.params, self._state, tokens[:, :-1], start, table, count), None
        if scored:
            program = ("score", size, "")
            found, ran = self._run(program, steps.jit_score, *where, tokens[:, 1:], **self._static)
            self._state, logits, scores = found
        else:
            found, ran = self._run(("feed", size, ""), steps.jit_feed, *where, **self._static)
            self._state, logits = found
        self._record("prefill", ran)
        return logits, scores

    def _first(self, parts: Sequence[Sequence[Piece]], size: int, logits: jax.Array, kind: str) -> StepOutput:
        slots = np.full(size * self.parts, self.slots, np.int32)
        for i, p in places(parts, size):
            if p.ends:
                assert p.sequence.slot is not None
                slots[i] = p.sequence.slot
        how = dict(kind=kind, mesh=self.mesh, **self._static)
        found, ran = self._run(("first", size, kind), steps.jit_first, self._state, logits, slots, **how)
        self._state, output = found
        self._record("prefill", ran)
        return output

    def _join(self, parts: list[list[Scheduled]], requests: Requests) -> None:
        config = self.params.config
        rows = [
            rows_of(
                [(requests[s], s.tokens, len(s.tokens) - s.prompt) for s in joins],
                [requests[s].stops(config) for s in joins],
                self.slots,
            )
            for joins in parts
        ]
        program = ("join", self.slots, "")
        joined = jax.tree.map(lambda *arrays: np.concatenate(arrays), *rows)
        where = self._state, self._slots_of(parts, self.slots), joined
        self._state = self._run(program, steps.jit_join, *where, mesh=self.mesh)
        for part, s in ((part, s) for part, joins in enumerate(parts) for s in joins):
            if requests[s].sampling.kind == "full":
                tokens = np.zeros(self.max_len, np.int32)
                tokens[: len(s.tokens)] = s.tokens
                program = ("join_extras", 1, "")
                slot = self._slots_of([[s] if i == part else [] for i in range(self.parts)], 1)
                where = slot, extra_settings(requests[s]), tokens, np.int32(s.prompt), np.int32(len(s.tokens))
                self._state = self._run(program, steps.jit_join_extras, self._state, *where, mesh=self.mesh)

    def _units(self, size: int) -> list[int]:
        """The numbers of steps that programs of so many rows have."""
        short, _, long = self.tuning.steps
        return [short, long] if size <= self.tuning.whole else [short]

    def _decode(self, parts: list[list[Scheduled]], size: int, kind: str, counts: list[int]) -> list[StepOutput]:
        """``counts[i]`` steps for the rows of part i, by the longest program that can be run as often as needed."""
        unit = max(unit for unit in self._units(size) if not any(count % unit for count in counts))
        outputs, name = [], "decode" if unit == self.tuning.steps[0] else "decode_long"
        for done in range(0, max(counts), unit):
            rows = [part if count > done else [] for part, count in zip(parts, counts, strict=True)]
            where = self.params, self._state, self._slots_of(rows, size), self._table(rows, size)
            how = dict(steps=unit, kind=kind, **self._static)
            found, ran = self._run((name, size, kind), steps.jit_decode, *where, **how)
            self._state, output = found
            outputs.append(output)
            self._record("decode", ran)
            self.ways[size] = ran.choices["decode_step"]
        return outputs

    def _look_ahead(self, parts: list[list[Scheduled]], size: int) -> None:
        where = self.params, self._state, self._known_logits(), self._slots_of(parts, size), self._table(parts, size)
        found, ran = self._run(("look_ahead", size, ""), masked.jit_look_ahead, *where, **self._static)
        self._state, self._logits = found
        self._record("decode", ran)

    def _draw(self, parts: list[list[Scheduled]], size: int, kind: str, matchers: Matchers) -> StepOutput:
        by_place: list[Progress | None] = [None] * (size * self.parts)
        for i, s in places(parts, size):
            by_place[i] = matchers.get(s)
        masks = masks_of(by_place, len(by_place), self.params.config.vocab_size)
        how = dict(kind=kind, mesh=self.mesh, **self._static)
        where = self._known_logits(), self._slots_of(parts, size), masks
        found, ran = self._run(("draw_allowed", size, kind), masked.jit_draw_allowed, self._state, *where, **how)
        self._state, output = found
        self._record("decode", ran)
        return output

    def _known_logits(self) -> jax.Array:
        if self._logits is None:  # made at the first request with a constraint
            self._logits = self._zeros(self.slots)
        return self._logits

    def _zeros(self, size: int) -> jax.Array:
        """Logits of so many places of each part."""
        lies = None if self.mesh is None else NamedSharding(self.mesh, steps.logits_spec(self.mesh))
        return jnp.zeros((size * self.parts, self.params.config.vocab_size), jnp.float32, device=lies)

    def _record(self, phase: str, ran: Recorded) -> None:
        self.backends.setdefault(phase, {}).update(ran.choices)

    def _table(self, parts: list[list[Scheduled]], size: int) -> np.ndarray:
        table = np.full((size * self.parts, self._width), self.pages, np.int32)
        for i, s in places(parts, size):
            table[i, : len(s.pages)] = s.pages
        return table

    def _slots_of(self, parts: list[list[Scheduled]], size: int) -> np.ndarray:
        slots = np.full(size * self.parts, self.slots, np.int32)
        for i, s in places(parts, size):
            assert s.slot is not None
            slots[i] = s.slot
        return slots

"""What an engine launches: plans turned into small numpy arrays and compiled steps, over the state that they change."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jllama.config import Backend
from jllama.engine import steps
from jllama.engine.request import Request
from jllama.engine.scheduler import Piece, Plan
from jllama.engine.scheduler import Sequence as Scheduled
from jllama.engine.state import EngineState, extra_settings, init_extras, init_state, rows_of
from jllama.engine.tuning import Tuning, sizes
from jllama.kernels import Choice, Recorded, known
from jllama.params import Params

COPIES = 16  # pages a launch

Requests = dict[Scheduled, Request]


@dataclass(frozen=True)
class Launch:
    """What a plan will bring, once it has run."""

    rows: list[Scheduled]
    drawn: steps.Drawn | None
    pieces: list[tuple[int, Piece]]  # those that are scored, with their places in the scores
    scores: tuple[jax.Array, jax.Array] | None


class Device:
    """The state of ``slots`` rows over a pool of ``pages``, and the weights of every step."""

    def __init__(
        self,
        params: Params,
        *,
        slots: int,
        pages: int,
        width: int,
        max_len: int,
        pieces: int,
        tuning: Tuning,
        backend: Backend,
    ) -> None:
        self.params, self.slots, self.pages = params, slots, pages
        self.max_len, self.tuning, self.backend = max_len, tuning, backend
        self.programs: set[tuple[str, int, str]] = set()  # used so far: name, rows or pieces, kind
        self.backends: dict[str, dict[str, Choice]] = {}  # of "prefill" and "decode": the choice for every op
        self._static = {"backend": backend, "arch": known(params)}
        self._width, self._of_pieces, self._of_rows = width, sizes(tuning.pieces, pieces), sizes(tuning.rows, slots)
        self.reset()

    @property
    def lost(self) -> bool:
        """Whether an error or interrupt fell between a donation and its result."""
        return self._state.k.is_deleted()

    def reset(self, *, extras: bool = False) -> None:
        """An empty cache, and no row."""
        self._state: EngineState = init_state(self.params.config, self.slots, self.pages, self.params.dtype)
        if extras:
            self.add_extras()

    def add_extras(self) -> None:
        """Room for what only some requests ask for; made at the first of them."""
        if self._state.extras is None:
            self._state = replace(self._state, extras=init_extras(self.params.config, self.slots))

    def launch(self, plan: Plan, requests: Requests) -> Launch:
        """Start everything; nothing is waited for."""
        for at in range(0, len(plan.copies), COPIES):
            self._copy(plan.copies[at : at + COPIES])
        scored = [(i, p) for i, p in enumerate(plan.pieces) if p.sequence.limit == 0]
        scores = drawn = None
        if plan.pieces:
            size = next(b for b in self._of_pieces if b >= len(plan.pieces))
            scores = self._feed(plan.pieces, size, bool(scored))
        if plan.joins:
            self._join(plan.joins, requests)
        if plan.rows:
            size = next(b for b in self._of_rows if b >= len(plan.rows))
            kind = max((requests[s].sampling.kind for s in plan.rows), key=steps.KINDS.index)
            drawn = self._decode(plan.rows, size, kind, plan.steps)
        for array in jax.tree.leaves((scores, drawn)):
            array.copy_to_host_async()
        return Launch(plan.rows, drawn, scored, scores)

    def warm_up(self, kinds: Sequence[str], *, progress: bool) -> None:
        """Compile every step for every number of rows: each runs once, on nothing."""
        feeds = [(size, scored) for size in self._of_pieces for scored in (False, True)]
        decodes = [(size, kind) for size in self._of_rows for kind in kinds]
        with tqdm(total=2 + len(feeds) + len(decodes), unit="program", disable=not progress) as bar:
            self._copy([])
            bar.update()
            self._join([], {})
            bar.update()
            for size, scored in feeds:
                self._feed([], size, scored)
                bar.update()
            for size, kind in decodes:
                self._decode([], size, kind, 0)
                bar.update()

    def _copy(self, copies: list[tuple[int, int]]) -> None:
        source, target = np.zeros(COPIES, np.int32), np.full(COPIES, self.pages, np.int32)
        for i, (a, b) in enumerate(copies):
            source[i], target[i] = a, b
        self.programs.add(("copy", COPIES, ""))
        self._state = steps.jit_copy(self._state, source, target)

    def _feed(self, pieces: list[Piece], size: int, scored: bool) -> tuple[jax.Array, jax.Array] | None:
        tokens, start = np.zeros((size, self.tuning.piece + 1), np.int32), np.zeros(size, np.int32)
        for i, p in enumerate(pieces):
            real = p.sequence.tokens[p.start : p.start + p.count + 1]
            tokens[i, : len(real)], start[i] = real, p.start
        table = self._table([p.sequence for p in pieces], size)
        how: dict[str, Any] = dict(start=start, table=table, **self._static)
        self.programs.add(("score" if scored else "feed", size, ""))
        scores = None
        if scored:
            found, ran = steps.jit_score(self.params, self._state, tokens[:, :-1], targets=tokens[:, 1:], **how)
            self._state, scores = found
        else:
            self._state, ran = steps.jit_feed(self.params, self._state, tokens[:, :-1], **how)
        self._record("prefill", ran)
        return scores

    def _join(self, joins: list[Scheduled], requests: Requests) -> None:
        config = self.params.config
        rows = rows_of(
            [(requests[s], s.tokens, len(s.tokens) - s.prompt) for s in joins],
            [requests[s].stops(config) for s in joins],
            self.slots,
        )
        self.programs.add(("join", self.slots, ""))
        self._state = steps.jit_join(self._state, self._slots_of(joins, self.slots), rows)
        for s in joins:
            if requests[s].sampling.kind == "full":
                tokens = np.zeros(self.max_len, np.int32)
                tokens[: len(s.tokens)] = s.tokens
                self.programs.add(("join_extras", 1, ""))
                where = self._slots_of([s], 1)[0], extra_settings(requests[s])
                text = tokens, np.int32(s.prompt), np.int32(len(s.tokens))
                self._state = steps.jit_join_extras(self._state, *where, *text)

    def _decode(self, rows: list[Scheduled], size: int, kind: str, count: int) -> steps.Drawn:
        self.programs.add(("decode", size, kind))
        where = self._slots_of(rows, size), self._table(rows, size), np.int32(count)
        how = dict(most=max(self.tuning.steps), kind=kind, **self._static)
        (self._state, drawn), ran = steps.jit_decode(self.params, self._state, *where, **how)
        self._record("decode", ran)
        return drawn

    def _record(self, phase: str, ran: Recorded) -> None:
        self.backends.setdefault(phase, {}).update(ran.choices)

    def _table(self, sequences: Sequence[Scheduled], size: int) -> np.ndarray:
        table = np.full((size, self._width), self.pages, np.int32)
        for row, s in zip(table, sequences, strict=False):
            row[: len(s.pages)] = s.pages
        return table

    def _slots_of(self, sequences: Sequence[Scheduled], size: int) -> np.ndarray:
        slots = np.full(size, self.slots, np.int32)
        for i, s in enumerate(sequences):
            assert s.slot is not None
            slots[i] = s.slot
        return slots

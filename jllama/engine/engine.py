"""The loop: requests go in; each turn launches a plan on the device and reads the tokens of the turn before."""

import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence

import jax
import numpy as np

from jllama.config import Backend
from jllama.device import default_device
from jllama.engine.constraint import Constraint, Progress
from jllama.engine.device import Device
from jllama.engine.launch import Launch, Tokens, tokens_of
from jllama.engine.memory import page_count
from jllama.engine.pages import Pages
from jllama.engine.parts import Parts
from jllama.engine.request import Completion, Event, Handle, Request, SamplingSettings, per_prompt
from jllama.engine.scheduler import Piece, Scheduler
from jllama.engine.scheduler import Sequence as Scheduled
from jllama.engine.statistics import Statistics
from jllama.engine.steps import KINDS
from jllama.engine.tuning import Tuning, tuning_for
from jllama.errors import InputError
from jllama.kernels import PAGE, START_MULTIPLE, Choice
from jllama.mesh.layout import DATA, axis_size
from jllama.mesh.place import adopted, placed
from jllama.mesh.run import fetch
from jllama.paged import pages_for
from jllama.params import Params


class Engine:
    """Many requests on one model. At most ``slots`` of them draw tokens at a time.

    The cache has ``pages`` pages of 64 positions. Without ``pages``, it takes the part ``memory`` of the device's free
    memory (less where that is not in one piece), and at most ``max_pages`` (default: on a CPU what all slots can use,
    else no limit). A request has at most ``max_len`` tokens, prompt included (default: the model's context). A turn
    feeds at most ``budget`` tokens of prompts (default: ``tuning.budget``). It feeds ``tuning.alone`` if that is more
    and no row draws that they would delay. ``tuning`` are the sizes of launches (default: those of the device). An
    engine must not be used by two threads at a time."""

    def __init__(
        self,
        params: Params,
        *,
        slots: int = 16,
        pages: int | None = None,
        memory: float = 0.9,
        max_pages: int | None = None,
        max_len: int | None = None,
        budget: int | None = None,
        tuning: Tuning | None = None,
        backend: Backend = "auto",
    ) -> None:
        tuning = tuning_for(default_device()) if tuning is None else tuning
        if slots < 1:
            raise InputError(f"slots: expected at least 1, found {slots}")
        budget = tuning.budget if budget is None else budget
        if max_pages is not None and max_pages < 1:
            raise InputError(f"max_pages: expected at least 1, found {max_pages}")
        if budget < tuning.piece:
            raise InputError(f"budget: expected at least {tuning.piece} tokens, found {budget}")
        context = params.config.max_seq_len
        self.max_len = context if max_len is None else max_len
        if not 2 <= self.max_len <= context:
            raise InputError(f"max_len: expected 2 to {context} (the model's context), found {max_len}")
        width, params = pages_for(self.max_len), placed(params)
        count = page_count(params, pages, memory, max_pages, slots * width)
        self.slots, self.max_pages, self.backend = slots, max_pages, backend
        parts = axis_size(params.mesh, DATA)
        of_all = count, slots, budget // tuning.piece, max(budget, tuning.alone) // tuning.piece
        count, slots, pieces, alone = (-(-n // parts) for n in of_all)  # of each part
        sizes = dict(slots=slots, max_len=self.max_len)
        fewer = pages is None and jax.process_count() == 1  # several processes must have as many
        self._device = Device(
            params, pages=count, fewer=fewer, width=width, pieces=alone, tuning=tuning, backend=backend, **sizes
        )
        pools = [Pages(self._device.pages, PAGE, multiple=START_MULTIPLE) for _ in range(parts)]
        how = dict(piece=tuning.piece, pieces=pieces, alone=alone, **sizes)
        self._scheduler = Parts([Scheduler(pool, steps=tuning.steps, **how) for pool in pools])
        self._handles: dict[Scheduled, Handle] = {}
        self._unread: deque[Launch] = deque()  # of the turn that runs and of the one queued behind it
        self._came: list[Event] = []  # read, and not yet returned by a step
        self._paused = self._torn = self._nan = False
        self._new_tokens, self._decode_steps, self._seconds = 0, 0, 0.0

    @property
    def params(self) -> Params:
        """The weights. They may be replaced by others of the same shapes at any time; nothing is copied or compiled.
        Later requests share no pages that the old weights wrote. Running requests keep the keys and values that they
        have, and continue with the new weights."""
        return self._device.params

    @params.setter
    def params(self, new: Params) -> None:
        new = adopted(new, self.params.mesh)
        old, found = (jax.tree.map(lambda a: (a.shape, str(a.dtype)), p) for p in (self.params, new))
        if old != found:
            raise InputError("params: expected weights of the shapes, formats and config that the engine has")
        self._device.params = new
        self._scheduler.forget()

    @property
    def busy(self) -> bool:
        """Whether any request has not ended."""
        return bool(self._handles)

    @property
    def statistics(self) -> Statistics:
        """A snapshot."""
        s = self._scheduler
        return Statistics(
            running=s.running,
            waiting=s.waiting,
            pages_used=sum(pool.count - pool.free for pool in s.pools),
            pages=sum(pool.count for pool in s.pools),
            prompt_tokens=s.total("prompt_tokens"),
            prefix_hits=s.total("hits"),
            new_tokens=self._new_tokens,
            decode_steps=self._decode_steps,
            preemptions=s.total("preemptions"),
            seconds=self._seconds,
        )

    @property
    def backends(self) -> dict[str, dict[str, Choice]]:
        """The implementation of every op of ``"prefill"`` and of ``"decode"``, as far as these have run, and why."""
        return self._device.backends

    @property
    def ways(self) -> dict[int, Choice]:
        """How a decode step runs, and why, for each number of rows that is in use: "pallas" is one launch, "ops" are
        several. See `jllama.ways`."""
        return dict(sorted(self._device.ways.items()))

    def submit(self, request: Request) -> Handle:
        """Queue a request. Raises `InputError` if it is invalid or could never fit."""
        config = self.params.config
        request.check(config)
        scoring = request.score_from is not None
        sequence = Scheduled(
            tokens=[int(t) for t in request.prompt],
            limit=0 if scoring else request.max_new_tokens,
            stop_ids=frozenset(() if scoring else request.stops(config)),
            priority=request.priority,
            salt=request.salt,
            score_from=request.score_from,
            constrained=request.constraint is not None,
        )
        progress = None if request.constraint is None else Progress(request.constraint, len(request.prompt))
        self._scheduler.add(sequence)
        handle = self._handles[sequence] = Handle(request, sequence, Completion(sequence.tokens[:]), progress)
        if (first := request.score_from) is not None:
            ids, n = sequence.tokens[first:], len(request.prompt) - first
            handle.completion = Completion(sequence.tokens[:first], ids, [0.0] * n)
            handle.completion.top_logprobs, handle.completion.greedy = [{}] * n, [False] * n
        if request.sampling.kind == "full":
            self._device.add_extras()
        return handle

    def submit_all(self, requests: Sequence[Request], n: int = 1) -> list[Handle]:
        """Queue all of these requests, ``n`` for each prompt, or none of them."""
        handles: list[Handle] = []
        try:
            for i, request in enumerate(requests):
                try:
                    handles.append(self.submit(request))
                except InputError as error:
                    raise InputError(f"prompt {i // n}: {error}") from None
        except BaseException:
            for handle in handles:
                self.abort(handle)
            raise
        return handles

    def follow(self, handles: Sequence[Handle], n: int = 1) -> Generator[list[Event]]:
        """Step until all of these requests have ended, and yield their events, a list for each step. Closing the
        iterator aborts those that have not ended."""
        place = {handle: i // n for i, handle in enumerate(handles)}
        try:
            left = deque(handles)
            while True:
                while left and left[0].finished:  # the first ones end first, so that few are looked at
                    left.popleft()
                if not left:
                    return
                if self._paused:
                    raise InputError("engine: it is paused: resume it first")
                events = [event for event in self.step() if event.handle in place]
                for event in events:
                    if event.finish_reason == "error":
                        raise InputError(f"model: prompt {place[event.handle]}: {event.handle.error}")
                yield events
        finally:
            for handle in handles:
                self.abort(handle)

    def abort(self, handle: Handle) -> None:
        """End a request now. Its completion keeps the tokens so far. A request that has ended stays as it is."""
        if not handle.finished:
            self._scheduler.finish(handle.scheduled, "abort")
            self._finish(handle)

    def pause(self) -> None:
        """Launch nothing until `resume`. `step` still reads the results of earlier launches."""
        self._paused = True

    def resume(self) -> None:
        """Launch again after `pause`."""
        self._paused = False

    def step(self) -> list[Event]:
        """Launch the next turn, so that one is queued behind the one that runs. Then wait for the next results: the
        first tokens of a turn, or those of its decode steps."""
        begin = time.perf_counter()
        if self._torn or self._device.lost:
            self._restart()
        self._torn = True  # until the end: an error or interrupt before that loses the state on the device
        while self._unread and self._unread[0].masked:  # the device runs ahead meanwhile: see `jllama.engine.masked`
            self._came += self._read(self._unread.popleft())
        before = len(self._unread)
        if sum(launch.ends for launch in self._unread) < 2:
            self._launch()
        if before:
            self._came += self._read(self._unread.popleft())
        self._torn = False
        self._seconds += time.perf_counter() - begin
        events, self._came = self._came, []
        return events

    def events(self) -> Iterator[Event]:
        """Call `step` until every request has ended, and yield the events of each step. Between two events, requests
        may be submitted and aborted."""
        while self.busy and not self._paused:
            yield from self.step()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: SamplingSettings | Sequence[SamplingSettings] | None = None,
        n: int = 1,
        stop_ids: Sequence[int] | None = None,
        constraint: Constraint | None = None,
    ) -> list[Completion]:
        """``n`` completions of every prompt, in the order of the prompts. ``sampling`` is one setting for all prompts
        or one for each. With one for all, sample i of all samples has the seed ``seed + i``. With a ``constraint``, all
        completions match its grammar."""
        if n < 1:
            raise InputError(f"n: expected at least 1, found {n}")
        settings = per_prompt(sampling, len(prompts), n)
        rows = [prompt for prompt in prompts for _ in range(n)]
        requests = [
            Request(p, max_new_tokens, s, None if stop_ids is None else tuple(stop_ids), constraint=constraint)
            for p, s in zip(rows, settings, strict=True)
        ]
        return self._run(requests, n)

    def score(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> list[Completion]:
        """The log-probabilities of given completions, one for each prompt, and for each token whether it is the
        likeliest."""
        if len(prompts) != len(completions):
            raise InputError(f"completions: expected {len(prompts)} (one a prompt), found {len(completions)}")
        pairs = zip(prompts, completions, strict=True)
        return self._run([Request([*p, *c], score_from=len(p)) for p, c in pairs], 1)

    def warm_up(
        self,
        kinds: Sequence[str] = KINDS[:3],
        *,
        constraints: bool = False,
        scores: bool = True,
        progress: bool = False,
    ) -> None:
        """Compile every step for every number of rows, in threads, so that no request waits for a compilation.
        ``kinds`` are those of `jllama.engine.steps.KINDS`, by default all but "full" (penalties, biases and the like).
        With ``constraints``, also compile the steps of turns in which a request has a constraint, and with ``scores``
        those that score prompts."""
        if "full" in kinds:
            self._device.add_extras()
        self._device.warm_up(kinds, constraints=constraints, scores=scores, progress=progress)

    @property
    def programs(self) -> set[tuple[str, int, str]]:
        """The compiled steps that were used: name, number of rows or pieces, kind of drawing."""
        return self._device.programs

    def _run(self, requests: list[Request], n: int) -> list[Completion]:
        handles = self.submit_all(requests, n)
        for _ in self.follow(handles, n):
            pass
        return [h.completion for h in handles]

    def _launch(self) -> None:
        """Plan a turn and launch it, if there is anything to do."""
        with jax.profiler.TraceAnnotation("jllama.plan"):
            plans = [] if self._paused else self._scheduler.plan()
        if any(plans):
            handles = {s: self._handles[s] for plan in plans for s in {*plan.rows, *plan.joins}}
            matchers = {s: h.progress.follow(s.tokens) for s, h in handles.items() if h.progress}
            with jax.profiler.TraceAnnotation("jllama.launch"):
                self._unread += self._device.launch(plans, {s: h.request for s, h in handles.items()}, matchers)

    def _read(self, launch: Launch) -> list[Event]:
        with jax.profiler.TraceAnnotation("jllama.read"):
            outputs, scores = fetch(launch.arrays, self.params.mesh)  # blocks
        drawn, steps = tokens_of(launch, outputs)
        self._decode_steps += steps
        events = self._read_tokens(drawn)
        pieces = [
            (piece, place, found) for g, found in zip(launch.scored, scores, strict=True) for place, piece in g.pieces
        ]
        for piece, place, found in pieces:
            self._read_scores(piece, *(array[place] for array in found))
            if piece.sequence.finish and (handle := self._handles.get(piece.sequence)):
                events.append(Event(handle, [], [], piece.sequence.finish))  # pyright: ignore[reportArgumentType]
        for s in {*drawn, *(piece.sequence for piece, _, _ in pieces)}:
            if s.finish is not None and s in self._handles:
                self._finish(self._handles[s])
        if self._nan:
            self._restart()  # the cache may hold NaN, which masks do not remove
        return [e for e in events if e.ids or e.finish_reason]

    def _read_tokens(self, drawn: dict[Scheduled, Tokens]) -> list[Event]:
        events: list[Event] = []
        for s, new in drawn.items():
            handle = self._handles.get(s)
            if handle is None or self._broken(s, new.logprobs):
                s.unread -= 1
                events += [Event(handle, [], [], "error")] if handle is not None else []
                continue
            self._scheduler.read(s, new.ids)
            if handle.progress:
                self._check_constraint(s, handle.progress, len(new.ids))
            completion, asked = handle.completion, handle.request.sampling.top_logprobs
            completion.ids += new.ids
            completion.logprobs += new.logprobs
            self._new_tokens += len(new.ids)
            pairs = ([a[:asked].tolist() for a in pair] for pair in new.top) if asked else ()
            top = [dict(zip(*pair, strict=True)) for pair in pairs]
            completion.top_logprobs += top
            events.append(Event(handle, new.ids, new.logprobs, s.finish, top))  # pyright: ignore[reportArgumentType]
        return events

    def _read_scores(self, piece: Piece, logprobs: np.ndarray, best: np.ndarray, values: np.ndarray) -> None:
        s, handle = piece.sequence, self._handles.get(piece.sequence)
        if handle is not None and not self._broken(s, logprobs[: piece.count]):
            assert s.score_from is not None
            for i in range(max(0, s.score_from - piece.start - 1), piece.count):
                place = piece.start + 1 + i - s.score_from
                handle.completion.logprobs[place] = float(logprobs[i])
                handle.completion.greedy[place] = bool(best[i] == handle.completion.ids[place])
                handle.completion.top_logprobs[place] = {int(best[i]): float(values[i])}
        self._scheduler.read_scores(s, 1)

    def _broken(self, sequence: Scheduled, logprobs: Sequence[float] | np.ndarray) -> bool:
        if not np.isnan(logprobs).any():
            return False
        self._scheduler.finish(sequence, "error")
        self._nan = True
        return True

    def _check_constraint(self, sequence: Scheduled, progress: Progress, count: int) -> None:
        """End a text that its grammar ends, or in which no token may come next."""
        done = progress.follow(sequence.tokens).done
        if progress.error is not None:
            self._scheduler.finish(sequence, "error")
            sequence.finish = "error"
        elif not count:
            self._scheduler.finish(sequence, "dead_end")
        elif done:
            self._scheduler.finish(sequence, "stop")
            sequence.finish = "stop"  # also if it has just reached its limit

    def _finish(self, handle: Handle) -> None:
        handle.completion.finish_reason = handle.scheduled.finish  # pyright: ignore[reportAttributeAccessIssue]
        self._handles.pop(handle.scheduled, None)

    def _restart(self) -> None:
        """Start with an empty cache: running requests are computed again."""
        self._nan = False
        self._unread.clear()
        self._scheduler.restart()
        self._device.reset(extras=any(h.request.sampling.kind == "full" for h in self._handles.values()))

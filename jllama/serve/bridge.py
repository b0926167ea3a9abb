"""The engine in a thread of its own, and how the event loop talks to it.

Commands go in through a queue. The results of a step go out in one call to the event loop, whatever the number of rows.
The event loop never waits for a device, and the engine never waits for a client. But both need the interpreter's lock,
and to send an event costs the event loop much more than a token in it does. So a `Group` gathers progress for a while.
"""

import asyncio
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from jax.errors import JaxRuntimeError

from jllama.engine.engine import Engine
from jllama.engine.request import Completion, Event, FinishReason, Handle, Request
from jllama.engine.shared import Leader
from jllama.engine.statistics import Statistics
from jllama.errors import InputError


@dataclass(frozen=True)
class Progress:
    """The results of a step, or of several, for one row of a group."""

    row: int
    ids: list[int]
    logprobs: list[float]
    top: list[dict[int, float]]  # of each id, the likeliest tokens, where asked for
    finish: FinishReason | None = None
    error: str | None = None  # with finish "error": why
    scored: Completion | None = None  # of a row that is only scored, at its end


FAILED = ("error", "dead_end")  # finish reasons of rows whose request gets an error
LATE = 0.05  # seconds


def joined(parts: Iterable[Progress]) -> list[Progress]:
    """The same results with those of each row in one, in the order in which rows first come. A row that has failed has
    a last one of its own, so that what was drawn before can be told first."""
    rows: dict[tuple[int, bool], list[Progress]] = {}
    for one in parts:
        rows.setdefault((one.row, one.finish in FAILED), []).append(one)
    return [some[0] if len(some) == 1 else _one(some) for some in rows.values()]


def _one(parts: list[Progress]) -> Progress:
    ids = [token for part in parts for token in part.ids]
    logprobs = [logprob for part in parts for logprob in part.logprobs]
    top = [likeliest for part in parts for likeliest in part.top]
    return replace(parts[-1], ids=ids, logprobs=logprobs, top=top)


class Group:
    """The rows of one HTTP request. ``accepted`` says whether the engine took them; `take` then gives their progress.

    A row's first and last progress can be taken at once. Between them, progress that comes within ``hold()`` seconds
    after the last was released is held, and joined. It is released with the first progress after that time, so that
    the event loop sends to many groups in one go, or `LATE` seconds after it, if a turn takes so long. The methods are
    called in the event loop's thread."""

    def __init__(self, requests: Sequence[Request], hold: Callable[[], float] = lambda: 0.0) -> None:
        self.requests = requests
        self.loop = asyncio.get_running_loop()
        self.accepted: asyncio.Future[None] = self.loop.create_future()
        self.handles: list[Handle] = []  # of the engine's thread
        self._hold, self._arrived, self._begun = hold, list[Progress](), set[int]()
        self._due = 0.0  # until then, progress is held
        self._waits = False  # whether `_late` will be called
        self._taker: asyncio.Future[None] | None = None
        self._released = False

    def put(self, progress: Progress) -> None:
        """Add the results of a step."""
        self._arrived.append(progress)
        now = self.loop.time()
        if progress.finish is not None or progress.row not in self._begun or now >= self._due:
            self._begun.add(progress.row)
            self._due = now + self._hold()
            self._release()
        elif not self._waits:
            self._wait()

    async def take(self) -> list[Progress]:
        """Wait for progress, and return all that there is: at most two results of each row."""
        if not self._released:
            self._taker = self.loop.create_future()
            await self._taker
        arrived, self._arrived, self._released = self._arrived, [], False
        return joined(arrived)

    def _wait(self) -> None:
        self._waits = True
        self.loop.call_at(self._due + LATE, self._late)

    def _late(self) -> None:
        self._waits = False
        if self._arrived and self.loop.time() < self._due + LATE:  # others were released since
            self._wait()
        elif self._arrived:
            self._release()

    def _release(self) -> None:
        self._released = True
        if self._taker is not None and not self._taker.done():
            self._taker.set_result(None)


type Message = tuple[Group, Progress | InputError | None]
type Command = Callable[[], None]


class EngineThread:
    """Owns an engine from `start` to `stop`. If the thread dies of an error, every group gets an error, and
    ``on_death`` is called in that thread."""

    def __init__(self, engine: Engine | Leader, on_death: Callable[[], None] = lambda: None) -> None:
        self.statistics: Statistics = engine.statistics  # a snapshot of the last step's end
        self.alive = False
        self.on_death = on_death
        self._engine = engine
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._rows: dict[Handle, tuple[Group, int]] = {}
        self._out: list[Message] = []
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self.alive = True
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the current step, and wait for it. Requests that still run get no more tokens."""
        self._commands.put(self._stop)
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, group: Group) -> None:
        """Submit a group: all of its rows, or none."""
        self._commands.put(lambda: self._submit(group))
        if not self.alive:  # died meanwhile: nobody reads commands any more
            self._fail(group)

    def abort(self, group: Group, row: int | None = None) -> None:
        """End one row, or all; it leaves before the next step begins. Rows that have ended stay as they are."""
        self._commands.put(lambda: self._abort(group, row))

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._obey()
                if self._engine.busy:
                    self._step()
                self.statistics = self._engine.statistics
                self._send()
            self.alive = False
        finally:  # no handler: the error itself goes to threading.excepthook
            if self.alive:
                self.alive = False
                self._send()
                for group in {id(group): group for group, _ in self._rows.values()}.values():
                    self._fail(group)
                self.on_death()

    def _obey(self) -> None:
        """Carry out the commands in the queue. If the engine has nothing to do, wait for one."""
        try:
            if not self._engine.busy:
                self._commands.get()()
            while True:
                self._commands.get_nowait()()
        except queue.Empty:
            return

    def _stop(self) -> None:
        self._stopping = True

    def _submit(self, group: Group) -> None:
        try:
            group.handles = self._engine.submit_all(group.requests)
        except InputError as error:
            self._out.append((group, error))
            return
        self._rows |= {handle: (group, row) for row, handle in enumerate(group.handles)}
        self._out.append((group, None))

    def _abort(self, group: Group, row: int | None) -> None:
        for handle in group.handles if row is None else group.handles[row : row + 1]:
            self._engine.abort(handle)
            self._rows.pop(handle, None)

    def _step(self) -> None:
        try:
            events = self._engine.step()
        except JaxRuntimeError as error:
            if not self._shed(error):
                raise
            return
        self._out += [message for event in events if (message := self._message(event)) is not None]

    def _shed(self, error: RuntimeError) -> bool:
        """After a step that failed, for example for lack of memory, end the newest running row. The engine computes the
        others again. False if nothing runs."""
        running = [handle for handle in self._rows if handle.scheduled.slot is not None]
        if not running:
            return False
        newest = max(running, key=lambda handle: handle.scheduled.order)
        group, row = self._rows.pop(newest)
        self._engine.abort(newest)
        why = f"the device failed: {str(error).splitlines()[0][:200]}"
        self._out.append((group, Progress(row, [], [], [], "error", why)))
        return True

    def _message(self, event: Event) -> Message | None:
        found = self._rows.get(event.handle)
        if found is None:
            return None
        if event.finish_reason is not None:
            del self._rows[event.handle]
        (group, row), handle = found, event.handle
        scored = handle.completion if handle.request.score_from is not None else None
        return group, Progress(row, event.ids, event.logprobs, event.top, event.finish_reason, handle.error, scored)

    def _fail(self, group: Group) -> None:
        why = "the engine has died; the server ends"
        rows = range(len(group.requests))
        _post([(group, InputError(why)), *((group, Progress(row, [], [], [], "error", why)) for row in rows)])

    def _send(self) -> None:
        messages, self._out = self._out, []
        _post(messages)


def _post(messages: list[Message]) -> None:
    """Give each event loop all of its progress in one call."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Message]] = {}
    for message in messages:
        by_loop.setdefault(message[0].loop, []).append(message)
    for loop, some in by_loop.items():
        if not loop.is_closed():
            loop.call_soon_threadsafe(_deliver, some)


def _deliver(messages: list[Message]) -> None:
    for group, what in messages:
        if isinstance(what, Progress):
            group.put(what)
        elif group.accepted.done():  # its client has left, or the engine failed after it had accepted the group
            continue
        elif what is None:
            group.accepted.set_result(None)
        else:
            group.accepted.set_exception(what)

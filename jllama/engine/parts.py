"""One queue for several parts of the slots and pages, one part for each place along the axis ``data`` of a mesh.

Each part has a `Scheduler` of its own, because a row can only use pages that lie where it does. A request waits here
until a part has room for it. It goes to the part that holds most of its prompt, or else has least to do. The choice
depends on nothing but the requests and their order, so it is the same on every host.
"""

import bisect
from collections.abc import Sequence as Ordered

from jllama.engine.pages import Pages
from jllama.engine.scheduler import Plan, Scheduler, Sequence, order


class Parts:
    """Several schedulers of equal size, used like one."""

    def __init__(self, schedulers: list[Scheduler]) -> None:
        self._parts = schedulers
        self._queue: list[Sequence] = []  # the next first
        self._arrivals = 0

    @property
    def running(self) -> int:
        """How many sequences have a slot."""
        return sum(len(part.running) for part in self._parts)

    @property
    def waiting(self) -> int:
        """How many sequences have no slot yet."""
        return len(self._queue) + sum(len(part.waiting) for part in self._parts)

    @property
    def pools(self) -> list[Pages]:
        """The pages of every part."""
        return [part.pages for part in self._parts]

    def total(self, counter: str) -> int:
        """The sum of a counter of all parts: ``hits``, ``prompt_tokens`` or ``preemptions``."""
        return sum(getattr(part, counter) for part in self._parts)

    def add(self, sequence: Sequence) -> None:
        """Put a request in the queue, or refuse at once what could never run."""
        self._parts[0].check(sequence)
        sequence.order = order(self._arrivals, sequence.priority)
        self._arrivals += 1
        more = self.running > 0
        for part in self._parts:
            part.expect(more=more)
        bisect.insort(self._queue, sequence, key=lambda s: s.order)

    def plan(self) -> list[Plan]:
        """The next turn of every part."""
        while self._queue and (part := self._next_part(self._queue[0])) is not None:
            sequence = self._queue.pop(0)
            sequence.part = part
            self._parts[part].enqueue(sequence)
        return [part.plan() for part in self._parts]

    def read(self, sequence: Sequence, tokens: Ordered[int]) -> list[int]:
        """As `Scheduler.read`."""
        return self._of(sequence).read(sequence, tokens)

    def read_scores(self, sequence: Sequence, pieces: int) -> None:
        """As `Scheduler.read_scores`."""
        self._of(sequence).read_scores(sequence, pieces)

    def finish(self, sequence: Sequence, reason: str) -> None:
        """As `Scheduler.finish`."""
        if sequence.part is not None:
            self._parts[sequence.part].finish(sequence, reason)
        elif sequence.finish is None:
            sequence.finish = reason
            self._queue.remove(sequence)

    def forget(self) -> None:
        """As `Scheduler.forget`."""
        for part in self._parts:
            part.forget()

    def restart(self) -> None:
        """As `Scheduler.restart`."""
        for part in self._parts:
            part.restart()

    def _of(self, sequence: Sequence) -> Scheduler:
        assert sequence.part is not None
        return self._parts[sequence.part]

    def _next_part(self, sequence: Sequence) -> int | None:
        """The part that takes a request; None if all are full. A full part has one waiting request, so that its turns
        are short. If there is only one part, all requests wait there."""
        room = [i for i, part in enumerate(self._parts) if part.load <= part.slots or len(self._parts) == 1]
        return min(room, key=lambda i: (-self._parts[i].held(sequence), self._parts[i].load, i), default=None)

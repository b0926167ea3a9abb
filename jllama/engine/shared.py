"""One engine that several processes run together, of which process 0 takes requests.

The scheduler is plain Python, and decides the same from the same requests. So process 0 only tells the others what it
does with its engine: it submits, aborts, takes a step. The others do the same, each with its own devices. It tells them
before it does it, because arrays that all have a part of are made by all together, for instance by a submit.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

from jllama.engine.constraint import Constraint
from jllama.engine.engine import Engine
from jllama.engine.request import Event, Handle, Request, SamplingSettings
from jllama.engine.statistics import Statistics
from jllama.errors import InputError

Constraints = Callable[[str], Constraint]  # from the source of a constraint


class Leader:
    """The engine of process 0. ``tell`` sends bytes to all others, in order. Constraints must have a ``source``."""

    def __init__(self, engine: Engine, tell: Callable[[bytes], None]) -> None:
        self._engine, self._tell = engine, tell
        self._numbers: dict[Handle, int] = {}  # of requests that run; the others count alike
        self._count = 0

    @property
    def busy(self) -> bool:
        """See `Engine.busy`."""
        return self._engine.busy

    @property
    def statistics(self) -> Statistics:
        """See `Engine.statistics`."""
        return self._engine.statistics

    def submit_all(self, requests: Sequence[Request]) -> list[Handle]:
        """See `Engine.submit_all`. The others submit also what is refused: a refusal may leave traces in the state."""
        self._say("submit", [_encoded(request) for request in requests])
        handles = self._engine.submit_all(requests)
        self._numbers |= {handle: self._count + i for i, handle in enumerate(handles)}
        self._count += len(handles)
        return handles

    def abort(self, handle: Handle) -> None:
        """See `Engine.abort`."""
        if (number := self._numbers.pop(handle, None)) is not None:
            self._say("abort", number)
        self._engine.abort(handle)

    def step(self) -> list[Event]:
        """See `Engine.step`."""
        self._say("step")
        events = self._engine.step()
        for event in events:
            if event.finish_reason is not None:
                self._numbers.pop(event.handle, None)
        return events

    def close(self) -> None:
        """Let the others end."""
        self._tell(b"")

    def _say(self, what: str, value: Any = None) -> None:
        self._tell(json.dumps([what, value]).encode())


def follow(engine: Engine, hear: Callable[[], bytes], constraint_of: Constraints) -> None:
    """Do in another process what process 0 does, until it ends. ``hear`` waits for what it tells next."""
    handles: dict[int, Handle] = {}
    count = 0
    while message := hear():
        what, value = json.loads(message)
        if what == "step":
            engine.step()
            handles = {number: handle for number, handle in handles.items() if not handle.finished}
        elif what == "abort":
            if (handle := handles.pop(value, None)) is not None:  # else it has just ended
                engine.abort(handle)
        else:
            # Process 0 has compiled these grammars. If one fails here, this process cannot do the same: it must end.
            requests = [_decoded(request, constraint_of) for request in value]
            try:
                taken = engine.submit_all(requests)
            except InputError:  # as in process 0, which tells its client
                continue
            handles |= {count + i: handle for i, handle in enumerate(taken)}
            count += len(taken)


def _encoded(request: Request) -> dict[str, Any]:
    fields = vars(request) | {"prompt": [int(token) for token in request.prompt]}
    settings = vars(request.sampling) | {"logit_bias": list(request.sampling.logit_bias.items())}
    constraint: Any = request.constraint
    return fields | {"sampling": settings, "constraint": None if constraint is None else constraint.source}


def _decoded(fields: dict[str, Any], constraint_of: Constraints) -> Request:
    settings = fields["sampling"] | {"logit_bias": dict(fields["sampling"]["logit_bias"])}
    source = fields["constraint"]
    constraint = None if source is None else constraint_of(source)
    return Request(**fields | {"sampling": SamplingSettings(**settings), "constraint": constraint})

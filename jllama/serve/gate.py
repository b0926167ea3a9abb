"""Who is let in: a bounded number of rows and of bytes, and nobody while the server drains."""

import asyncio
from dataclasses import dataclass, field

from jllama.serve.errors import ApiError


@dataclass
class Gate:
    """Counts the rows and the bodies' bytes of all requests that are answered; at most so many at a time."""

    limit: int
    bytes_limit: int
    rows: int = 0
    bytes: int = 0
    draining: bool = False
    empty: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.empty.set()

    def check(self) -> None:
        """Raise `ApiError` while the server drains."""
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down")

    def enter(self, rows: int) -> None:
        """Let a request in, or raise `ApiError`."""
        self.check()
        if self.rows + rows > self.limit:
            message = f"the queue is full: expected at most {self.limit} texts at a time, found {self.rows} and {rows}"
            raise ApiError(429, message, code="queue_full")
        self.rows += rows
        self.empty.clear()

    def take(self, count: int) -> None:
        """Count bytes of a body that has come, or raise `ApiError`."""
        if self.bytes + count > self.bytes_limit:
            raise ApiError(429, "the server reads too many requests at a time", code="busy")
        self.bytes += count

    def give_back(self, count: int) -> None:
        """Bytes of a body are no longer held."""
        self.bytes -= count

    def leave(self, rows: int) -> None:
        """Those of a request are answered."""
        self.rows -= rows
        if self.rows == 0:
            self.empty.set()

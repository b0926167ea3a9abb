"""Admission of requests: a bounded number of rows and of bytes, and none while the server drains."""

import asyncio
from dataclasses import dataclass, field

from jllama.serve.errors import ApiError


@dataclass
class Gate:
    """Counts the rows and body bytes of all requests that are being answered, and bounds both."""

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
        """Admit a request, or raise `ApiError`."""
        self.check()
        if self.rows + rows > self.limit:
            message = f"the queue is full: expected at most {self.limit} texts at a time, found {self.rows} and {rows}"
            raise ApiError(429, message, code="queue_full")
        self.rows += rows
        self.empty.clear()

    def take(self, count: int) -> None:
        """Count received bytes of a body, or raise `ApiError`."""
        if self.bytes + count > self.bytes_limit:
            raise ApiError(429, "the server reads too many requests at a time", code="busy")
        self.bytes += count

    def give_back(self, count: int) -> None:
        """Release the bytes of a body."""
        self.bytes -= count

    def leave(self, rows: int) -> None:
        """Release the rows of a request that has been answered."""
        self.rows -= rows
        if self.rows == 0:
            self.empty.set()

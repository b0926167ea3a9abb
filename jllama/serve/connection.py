"""Uvicorn's connection, with bounds that it lacks: on the time for a request's head, on the time in which a client
takes what is sent, and on the number of connections."""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 20.0  # limit for a request's head, from its first byte or from the start of the connection
WRITE_SECONDS = 60.0  # limit within which a client must read some of its data
MAX_CONNECTIONS = 8192


class Connection(H11Protocol):
    """Closes the connection of a client that sends its head too slowly or does not read its answer. Refuses clients
    beyond `MAX_CONNECTIONS`."""

    head_seconds = HEAD_SECONDS
    write_seconds = WRITE_SECONDS
    max_connections = MAX_CONNECTIONS
    _timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Called when a client has connected."""
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            transport.close()
        else:
            self._timer = self.loop.call_later(self.head_seconds, transport.close)

    def data_received(self, data: bytes) -> None:
        """Called with bytes from the client. The clock runs while a head is not complete."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._disarm()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.head_seconds, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """Called when the client has disconnected."""
        self._disarm()
        self._taken()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """The bytes are not valid HTTP. An answer to an earlier request on this connection is cut off."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()

    def pause_writing(self) -> None:
        """Too much data waits for the client. If it does not read in time, abort: `close` would wait for it."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has read most of the data."""
        super().resume_writing()
        self._taken()

    def _taken(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

"""Engines under mixed traffic: the part that ours and others' share."""

from typing import Any

from bench.traffic import Server, Traffic, draw, drive, rehearsals


class UnderTraffic:
    """An engine as a peer. It has seen every number of rows before it is timed."""

    def __init__(self, server: Server, job: dict[str, Any], settings: dict[str, Any]) -> None:
        self.server, self.settings, self._job = server, settings, job
        for asks in rehearsals(Traffic(**job["traffic"]), job["batch"], job["budget"]):
            drive(server, asks)

    def traffic(self, **fields: Any) -> dict[str, Any]:
        """The `Timeline.summary` of a `Traffic`."""
        asks = draw(Traffic(**fields), self._job["vocab_size"], self._job["bos_id"])
        return drive(self.server, asks).summary()

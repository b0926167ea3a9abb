"""jllama's engine under mixed traffic, stepped in this process."""

from typing import Any

from bench.peers import Peer
from bench.peers._traffic import UnderTraffic
from bench.peers.ours import PACKAGES, available
from bench.peers.ours_engine import OursEngine
from bench.traffic import Ask
from bench.workloads import SEED


class Server:
    """`jllama.Engine` as a `bench.traffic.Server`."""

    def __init__(self, engine: Any, temperature: float) -> None:
        self._engine, self._temperature = engine, temperature
        self._texts: dict[Any, int] = {}

    @property
    def busy(self) -> bool:
        """Whether any text has not ended."""
        return self._engine.busy

    def submit(self, text: int, ask: Ask) -> None:
        """Take a prompt."""
        from jllama.engine.request import Request, SamplingSettings

        for i in range(text, text + ask.samples):
            how = SamplingSettings(temperature=self._temperature, seed=SEED + i)
            self._texts[self._engine.submit(Request(ask.prompt, ask.new_tokens, how, stop_ids=()))] = i

    def step(self) -> list[tuple[int, int]]:
        """One turn."""
        events = self._engine.step()
        came = [(self._texts[event.handle], len(event.ids)) for event in events]
        for event in events:
            if event.finish_reason is not None:
                del self._texts[event.handle]
        return came


class OursUnderTraffic(UnderTraffic):
    """It also says how many programs were compiled while it was timed, which should be none, and what the cache did."""

    def __init__(self, job: dict[str, Any]) -> None:
        from jllama.engine.request import SamplingSettings

        ours = OursEngine(job)
        self.engine = ours.engine
        self.engine.warm_up([SamplingSettings(job["traffic"]["temperature"]).kind], scores=False)
        super().__init__(Server(self.engine, job["traffic"]["temperature"]), job, ours.settings)
        self.settings |= {"pages": self.engine.statistics.pages}

    def traffic(self, **fields: Any) -> dict[str, Any]:
        """The summary of a `Traffic`."""
        before, programs = self.engine.statistics, len(self.engine.programs)
        found, after = super().traffic(**fields), self.engine.statistics
        counted = {k: getattr(after, k) - getattr(before, k) for k in ("prompt_tokens", "prefix_hits", "preemptions")}
        return found | {"counted": counted | {"compiled": len(self.engine.programs) - programs}}


PEER = Peer("engine", "traffic", available, OursUnderTraffic, PACKAGES)

"""Mixed traffic: seeded requests with the times at which they arrive, and what the times of their tokens say.

Every implementation draws the same requests from the same `Traffic`. Nothing heavy is imported here.
"""

import itertools
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from bench.measure import stats_dict
from bench.workloads import SEED

SIGMA = 0.7  # of the logarithm of a prompt's length: one prompt in six has twice the median, or half of it
CAPACITY = 0.8  # of what all at once reach: the rate of Poisson arrivals


@dataclass(frozen=True)
class Traffic:
    """``requests`` texts are drawn, ``samples`` for each prompt. Prompts have log-normal lengths around ``prompt``, and
    ``prefix`` more tokens that all share. New tokens are uniform from ``least`` to ``most``."""

    name: str  # another name: the same lengths, but other tokens, so that no cache knows them
    requests: int
    prompt: int
    longest: int
    least: int
    most: int
    samples: int = 1
    prefix: int = 0
    rate: float | None = None  # requests a second, as a Poisson process; None: all at once
    temperature: float = 1.0

    @property
    def context(self) -> int:
        """The most tokens that a text may have with its prompt."""
        return self.prefix + self.longest + self.most

    def at_rate(self, rate: float, requests: int | None = None) -> "Traffic":
        """The same lengths as a Poisson process, of the first ``requests`` texts (default: of all)."""
        return replace(self, name=f"{self.name}-poisson", rate=rate, requests=requests or self.requests)


@dataclass(frozen=True)
class Ask:
    """One prompt: when it arrives, in seconds, and what it asks for."""

    at: float
    prompt: list[int]
    new_tokens: int
    samples: int = 1


def draw(traffic: Traffic, vocab_size: int, bos_id: int) -> list[Ask]:
    """The prompts in the order of their arrival."""
    lengths, tokens, times = (random.Random(f"{SEED} {of}") for of in ("lengths", traffic.name, "times"))

    def ids(count: int) -> list[int]:
        return [tokens.randrange(3, vocab_size) for _ in range(count)]

    prefix, at, asks = [bos_id, *ids(traffic.prefix)], 0.0, []
    for _ in range(-(-traffic.requests // traffic.samples)):
        length = min(traffic.longest, max(2, round(lengths.lognormvariate(math.log(traffic.prompt), SIGMA))))
        new = lengths.randint(traffic.least, traffic.most)
        if traffic.rate is not None:
            at += times.expovariate(traffic.rate / traffic.samples)
        asks.append(Ask(at, [*prefix, *ids(length - 1)], new, traffic.samples))
    return asks


class Timeline:
    """When the tokens of every text came. Text ``i * samples + k`` is sample k of prompt i."""

    def __init__(self, asks: Sequence[Ask]) -> None:
        self.asked = [ask for ask in asks for _ in range(ask.samples)]
        self.came: list[list[tuple[float, int]]] = [[] for _ in self.asked]  # of each text: when, and how many
        self.begin = time.perf_counter()

    @property
    def now(self) -> float:
        """Seconds since the begin."""
        return time.perf_counter() - self.begin

    def add(self, text: int, count: int) -> None:
        """``count`` tokens of a text came now."""
        if count:
            self.came[text].append((self.now, count))

    def summary(self) -> dict[str, Any]:
        """What a run gave: its tokens and its seconds, and statistics of three times in seconds. These are the time to
        the first token, the time between two tokens, and the longest wait of each text. Tokens that come together
        share the time since the tokens before them. Raises ValueError if a text has not as many as asked for."""
        for i, (ask, came) in enumerate(zip(self.asked, self.came, strict=True)):
            if (found := sum(n for _, n in came)) != ask.new_tokens:
                raise ValueError(f"text {i}: expected {ask.new_tokens} tokens, found {found}")
        tokens, end = sum(ask.new_tokens for ask in self.asked), max(came[-1][0] for came in self.came)
        begin = min(ask.at for ask in self.asked)
        first = [came[0][0] - ask.at for ask, came in zip(self.asked, self.came, strict=True)]
        # Tokens that came with a text's first one have no time of their own.
        waits = [[(b - a, n) for (a, _), (b, n) in itertools.pairwise(came)] for came in self.came]
        between = [wait / n for of_text in waits for wait, n in of_text for _ in range(n)]
        longest = [max(wait for wait, _ in of_text) for of_text in waits if of_text]
        figures = {"first": first, "between": between, "longest": longest}
        return {
            "tokens": tokens,
            "texts": len(self.asked),
            "seconds": end - begin,
            **{name: stats_dict(samples) if samples else None for name, samples in figures.items()},
        }


class Server(Protocol):
    """What texts are asked of: an engine that the caller's loop steps."""

    @property
    def busy(self) -> bool:
        """Whether any text has not ended."""
        ...

    def submit(self, text: int, ask: Ask) -> None:
        """Submit a prompt. Its samples are numbered ``text``, ``text + 1`` and so on."""
        ...

    def step(self) -> list[tuple[int, int]]:
        """One turn: which texts got tokens, and how many."""
        ...


def drive(server: Server, asks: Sequence[Ask]) -> Timeline:
    """Submit every prompt when it is due, and step until all texts have ended."""
    timeline, waiting, text = Timeline(asks), list(reversed(asks)), 0
    while waiting or server.busy:
        while waiting and waiting[-1].at <= timeline.now:
            server.submit(text, waiting[-1])
            text += waiting.pop().samples
        if server.busy:
            for which, count in server.step():
                timeline.add(which, count)
        else:
            time.sleep(max(0.0, waiting[-1].at - timeline.now))
    return timeline


def repeated(traffic: Traffic, runs: int) -> list[Traffic]:
    """A traffic for each of ``runs`` runs, whose prompts no cache knows from the run before."""
    return [replace(traffic, name=f"{traffic.name} {i}") for i in range(runs)]


def rehearsals(traffic: Traffic, slots: int, budget: int, new_tokens: int = 8) -> list[list[Ask]]:
    """What an engine does before it is timed, so that everything is compiled: 1, 2, 4 … texts at once, whose prompts
    are found in the cache from the second time on, then prompts of every size, and as many of the longest as a turn may
    feed. Each text has ``new_tokens``, or the traffic's most if that is less. The default is enough where texts are
    submitted together; where they come one after the other, the first must last until the last has come."""
    body, new = random.Random(f"{SEED} rehearsal"), min(new_tokens, traffic.most)

    def ask(length: int) -> Ask:
        return Ask(0.0, [body.randrange(3, 64) for _ in range(length)], new)

    sizes, short = sorted({*(1 << i for i in range(slots.bit_length())), slots}), ask(24)
    long = min(slots, -(-budget // traffic.longest))
    halves = [[ask(traffic.longest >> i)] for i in range(traffic.longest.bit_length() - 1) if traffic.longest >> i > 32]
    return [*([short] * n for n in sizes), *halves, [ask(traffic.prefix + traffic.longest) for _ in range(long)]]

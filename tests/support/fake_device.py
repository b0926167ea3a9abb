"""A fake of the engine's device in plain Python. A page is a list of tokens, and the next token of a text is a function
of all tokens in its pages. So any confusion of pages by the scheduler gives another text."""

from collections.abc import Sequence as Ordered
from itertools import pairwise

from jllama.engine.scheduler import Plan, Scheduler, Sequence

VOCAB = 50


def next_token(tokens: Ordered[int]) -> int:
    """The fake model: greedy, and its next token depends on every token and its position."""
    mixed = 17
    for token in tokens:
        mixed = (mixed * 31 + token + 7) % 1_000_003
    return mixed % VOCAB


def alone(prompt: list[int], limit: int, stop_ids: frozenset[int] = frozenset()) -> list[int]:
    """The tokens of a request that runs alone."""
    drawn: list[int] = []
    while len(drawn) < limit and not (drawn and drawn[-1] in stop_ids):
        drawn.append(next_token(prompt + drawn))
    return drawn


class FakeDevice:
    """Runs plans in order, and returns each result one plan later, as the engine reads them."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.memory = [[-1] * scheduler.pages.size for _ in range(scheduler.pages.count)]
        self.rows: dict[int, list] = {}  # slot: [sequence, position, last token, drawn, done]
        self.unread: list[tuple[Sequence, list[int]]] = []
        self.ahead: set[Sequence] = set()
        self.masked = False  # whether the tokens of the last plan come before the next one, as the engine does it
        self.fed = 0  # tokens of prompts

    def turn(self) -> bool:
        """One turn of the engine. Returns whether it did any work."""
        before, self.unread = self.unread, []
        if self.masked:
            self.take(before)
        plan = self.scheduler.plan()
        self.check()
        self.unread = self.run(plan) if plan else []
        if not self.masked:
            self.take(before)
        self.masked = bool(plan.rows) and not plan.steps
        return bool(plan) or bool(before)

    def take(self, drawn: list[tuple[Sequence, list[int]]]) -> None:
        for sequence, tokens in drawn:
            self.scheduler.read(sequence, tokens)

    def run(self, plan: Plan) -> list[tuple[Sequence, list[int]]]:
        for source, target in plan.copies:
            self.memory[target] = list(self.memory[source])
        for piece in plan.pieces:
            self.fed += piece.count
            for at in range(piece.start, piece.start + piece.count):
                self.write(piece.sequence, at, piece.sequence.tokens[at])
        for s in plan.joins:
            self.rows[s.slot] = [s, len(s.tokens) - 1, s.tokens[-1], len(s.tokens) - s.prompt, False]
        out: list[tuple[Sequence, list[int]]] = []
        for s in plan.firsts:
            row = self.rows[s.slot]
            assert row[0] is s, "it has joined"
            _, position, _, drawn, _ = row
            token = next_token(self.read(s, position + 1))
            row[1:] = [position + 1, token, drawn + 1, token in s.stop_ids or drawn + 1 == s.limit]
            out.append((s, [token]))
        assert plan.steps in (0, *self.scheduler.steps)
        for s in plan.rows:
            row = self.rows[s.slot]
            assert row[0] is s, "a row runs in the slot that it joined"
            tokens: list[int] = []
            for _ in range(plan.steps or 1):
                _, position, token, drawn, done = row
                if plan.steps:
                    self.write(s, position, token)  # a finished row writes after its end
                else:
                    assert s in self.ahead, "its last token is fed"
                    self.ahead.discard(s)
                if done:
                    continue
                token = next_token(self.read(s, position + 1))
                tokens.append(token)
                row[1:] = [position + 1, token, drawn + 1, token in s.stop_ids or drawn + 1 == s.limit]
            out.append((s, tokens))
        for s in plan.ahead:
            row = self.rows[s.slot]
            assert row[0] is s
            self.write(s, row[1], row[2])
            self.ahead.add(s)
        return out

    def write(self, s: Sequence, at: int, token: int) -> None:
        page, place = divmod(at, self.scheduler.pages.size)
        if page < len(s.pages):
            self.memory[s.pages[page]][place] = token

    def read(self, s: Sequence, count: int) -> list[int]:
        return [t for page in s.pages for t in self.memory[page]][:count]

    def check(self) -> None:
        """Check that a page's count of users is the number of sequences that name it, that no page is lost, and that no
        slot is held twice."""
        scheduler = self.scheduler
        named: dict[int, int] = {}
        for s in scheduler.running:
            assert len(set(s.pages)) == len(s.pages)
            for page in s.pages:
                named[page] = named.get(page, 0) + 1
        assert {p: n for p, n in enumerate(scheduler.pages._users) if n} == named
        assert scheduler.pages.free == scheduler.pages.count - len(named)
        slots = [s.slot for s in scheduler.running]
        assert len(set(slots)) == len(slots) <= scheduler.slots
        assert sorted(slots + scheduler._slots) == list(range(scheduler.slots))
        for queue in (scheduler.running, scheduler.waiting):
            assert all(a.order <= b.order for a, b in pairwise(queue))

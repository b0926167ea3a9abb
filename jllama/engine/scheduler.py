"""Who runs next: plain Python, no tensors, no device, the same decisions for the same arrivals on every host.

A turn of the engine is one `Plan`: copies of pages, pieces of prompts within a budget of tokens, rows that begin to
draw, and a few decode steps of all rows that draw. The piece that ends a prompt gives the logits from which the first
token is drawn. If only the last token of a prompt is not in the cache, a decode step feeds it and draws what follows:
a prompt that the pool holds needs no prefill at all. A request that was preempted comes back in the same way as a new
one.

Plans run ahead of results. How many tokens a row will have drawn is known beforehand, unless it draws a stop token. A
row that has stopped draws nothing more on the device. Its pages become free when the host reads the stop token. A
launch that reuses them comes later, and launches run in order.
"""

import bisect
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field

from jllama.engine.pages import Pages, root
from jllama.errors import InputError

RESERVE = 4  # one of this many rows needs a new page in the next turn: 16 steps a turn, 64 positions a page
OVERTAKE = 64  # how many later requests overtake one whose priority is lower by 1
EXPECT = 128  # decode steps after a request has come in which another is expected: about a second


def order(arrivals: int, priority: int) -> int:
    """The sort key in the queue of a request that comes after ``arrivals`` others."""
    return arrivals - OVERTAKE * priority


@dataclass(eq=False)
class Sequence:
    """One prompt, and the tokens drawn after it."""

    tokens: list[int]  # of the prompt, and all drawn tokens that have been read back
    limit: int  # how many may be drawn; 0: its tokens are only scored
    stop_ids: frozenset[int] = frozenset()
    priority: int = 0
    salt: str = ""
    score_from: int | None = None  # the first token whose probability is asked for
    constrained: bool = False  # the host must see each token before the next is drawn
    order: int = 0  # place in the queue
    prompt: int = 0  # tokens of the prompt
    slot: int | None = None  # where its state lies, while it runs
    pages: list[int] = field(default_factory=list)
    chain: list[bytes] = field(default_factory=list)  # the names of those of its pages that are full, as far as known
    fed: int = 0  # positions that are in the cache once all plans have run
    drawn: int = 0  # tokens drawn once all plans have run
    joined: bool = False  # its prompt is in; it draws
    ahead: bool = False  # its last token is fed already: the logits of the next one are there
    unread: int = 0  # plans whose results have not come yet
    epoch: int = 0  # counts changes of the weights: which ones wrote its pages
    finish: str | None = None  # "stop", "length", "abort", "error" or "dead_end"
    part: int | None = None  # which of several parts of slots and pages it runs on, once that is decided

    @property
    def left(self) -> int:
        """Tokens it may still draw."""
        return self.limit - self.drawn


@dataclass(frozen=True)
class Piece:
    """``count`` tokens of a prompt, from position ``start`` on."""

    sequence: Sequence
    start: int
    count: int
    ends: bool = False  # its last token is the prompt's last one, so that the next is drawn from its logits


@dataclass
class Plan:
    """One turn, in the order in which the device does it."""

    copies: list[tuple[int, int]] = field(default_factory=list)  # of pages: from, to
    pieces: list[Piece] = field(default_factory=list)
    joins: list[Sequence] = field(default_factory=list)
    rows: list[Sequence] = field(default_factory=list)
    steps: int = 0  # 0: draw one token from logits that are computed already
    ahead: list[Sequence] = field(default_factory=list)  # rows whose last token is fed, without a draw

    @property
    def firsts(self) -> list[Sequence]:
        """Rows whose first token is drawn from the logits of a piece, before the decode steps."""
        return [piece.sequence for piece in self.pieces if piece.ends]

    def __bool__(self) -> bool:
        return bool(self.copies or self.pieces or self.joins or self.rows or self.ahead)


class Scheduler:
    """First come, first served, with priorities, on ``slots`` rows and a pool of pages.

    A turn feeds at most ``pieces`` pieces of ``piece`` tokens, or ``alone`` pieces where no row draws that they would
    delay; then it decodes. ``steps`` are three numbers of decode steps a turn: where all rows have just joined, or
    requests keep coming and none waits for a slot, so that a new one starts soon; while requests wait or prompts are
    being fed; otherwise."""

    def __init__(
        self,
        pages: Pages,
        *,
        slots: int,
        max_len: int,
        piece: int,
        pieces: int,
        steps: tuple[int, int, int],
        alone: int = 0,
    ) -> None:
        self.pages, self.slots, self.max_len = pages, slots, max_len
        self.piece, self.pieces, self.alone, self.steps = piece, pieces, max(alone, pieces), steps
        self._room = pieces  # pieces of this turn
        self.waiting: list[Sequence] = []  # the next first
        self.running: list[Sequence] = []  # in the same order
        self._slots = list(reversed(range(slots)))
        self._arrivals = self._turn = self._epoch = 0
        self._since = EXPECT  # decode steps since a request came while others ran
        self.hits = self.prompt_tokens = self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Put a request in the queue, or refuse at once what could never run."""
        self.check(sequence)
        sequence.order = order(self._arrivals, sequence.priority)
        self._arrivals += 1
        self.expect(more=bool(self.running))
        self.enqueue(sequence)

    def expect(self, *, more: bool) -> None:
        """A request has come. With ``more``, others ran then, so that more are expected soon."""
        self._since = 0 if more else EXPECT

    def check(self, sequence: Sequence) -> None:
        """Raise `InputError` if a request could never run."""
        sequence.prompt = n = len(sequence.tokens)
        longest = n + sequence.limit
        if longest > self.max_len:
            raise InputError(
                f"request: expected at most {self.max_len} tokens (max_len), found {longest}: a prompt of {n} and "
                f"max_new_tokens {sequence.limit}"
            )
        if (needed := self.pages.needed(longest - 1)) > self.pages.count:
            raise InputError(
                f"request: expected at most {self.pages.count} pages of {self.pages.size} tokens (the whole pool), "
                f"found a need of {needed}: a prompt of {n} and max_new_tokens {sequence.limit}"
            )

    @property
    def load(self) -> int:
        """How many sequences it has."""
        return len(self.running) + len(self.waiting)

    def held(self, sequence: Sequence) -> int:
        """How many tokens of a sequence the pool holds."""
        prefix = self.pages.find(sequence.tokens[:-1], sequence.salt, self._turn)
        return len(prefix.pages) * self.pages.size + prefix.tail_tokens

    def plan(self) -> Plan:
        """The next turn; empty where there is nothing to do before more results are read."""
        self._turn += 1
        plan = Plan()
        one_by_one = self._one_by_one
        steps = 1 if one_by_one else self._steps
        self._grow(steps)
        self._room = self.pieces if any(s.joined and s.left > 0 for s in self.running) else self.alone
        for sequence in self.running:
            self._feed(sequence, plan)
        self._admit(plan, steps)
        if one_by_one or self._one_by_one:  # a row may have joined, or may have been preempted
            self._draw_one(plan)
        else:
            self._draw_some(plan, steps)
        self._since += plan.steps
        for sequence in (*plan.firsts, *plan.rows):
            sequence.unread += 1
        return plan

    @property
    def _steps(self) -> int:
        """Decode steps of the next turn. While requests keep coming, turns are short: one that comes now waits for the
        rest of the turn that runs and for the one that is queued behind it. Shorter turns help nobody where requests
        wait for a slot, or where a prompt is being fed that takes several turns."""
        feeding = any(not s.joined for s in self.running)
        if self._since < EXPECT and not feeding and (self._slots or not self.waiting):
            return self.steps[0]
        return self.steps[1] if feeding or self.waiting else self.steps[2]

    def _draw_some(self, plan: Plan, steps: int) -> None:
        """Decode steps for all rows that draw; few where all have just joined, so that the first tokens of those whose
        prompt was in the cache come out soon."""
        plan.rows = [s for s in self.running if s.joined and s.left > 0]
        if {*plan.rows} <= {*plan.joins}:
            steps = min(steps, self.steps[0])
        plan.steps = steps if plan.rows else 0
        for sequence in plan.rows:
            new = min(steps, sequence.left)
            sequence.drawn += new
            sequence.fed += new

    @property
    def _one_by_one(self) -> bool:
        """Whether rows draw one token a turn, because one has a constraint or logits for its next token."""
        return any(s.ahead or (s.joined and s.constrained) for s in self.running)

    def _draw_one(self, plan: Plan) -> None:
        """Draw a token for all rows that have logits, then compute the next logits if any row is constrained."""
        plan.rows = [s for s in self.running if s.ahead and s.left > 0]
        for sequence in plan.rows:
            sequence.ahead = False
            sequence.drawn += 1
        draws = [s for s in self.running if s.joined and s.left > 0]
        if any(s.constrained for s in draws):
            plan.ahead = draws
            for sequence in draws:
                sequence.ahead = True
                sequence.fed += 1

    def read(self, sequence: Sequence, tokens: Ordered[int]) -> list[int]:
        """Record the tokens that one plan drew for a sequence. Returns those that belong to its text."""
        sequence.unread -= 1
        if sequence.finish is not None:
            return []
        sequence.tokens.extend(tokens)
        if tokens and tokens[-1] in sequence.stop_ids:  # a row ends at its first stop token
            self.finish(sequence, "stop")
        elif len(sequence.tokens) >= sequence.prompt + sequence.limit and sequence.limit:
            self.finish(sequence, "length")
        else:
            self._remember(sequence, tail=False)
        return list(tokens)

    def read_scores(self, sequence: Sequence, pieces: int) -> None:
        """Record that the scores of some pieces have been read."""
        sequence.unread -= pieces
        if sequence.finish is None and sequence.limit == 0 and sequence.joined and sequence.unread == 0:
            self.finish(sequence, "length")

    def finish(self, sequence: Sequence, reason: str) -> None:
        """End a sequence, and free its slot and pages."""
        if sequence.finish is not None:
            return
        sequence.finish = reason
        if sequence.slot is None:
            self.waiting.remove(sequence)
            return
        self._remember(sequence, tail=True)
        self._leave(sequence)

    def forget(self) -> None:
        """The weights have changed: stop sharing the pages that the old weights wrote."""
        self._epoch += 1
        self.pages.forget_all()

    def restart(self) -> None:
        """The cache is lost: all running sequences are computed again, from the tokens read so far."""
        for sequence in list(self.running):
            self._leave(sequence)
            self.enqueue(sequence)
        for sequence in self.waiting:
            sequence.unread = 0
        self.forget()

    def enqueue(self, sequence: Sequence) -> None:
        """Put a request at its place in the queue."""
        bisect.insort(self.waiting, sequence, key=lambda s: s.order)

    def _leave(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        self.running.remove(sequence)
        bisect.insort(self._slots, sequence.slot, key=lambda slot: -slot)  # the lowest is taken first
        self.pages.give_back(sequence.pages)
        sequence.slot, sequence.pages, sequence.chain = None, [], []
        sequence.fed, sequence.joined, sequence.ahead = 0, False, False

    def _preempt(self, sequence: Sequence) -> None:
        """Free a row's slot and pages. It is computed again from its tokens, once all have been read."""
        self._leave(sequence)
        self.enqueue(sequence)
        self.preemptions += 1

    def _grow(self, steps: int) -> None:
        """Take pages for the next steps of rows that draw, the oldest first. If none is free, preempt the newest."""
        for sequence in list(self.running):
            while sequence.slot is not None and sequence.joined:
                missing = self.pages.needed(sequence.fed + min(steps, sequence.left - sequence.ahead))
                missing -= len(sequence.pages)
                if missing <= self.pages.free:
                    sequence.pages += self.pages.take(max(missing, 0))
                    break
                self._preempt(self.running[-1])

    def _admit(self, plan: Plan, steps: int) -> None:
        while self.waiting and self._slots and len(plan.pieces) < self._room:
            sequence = self.waiting[0]
            if sequence.unread:  # preempted, and its last tokens have not been read yet
                return
            usable = len(sequence.tokens) - 1
            if sequence.score_from is not None:  # a probability needs the logits of the token before
                usable = min(usable, sequence.score_from - 1)
            goes_on = usable < len(sequence.tokens) - 1
            prefix = self.pages.find(sequence.tokens[:usable], sequence.salt, self._turn, goes_on=goes_on)
            if prefix.fresh:  # this turn writes the page to copy: wait for the next turn
                return
            self.pages.use(prefix.pages)
            sequence.drawn = len(sequence.tokens) - sequence.prompt
            # In the turn in which it joins, it may draw a first token and then take the steps of this turn, or those of
            # a later one that still feeds it.
            ahead = len(sequence.tokens) - 1 + min(1 + max(steps, *self.steps[:2]), sequence.left)
            missing = self.pages.needed(ahead) - len(prefix.pages)
            # Leave room for the pages that running rows will soon need. Otherwise the next turns would preempt.
            if missing + -(-len(self.running) // RESERVE) > self.pages.free:
                self.pages.give_back(prefix.pages)
                return
            self._start(self.waiting.pop(0), prefix.pages, prefix.chain, missing)
            if prefix.tail is not None:
                plan.copies.append((prefix.tail, sequence.pages[len(prefix.pages)]))
                sequence.fed += prefix.tail_tokens
            self.hits += sequence.fed
            self.prompt_tokens += len(sequence.tokens) - 1
            self._feed(sequence, plan)

    def _start(self, sequence: Sequence, shared: list[int], chain: list[bytes], missing: int) -> None:
        sequence.slot = self._slots.pop()
        sequence.pages = shared + self.pages.take(missing)
        sequence.chain = list(chain)
        sequence.fed = len(shared) * self.pages.size
        sequence.epoch = self._epoch
        bisect.insort(self.running, sequence, key=lambda s: s.order)

    def _feed(self, sequence: Sequence, plan: Plan) -> None:
        """Plan pieces of a prompt, as many as are left in the turn's budget. No piece has the last token alone, which
        would cost as much as a whole piece. The last token of a text that is only scored is not fed; that of one with a
        constraint is fed apart, because its first token needs a mask."""
        if sequence.joined:
            return
        last = len(sequence.tokens) - 1
        end = last + (sequence.limit > 0 and not sequence.constrained)
        while sequence.fed < last and len(plan.pieces) < self._room:
            count = min(self.piece, end - sequence.fed)
            plan.pieces.append(Piece(sequence, sequence.fed, count, ends=sequence.fed + count > last))
            sequence.fed += count
            sequence.unread += sequence.limit == 0
        if sequence.fed >= last:
            sequence.joined = True
            sequence.drawn += sequence.fed > last
            if sequence.limit:
                plan.joins.append(sequence)
        self._remember(sequence, tail=sequence.joined)

    def _remember(self, sequence: Sequence, tail: bool) -> None:
        """Record which tokens a sequence's full pages hold. With ``tail``, record its last page, too: that of a prompt
        that is completely in the cache, or of a text that has ended."""
        if sequence.slot is None or sequence.epoch != self._epoch:
            return
        size, known = self.pages.size, min(sequence.fed, len(sequence.tokens) - 1)
        name = sequence.chain[-1] if sequence.chain else root(sequence.salt)
        while (at := len(sequence.chain) * size) + size <= known:
            page = sequence.pages[len(sequence.chain)]
            name = self.pages.remember(page, name, sequence.tokens[at : at + size], self._turn)
            assert name is not None
            sequence.chain.append(name)
        if tail and known - at >= self.pages.worth:
            self.pages.remember(sequence.pages[len(sequence.chain)], name, sequence.tokens[at:known], self._turn)

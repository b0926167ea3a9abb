"""One HTTP request's rows while they run: the engine's progress goes in, text that cannot change any more comes out."""

import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from jllama.engine.request import Completion
from jllama.errors import InputError
from jllama.serve.bridge import EngineThread, Group, Progress, joined
from jllama.serve.constraints import Tools
from jllama.serve.errors import ApiError
from jllama.serve.model import Model
from jllama.serve.parameters import Run
from jllama.serve.text import RowText, TokenLogprob, scored_tokens
from jllama.text.tool_calls import ToolCall, ToolCallParser, with_marks

DEAD_END = "the request's constraint and settings leave no token that might come next"


@dataclass(frozen=True)
class Delta:
    """The new text and tokens of one row of the answer."""

    row: int
    text: str
    tokens: list[TokenLogprob]
    finish: str | None = None  # "stop", "length" or "tool_calls", with the row's last
    calls: tuple[tuple[int, ToolCall], ...] = ()  # with their places among the row's calls


class RowCalls:
    """Finds the tool calls in one row's text."""

    def __init__(self, tools: Tools) -> None:
        self._parser = ToolCallParser(tools.style, tools.functions)
        self._limit = None if tools.parallel else 1
        self._count = 0

    def push(self, text: str, finish: str | None) -> tuple[str, tuple[tuple[int, ToolCall], ...], str | None]:
        """Add text. Returns the content for the reader, the complete calls, and the finish reason, if any."""
        found = self._parser.push(text)
        content, calls = found.content, found.calls
        if finish is not None:
            rest = self._parser.finish()
            content, calls = content + rest.content, calls + rest.calls
        if self._limit is not None:
            calls = calls[: self._limit - self._count]
        numbered = tuple(enumerate(calls, self._count))
        self._count += len(calls)
        return content, numbered, "tool_calls" if finish == "stop" and self._count else finish


class Running:
    """Begins with `start`; `deltas` gives what comes; `close` frees the rows wherever they are."""

    def __init__(self, run: Run, model: Model, engine: EngineThread, hold: Callable[[], float] = lambda: 0.0) -> None:
        self.run, self.model, self._engine = run, model, engine
        self.group = Group([*run.requests, *run.scores], hold)
        tokenizer = with_marks(model.tokenizer) if run.tools else model.tokenizer
        ahead = [len(text) for text in run.echoes for _ in range(run.n)] or [0] * len(run.requests)
        self._rows = [
            RowText(tokenizer, list(r.prompt), run.stop, logprobs=run.logprobs is not None, ahead=n)
            for r, n in zip(run.requests, ahead, strict=False)
        ]
        self._calls = [RowCalls(run.tools) for _ in run.requests] if run.tools else []
        self.finishes: dict[int, str] = {}
        self.began = time.perf_counter()
        self.first: float | None = None  # when the first token came
        self.gaps: list[tuple[float, int]] = []  # seconds between a row's tokens, and how many tokens came then
        self._last: dict[int, float] = {}

    @property
    def prompt_tokens(self) -> int:
        """The tokens of all prompts, each counted once."""
        return sum(map(len, self.run.prompts))

    @property
    def completion_tokens(self) -> int:
        """The drawn tokens of all rows so far, stop tokens included."""
        return sum(row.tokens for row in self._rows)

    async def start(self) -> None:
        """Submit the rows, and wait until the engine has accepted them."""
        if not self.group.requests:
            return
        self._engine.submit(self.group)
        try:
            await self.group.accepted
        except InputError as error:
            if not self._engine.alive:
                raise ApiError(503, str(error)) from None
            raise ApiError(400, str(error), param="prompt") from None

    def close(self) -> None:
        """Free the rows that still run."""
        if len(self.finishes) < len(self._rows) or self.run.scores:
            self._engine.abort(self.group)

    async def deltas(self) -> AsyncGenerator[list[Delta]]:
        """Yield all new text as soon as it is there, until every row has ended."""
        early: list[Progress] = []
        if echoes := await self._echoes(early):
            yield echoes
        while len(self.finishes) < len(self._rows):
            arrived, early, failed = joined(early) or await self.group.take(), [], None
            found: list[Delta] = []
            try:
                for progress in arrived:
                    if (delta := self._take(progress)) is not None:
                        found.append(delta)
            except ApiError as error:  # what was drawn before comes first
                failed = error
            if found:
                yield found
            if failed is not None:
                raise failed

    async def _echoes(self, early: list[Progress]) -> list[Delta]:
        """The texts of the prompts, for ``echo``. Progress of rows that draw is kept in ``early`` meanwhile."""
        scored: dict[int, Completion] = {}
        while len(scored) < len(self.run.scores):
            for progress in await self.group.take():
                if progress.error is not None:
                    raise ApiError(500, progress.error)
                if progress.scored is not None:
                    scored[progress.row - len(self.run.requests)] = progress.scored
                else:
                    early.append(progress)
        if not self.run.echoes:
            return []
        found, finish = iter(scored[i] for i in range(len(scored))), None if self._rows else "length"
        deltas = []
        for i, (text, ids) in enumerate(zip(self.run.echoes, self.run.prompts, strict=True)):
            tokens: list[TokenLogprob] = []
            if self.run.logprobs is not None:
                tokens = scored_tokens(self.model.names, ids, next(found) if len(ids) > 1 else None)
            deltas += [Delta(i * self.run.n + j, text, tokens, finish) for j in range(self.run.n)]
        return deltas

    def _take(self, progress: Progress) -> Delta | None:
        row = progress.row
        if row >= len(self._rows) or row in self.finishes:  # a stop string has ended it, but the engine had drawn more
            return None
        if progress.error is not None:
            raise ApiError(500, progress.error)
        if progress.finish == "dead_end":
            raise ApiError(400, DEAD_END, code="dead_end")
        self._note(row, len(progress.ids))
        text_of = self._rows[row]
        last = progress.finish == "stop" and progress.ids[-1:] != [] and progress.ids[-1] in self.run.ends
        text, tokens = text_of.push(progress.ids, progress.logprobs, progress.top, last_is_stop=last)
        finish = progress.finish
        if text_of.stopped:
            finish = "stop"
            if progress.finish is None:
                self._engine.abort(self.group, row)
        if finish is not None:
            rest, more = text_of.finish()
            text, tokens = text + rest, tokens + more
        calls: tuple[tuple[int, ToolCall], ...] = ()
        if self._calls:
            text, calls, finish = self._calls[row].push(text, finish)
        if finish is not None:
            self.finishes[row] = finish
        return Delta(row, text, tokens, finish, calls) if text or tokens or finish or calls else None

    def _note(self, row: int, count: int) -> None:
        """Record when tokens were received."""
        if not count:
            return
        now = time.perf_counter()
        if self.first is None:
            self.first = now
        if row in self._last:
            self.gaps.append(((now - self._last[row]) / count, count))
        self._last[row] = now


@dataclass
class Whole:
    """The whole text and tokens of one row."""

    text: str = ""
    tokens: list[TokenLogprob] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    finish: str = "length"


async def collect(running: Running) -> list[Whole]:
    """Run all rows to the end."""
    rows = [Whole() for _ in range(running.run.rows)]
    async for deltas in running.deltas():
        for delta in deltas:
            row = rows[delta.row]
            row.text += delta.text
            row.tokens += delta.tokens
            row.calls += [call for _, call in delta.calls]
            row.finish = delta.finish or row.finish
    return rows

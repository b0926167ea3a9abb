"""Turns a row's ids into text that cannot change any more, and the log-probabilities of its tokens."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from jllama.engine.request import Completion
from jllama.text.tokenizer import TextStream, Tokenizer

LOWEST = -9999.0  # stands for a logarithm of 0, which JSON cannot hold


@dataclass(frozen=True)
class TokenLogprob:
    """One token of a text, and how likely it was. ``logprob`` is None for a text's first token."""

    id: int
    logprob: float | None
    top: dict[int, float]
    offset: int  # in the text, where the token begins


class RowText:
    """Decodes one row. Text that may still change is held back, together with its tokens."""

    def __init__(
        self, tokenizer: Tokenizer, prompt: list[int], stop: tuple[str, ...], *, logprobs: bool, ahead: int = 0
    ) -> None:
        self._ahead = ahead  # characters of the answer before this text
        self._stream = TextStream(tokenizer, prompt, stop)
        self._logprobs = logprobs
        self._plain = not stop and not logprobs  # then it does not matter which token a character came with
        self._held: list[TokenLogprob] = []
        self._released = ahead  # characters
        self.tokens = 0  # received so far, stop tokens and those of a stop string included

    @property
    def stopped(self) -> bool:
        """Whether a stop string has been found."""
        return self._stream.stopped

    def push(
        self, ids: list[int], logprobs: list[float], top: list[dict[int, float]], *, last_is_stop: bool
    ) -> tuple[str, list[TokenLogprob]]:
        """Add new ids. Returns the text that can no longer change, and its tokens."""
        if self._plain:
            self.tokens += len(ids)
            return self._stream.push(ids[:-1] if last_is_stop else ids), []
        text = ""
        for i, token in enumerate(ids):
            self.tokens += 1
            if last_is_stop and i == len(ids) - 1:  # a stop token is no part of the text
                break
            begin = self._ahead + self._stream.settled
            text += self._stream.push([token])
            if self._logprobs:
                self._held.append(TokenLogprob(token, logprobs[i], top[i] if top else {}, begin))
            if self._stream.stopped:
                break
        return text, self._settle(text)

    def finish(self) -> tuple[str, list[TokenLogprob]]:
        """The text that was held back, and its tokens."""
        text = self._stream.finish()
        tokens = self._settle(text)
        if not self._stream.stopped:
            tokens += self._held
        self._held = []
        return text, tokens

    def _settle(self, text: str) -> list[TokenLogprob]:
        self._released += len(text)
        count = next((i for i, t in enumerate(self._held) if t.offset >= self._released), len(self._held))
        settled, self._held = self._held[:count], self._held[count:]
        return settled


class Names:
    """The texts of single tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # The decoder drops the leading space of the first token, so put another token before it.
        self._before = tokenizer.encode("a", bos=False)[-1:]
        self._skip = len(tokenizer.decode(self._before))
        self.text = functools.lru_cache(maxsize=1 << 16)(self._text)
        self._bytes = tokenizer.token_bytes()

    def _text(self, token: int) -> str:
        name = self._tokenizer.control.name_of(token)
        return name if name is not None else self._tokenizer.decode([*self._before, token])[self._skip :]

    def bytes_of(self, token: int) -> list[int]:
        """A token's bytes. Its text shows a part of a character as U+FFFD; the bytes are exact."""
        return list(self._bytes[token]) if 0 <= token < len(self._bytes) else []


def finite(logprob: float) -> float:
    """A log-probability as JSON can hold it."""
    return logprob if math.isfinite(logprob) else LOWEST


def likeliest(token: TokenLogprob, count: int) -> list[tuple[int, float]]:
    """The ``count`` likeliest tokens at a token's place."""
    return sorted(token.top.items(), key=lambda pair: -pair[1])[:count]


def scored_tokens(names: Names, ids: Sequence[int], scored: Completion | None) -> list[TokenLogprob]:
    """The tokens of a prompt. The first has no log-probability. ``scored`` has those of the others, if any."""
    logprobs = [None, *(scored.logprobs if scored else ())]
    top = [{}, *(scored.top_logprobs if scored else ())]
    ends = accumulate(len(names.text(token)) for token in ids)
    return [TokenLogprob(*four) for four in zip(ids, logprobs, top, [0, *ends], strict=False)]

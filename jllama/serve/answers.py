"""Answers as JSON objects of OpenAI's API: whole ones, and the chunks of a stream."""

import functools
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jllama import __version__
from jllama.serve.running import Delta, Whole
from jllama.serve.text import Names, TokenLogprob, finite, likeliest
from jllama.text.tool_calls import ToolCall

DONE = b"data: [DONE]\n\n"


def usage(prompt: int, completion: int) -> dict[str, int]:
    """The tokens of a request."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def event(value: dict[str, Any]) -> bytes:
    """An object as one server-sent event."""
    return _framed(encode(value))


def _framed(value: bytes) -> bytes:
    return b"data: %b\n\n" % value


def encode(value: Any) -> bytes:
    """Compact JSON."""
    return _encoder.encode(value).encode()


_encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


@dataclass(frozen=True)
class Answer:
    """What all objects of one answer have in common. ``logprobs``: how many of the likeliest tokens to report; None: no
    log-probabilities."""

    model: str
    names: Names
    logprobs: int | None
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = field(default_factory=lambda: secrets.token_hex(16))

    kind = chunk_kind = prefix = ""

    def whole(self, rows: Sequence[Whole], used: dict[str, int]) -> dict[str, Any]:
        """The answer of a request that does not stream."""
        choices = [self.choice(i, row) for i, row in enumerate(rows)]
        return {**self._head(self.kind), "choices": choices, "usage": used}

    def chunk(self, choices: list[dict[str, Any]], used: dict[str, int] | None, *, tells_usage: bool) -> bytes:
        """One chunk of a streamed answer, as the bytes of a server-sent event. With ``tells_usage``, it has a field
        ``usage``. OpenAI's API gives the counts in the last chunk, and null in those before it."""
        rest = {"choices": choices, "usage": used} if tells_usage else {"choices": choices}
        return _framed(b"%b,%b" % (self._chunk_head, encode(rest)[1:]))  # two objects become one: {head, rest}

    @functools.cached_property
    def _chunk_head(self) -> bytes:
        """The fields that all chunks of this answer share, as JSON without its closing brace. It is encoded once,
        because a server sends thousands of chunks a second."""
        return encode(self._head(self.chunk_kind))[:-1]

    def choice(self, index: int, row: Whole) -> dict[str, Any]:
        """One text of a whole answer."""
        raise NotImplementedError

    def opening(self, index: int) -> dict[str, Any] | None:
        """The first object of a stream about a text."""
        raise NotImplementedError

    def part(self, delta: Delta) -> dict[str, Any]:
        """An object of a stream about a text that continues."""
        raise NotImplementedError

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"{self.prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"jllama-{__version__}",
        }


class TextAnswer(Answer):
    """Of ``/v1/completions``."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def choice(self, index: int, row: Whole) -> dict[str, Any]:
        return self._choice(index, row.text, row.tokens, row.finish)

    def opening(self, index: int) -> None:
        return None

    def part(self, delta: Delta) -> dict[str, Any]:
        return self._choice(delta.row, delta.text, delta.tokens, delta.finish)

    def _choice(self, index: int, text: str, tokens: Sequence[TokenLogprob], finish: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": self._logprobs(tokens), "finish_reason": finish}

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if self.logprobs is None:
            return None
        return {
            "tokens": [self.names.text(t.id) for t in tokens],
            "token_logprobs": [None if t.logprob is None else finite(t.logprob) for t in tokens],
            "top_logprobs": [self._top(t) for t in tokens],
            "text_offset": [t.offset for t in tokens],
        }

    def _top(self, token: TokenLogprob) -> dict[str, float] | None:
        """The likeliest tokens and the drawn one. If two have the same text, the likelier one."""
        if token.logprob is None:
            return None
        pairs = [(token.id, token.logprob), *reversed(likeliest(token, self.logprobs or 0))]
        return {self.names.text(i): finite(logprob) for i, logprob in pairs}


class ChatAnswer(Answer):
    """Of ``/v1/chat/completions``."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl"

    def choice(self, index: int, row: Whole) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": row.text, "refusal": None}
        if row.calls:
            message |= {"content": row.text if row.text.strip() else None, "tool_calls": list(map(_call, row.calls))}
        return {"index": index, "message": message, "logprobs": self._logprobs(row.tokens), "finish_reason": row.finish}

    def opening(self, index: int) -> dict[str, Any]:
        return self._part(index, {"role": "assistant", "content": ""}, None, None)

    def part(self, delta: Delta) -> dict[str, Any]:
        content: dict[str, Any] = {"content": delta.text} if delta.text else {}
        if delta.calls:
            content["tool_calls"] = [{"index": i, **_call(call)} for i, call in delta.calls]
        return self._part(delta.row, content, self._logprobs(delta.tokens) if delta.tokens else None, delta.finish)

    def _part(self, index: int, delta: dict[str, Any], logprobs: Any, finish: str | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if self.logprobs is None:
            return None
        count = self.logprobs
        content = [
            self._token(t.id, t.logprob or 0.0) | {"top_logprobs": [self._token(*p) for p in likeliest(t, count)]}
            for t in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        names = self.names
        return {"token": names.text(token), "logprob": finite(logprob), "bytes": names.bytes_of(token)}


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}

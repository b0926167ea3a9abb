"""Finds tool calls in a model's answer while the answer streams, in three common formats.

=========  ==========================================================================
llama3     the whole answer is ``{"name": ..., "parameters": {...}}``, or several with ``;`` between them
hermes     ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, anywhere in the answer
mistral    ``[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]``, or ``[TOOL_CALLS]name[ARGS]{...}``
=========  ==========================================================================

Text that begins like a call but is not one stays content, unchanged.
"""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal

from jllama.text.tokenizer import Tokenizer

Style = Literal["llama3", "hermes", "mistral"]

# What begins a call; control tokens among these must be shown in the text: see `with_marks`.
_BEGIN: dict[str, str] = {"llama3": "<|python_tag|>", "hermes": "<tool_call>", "mistral": "[TOOL_CALLS]"}
_END = "</tool_call>"
_NAMED = re.compile(r"\s*([\w.-]{1,64})(?:\[CALL_ID\]\w{0,64})?\[ARGS\]\s*(?=\{)")
_SEPARATORS = " \t\r\n;,"


@dataclass(frozen=True)
class ToolCall:
    """A function and its arguments as JSON text."""

    name: str
    arguments: str


@dataclass
class Found:
    """What can no longer change: text for the reader, and calls."""

    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)


def style_of(template: str) -> Style | None:
    """The format of a chat template's tool calls; None if it has none that is known."""
    if _BEGIN["mistral"] in template:
        return "mistral"
    if _BEGIN["hermes"] in template:
        return "hermes"
    return "llama3" if _BEGIN["llama3"] in template or '"parameters":' in template else None


def parse_tool_calls(text: str, style: Style, names: Collection[str] | None = None) -> Found:
    """The content and the calls of a whole answer. With ``names``, a call of another function is content."""
    parser = ToolCallParser(style, names)
    found, rest = parser.push(text), parser.finish()
    content = found.content + rest.content
    return Found(content, found.calls + rest.calls)


class ToolCallParser:
    """Takes an answer piece by piece. Returns a call when it is complete. Holds back text that may begin a call."""

    def __init__(self, style: Style, names: Collection[str] | None = None) -> None:
        self._style, self._names = style, names
        self._held, self._scanned, self._calls = "", 0, 0
        self._plain = False  # nothing more can be a call

    def push(self, text: str) -> Found:
        """Add text, and return what can no longer change."""
        self._held += text
        found = Found()
        if self._style == "hermes":
            self._hermes(found)
        elif self._style == "mistral":
            self._mistral(found)
        else:
            self._llama3(found)
        return found

    def finish(self) -> Found:
        """Return the rest, at the end of the answer."""
        found = Found()
        if self._style == "hermes" and self._held.startswith(_BEGIN["hermes"]):
            # A model may end its turn without the closing mark.
            calls = self._calls_in(_loaded(self._held.removeprefix(_BEGIN["hermes"])))
            found.calls, self._held = (calls, "") if calls else ([], self._held)
        elif self._style != "hermes" and not self._plain and (whole := self._whole()) is not None:
            found.calls, self._held = whole, ""
        if not (self._style == "hermes" and self._calls and not self._held.strip()):
            found.content = self._held
        self._held = ""
        return found

    def _hermes(self, found: Found) -> None:
        begin = _BEGIN["hermes"]
        while True:
            at = self._held.find(begin)
            whole = at >= 0
            at = at if whole else len(self._held) - _overlap(self._held, begin)
            text = self._held[:at]
            if self._calls and not text.strip():  # white space between calls is not content
                if not whole:
                    return
                text = ""
            found.content, self._held = found.content + text, self._held[at:]
            end = self._held.find(_END, max(len(begin), self._scanned)) if whole else -1
            while end >= 0 and _in_string(self._held[len(begin) : end]):
                end = self._held.find(_END, end + 1)
            if end < 0:
                self._scanned = len(self._held) - len(_END)
                return
            block, self._held, self._scanned = self._held[: end + len(_END)], self._held[end + len(_END) :], 0
            calls = self._calls_in(_loaded(block[len(begin) : -len(_END)]))
            found.calls += calls
            self._calls += len(calls)
            if not calls:
                found.content += block

    def _mistral(self, found: Found) -> None:
        begin = _BEGIN["mistral"]
        at = self._held.find(begin)
        if at < 0:
            at = len(self._held) - _overlap(self._held, begin)
        found.content, self._held = self._held[:at], self._held[at:]

    def _llama3(self, found: Found) -> None:
        text = self._held.lstrip()
        mark = _BEGIN["llama3"]
        if text and not (text.startswith(("{", mark)) or mark.startswith(text)):
            self._plain = True
        if self._plain:
            found.content, self._held = self._held, ""

    def _whole(self) -> list[ToolCall] | None:
        """The calls in the text that is held; None if it is anything else."""
        text = self._held.strip()
        if self._style == "llama3":
            values = _values(text.removeprefix(_BEGIN["llama3"]))
        else:
            if not text.startswith(_BEGIN["mistral"]):
                return None
            parts = [part for part in text.split(_BEGIN["mistral"]) if part.strip()]
            values = [value for part in parts for value in _mistral_values(part)]
        calls = [self._calls_in(value) for value in values]
        return [call for part in calls for call in part] if calls and all(calls) else None

    def _calls_in(self, value: Any) -> list[ToolCall]:
        """The calls in a JSON value; empty if it is anything else."""
        calls = [_call(one) for one in (value if isinstance(value, list) else [value])]
        known = [c for c in calls if c is not None and (self._names is None or c.name in self._names)]
        return known if len(known) == len(calls) else []


def _call(value: Any) -> ToolCall | None:
    if not isinstance(value, dict) or not isinstance(name := value.get("name"), str) or not name:
        return None
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):  # some models write them as a text
        return ToolCall(name, arguments) if isinstance(_loaded(arguments), dict) else None
    return ToolCall(name, json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _in_string(text: str) -> bool:
    """Whether the end of JSON text is within a string."""
    return re.sub(r"\\.", "", text, flags=re.DOTALL).count('"') % 2 == 1


def _values(text: str) -> list[Any]:
    """The JSON values in a text, one after another; empty if it holds anything else."""
    decoder, values, at = json.JSONDecoder(), [], 0
    while at < len(text):
        if text[at] in _SEPARATORS:
            at += 1
            continue
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return []
        values.append(value)
    return values


def _mistral_values(text: str) -> list[Any]:
    named = _NAMED.match(text)
    if named is None:
        return _values(text) or [None]
    return [{"name": named[1], "arguments": _loaded(text[named.end() :])}]


def _overlap(text: str, begin: str) -> int:
    """The length of the longest end of ``text`` that is a proper beginning of ``begin``."""
    return next((n for n in range(min(len(text), len(begin) - 1), 0, -1) if begin.startswith(text[-n:])), 0)


def with_marks(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer, but its texts also show the control tokens that belong to calls."""
    return _Marked(tokenizer)


class _Marked:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self.n_ids, self.bos_id, self.eos_id = tokenizer.n_ids, tokenizer.bos_id, tokenizer.eos_id
        self.adds_bos, self.control = tokenizer.adds_bos, tokenizer.control
        self.encode, self.encode_rendered = tokenizer.encode, tokenizer.encode_rendered
        self.token_bytes, self._decode = tokenizer.token_bytes, tokenizer.decode
        shown = {*_BEGIN.values(), _END, "[ARGS]", "[CALL_ID]"}
        self._marks = {t.id: t.text for t in tokenizer.control.tokens if t.text in shown}

    def decode(self, ids: list[int]) -> str:
        out, begin = "", 0
        for at, token in enumerate(ids):
            if token in self._marks:
                out += self._decode(ids[begin:at]) + self._marks[token]
                begin = at + 1
        return out + self._decode(ids[begin:])

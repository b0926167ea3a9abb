"""Constraints on text from JSON schemas, regular expressions, lists of choices and Lark grammars, over llguidance.

What is compiled here comes from requests. So its size and nesting are limited before it is read, llguidance's own
limits bound the time and memory of each grammar and each mask, and every error is an `InputError` that names the field.
"""

import json
import time
from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock
from typing import Any, Literal, get_args

import numpy as np

from jllama.errors import InputError
from jllama.formats.files import label
from jllama.text.nesting import MAX_DEPTH
from jllama.text.tokenizer import Tokenizer

Kind = Literal["json_object", "json_schema", "regex", "choice", "grammar"]

MAX_BYTES = 64 << 10  # of a schema, expression or grammar as text
MAX_REPEAT = 10_000  # of items, letters or properties that a schema counts
MAX_CHOICES = 1024
CACHE_BYTES = 256 << 20
# llguidance does not say how much memory a grammar holds. Measured: at most so many bytes for each second that it took
# to compile, and so many that come with the texts that go through it.
_PER_SECOND, _LEAST = 400 << 20, 4 << 20
# White space between the parts of a JSON text: a space, or a line break with indentation. Bounded, so that a text ends.
_JSON = dict(whitespace_pattern=r"( |\n {0,16})", lenient=False, coerce_one_of=False)
_COUNTS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")
_MARK = "\x01"  # not part of any word, so no merge joins it with the text after it
# With the library's own fuel of 1,000,000, an expression of 23 letters takes 1.5 s and holds 180 MiB; so 0.07 s and
# 22 MiB. Large schemas and lists of choices need a tenth of it.
_LIMITS: dict[str, Any] = dict(initial_lexer_fuel=100_000, max_lexer_states=20_000, max_grammar_size=100_000)
_LIMITS |= dict(verbose_errors=False)


class Grammar:
    """A compiled constraint; see `jllama.engine.constraint.Constraint`. ``source`` is its text for `Grammars.of`."""

    def __init__(self, root: Any, words: int, source: str) -> None:
        self._root, self._words, self.source = root, words, source

    def matcher(self) -> "GrammarMatcher":
        """A matcher at the beginning of a new text."""
        return GrammarMatcher(self._root.deep_copy(), self._words)


class GrammarMatcher:
    """Where one text stands in its grammar."""

    def __init__(self, matcher: Any, words: int) -> None:
        self._matcher, self._words = matcher, words

    def mask(self) -> np.ndarray:
        """The tokens that may come next: [words] uint32. No token is left if the grammar has become too complex."""
        mask = np.zeros(self._words, np.uint32)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        if not self._matcher.is_error():
            n = min(len(bits), self._words)
            mask[:n] = bits[:n]
        return mask

    def accept(self, token: int) -> None:
        """Advance by one token."""
        self._matcher.consume_token(token)

    @property
    def done(self) -> bool:
        """Whether the text is complete and nothing may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()


class Grammars:
    """Compiles constraints for one tokenizer, and caches the latest. Threads may share it.

    ``vocab_size`` is the model's, and ``stop_ids`` end a text where its grammar lets it end."""

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, stop_ids: Sequence[int], *, cache_bytes: int = CACHE_BYTES
    ) -> None:
        try:
            from llguidance import LLTokenizer, TokenizerWrapper
        except ImportError:
            raise InputError("structured output: needs the llguidance package (pip install 'jllama[serve]')") from None
        stops = sorted(set(stop_ids)) or [tokenizer.eos_id]
        self._tokenizer = LLTokenizer(TokenizerWrapper(_Named(tokenizer, stops[0])), eos_token=stops)
        self._words, self._room, self._lock = -(-vocab_size // 32), cache_bytes, Lock()
        self._known: OrderedDict[str, tuple[Grammar, int]] = OrderedDict()

    def compile(self, kind: Kind, value: Any = None, where: str | None = None) -> Grammar:
        """Compile a constraint of this kind: a schema (dict or JSON text), an expression, a list of texts or a grammar.
        ``where`` names the request's field in errors."""
        where = kind if where is None else where
        return self.of(_source(kind, value, where), where)

    def of(self, source: str, where: str = "grammar") -> Grammar:
        """Compile what another process has checked and compiled, or `compile` has checked."""
        with self._lock:
            if source in self._known:
                self._known.move_to_end(source)
                return self._known[source][0]
        begin = time.thread_time()
        grammar = self._compiled(source, where)
        cost = _LEAST + int((time.thread_time() - begin) * _PER_SECOND)
        with self._lock:
            self._known[source] = grammar, cost
            while len(self._known) > 1 and sum(cost for _, cost in self._known.values()) > self._room:
                self._known.popitem(last=False)
        return grammar

    def _compiled(self, source: str, where: str) -> Grammar:
        from llguidance import LLMatcher, LLParserLimits

        root = LLMatcher(self._tokenizer, source, log_level=0, limits=LLParserLimits(**_LIMITS))
        # What the first mask builds is shared by all copies.
        possible = not root.is_error() and np.frombuffer(root.compute_bitmask(), np.uint32).any()
        if root.is_error() or not possible:
            found = _line(root.get_error()) or "one that no text fits"
            raise InputError(f"{where}: expected a grammar that llguidance can compile, found: {found}")
        return Grammar(root, self._words, source)


class _Named:
    """The vocabulary in the form that llguidance reads."""

    def __init__(self, tokenizer: Tokenizer, eos_id: int) -> None:
        self._tokenizer = tokenizer
        self.tokens = tokenizer.token_bytes()
        self.eos_token_id, self.bos_token_id = eos_id, tokenizer.bos_id if tokenizer.bos_id >= 0 else None
        self.special_token_ids = sorted(tokenizer.control.ids)
        self._marks = len(tokenizer.encode(_MARK, bos=False))
        self._by_bytes = {name: i for i, name in enumerate(self.tokens) if name and i not in tokenizer.control.ids}
        self._longest = max(map(len, self._by_bytes), default=0)

    def __call__(self, text: bytes | str) -> list[int]:
        """The ids of text within a text. llguidance asks where only one text may come, and allows these tokens only; so
        their bytes must be those of the text, without the space that a tokenizer puts before a text's first word."""
        wanted = text.encode() if isinstance(text, str) else text
        shown = wanted.decode(errors="replace")
        ids = self._tokenizer.encode(shown, bos=False)
        if not self._are(ids, wanted):
            ids = self._tokenizer.encode(_MARK + shown, bos=False)[self._marks :]
        return ids if self._are(ids, wanted) else self._greedy(wanted)

    def _are(self, ids: list[int], wanted: bytes) -> bool:
        return b"".join(self.tokens[i] for i in ids) == wanted

    def _greedy(self, text: bytes) -> list[int]:
        """Split bytes into tokens, always the longest that fits, up to a byte that no token has."""
        ids, at = [], 0
        while at < len(text):
            found = next((e for e in range(at + self._longest, at, -1) if text[at:e] in self._by_bytes), None)
            if found is None:
                break
            ids.append(self._by_bytes[text[at:found]])
            at = min(found, len(text))
        return ids


def _source(kind: Kind, value: Any, where: str) -> str:
    """The checked constraint in the form that llguidance reads."""
    from llguidance import LLMatcher

    if kind not in get_args(Kind):
        raise InputError(f"{where}: expected one of {', '.join(get_args(Kind))}, found {label(kind)!r}")
    if kind in ("json_object", "json_schema"):
        schema = {"type": "object"} if kind == "json_object" else check_schema(value, where)
        return LLMatcher.grammar_from_json_schema(json_grammar(schema))
    if kind == "choice":
        return _choices(value, where)
    if not isinstance(value, str):
        raise InputError(f"{where}: expected a text, found {type(value).__name__}")
    _check_text(value, where)
    return LLMatcher.grammar_from_regex(value) if kind == "regex" else LLMatcher.grammar_from_lark(value)


def json_grammar(schema: dict[str, Any]) -> str:
    """A checked schema with our settings, as JSON text: for llguidance, also within a Lark grammar after ``%json``."""
    return json.dumps(schema | {"x-guidance": _JSON})


def check_schema(value: Any, where: str) -> Any:
    """A JSON schema within the limits, from JSON or its text. llguidance decides which keywords it
    supports: an unknown one is an error, and is not ignored."""
    if isinstance(value, str):
        _check_text(value, where)
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise InputError(f"{where}: expected a JSON schema, found a text that is not JSON") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a JSON schema (an object), found {type(value).__name__}")
    rest: list[tuple[Any, int]] = [(value, 1)]
    while rest:  # before it is written as text, whose size is checked then
        part, depth = rest.pop()
        if depth > MAX_DEPTH:
            raise InputError(f"{where}: expected a nesting of at most {MAX_DEPTH}, found a deeper one")
        if isinstance(part, dict):
            for name in _COUNTS:
                if isinstance(count := part.get(name), int | float) and count > MAX_REPEAT:
                    raise InputError(f"{where}: {name}: expected at most {MAX_REPEAT}, found {label(count)}")
            rest += [(inner, depth + 1) for inner in part.values()]
        elif isinstance(part, list):
            rest += [(inner, depth + 1) for inner in part]
        elif isinstance(part, str):
            _check_text(part, where)
    try:
        size = len(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        raise InputError(f"{where}: expected a JSON schema, found values that JSON does not have") from None
    if size > MAX_BYTES:
        raise InputError(f"{where}: expected at most {MAX_BYTES} bytes, found {size}")
    return value


def _choices(value: Any, where: str) -> str:
    if not isinstance(value, list | tuple) or not value or not all(isinstance(text, str) and text for text in value):
        raise InputError(f"{where}: expected a list of texts that are not empty, found something else")
    if len(value) > MAX_CHOICES:
        raise InputError(f"{where}: expected at most {MAX_CHOICES} choices, found {len(value)}")
    size = sum(len(text.encode(errors="replace")) for text in value)
    if size > MAX_BYTES:
        raise InputError(f"{where}: expected at most {MAX_BYTES} bytes, found {size}")
    return "start: " + " | ".join(lark_text(text) for text in dict.fromkeys(value))


def lark_text(text: str) -> str:
    """A text as a Lark literal."""
    return json.dumps(text, ensure_ascii=False)


def _check_text(text: str, where: str) -> None:
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise InputError(f"{where}: expected text, found a NUL or half a character")
    if (size := len(text.encode())) > MAX_BYTES:
        raise InputError(f"{where}: expected at most {MAX_BYTES} bytes, found {size}")
    depth = 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if depth > MAX_DEPTH:
            raise InputError(f"{where}: expected brackets nested at most {MAX_DEPTH} deep, found deeper ones")


def _line(text: str) -> str:
    """The first 200 printable letters of a message."""
    return label(" ".join(text.split()), 200)

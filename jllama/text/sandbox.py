"""Renders untrusted templates in jinja2's immutable sandbox, with limits on time, memory and output.

The sandbox prevents access to Python's internals, but not ``'x' * 10**10`` or endless loops. So `_Meter` charges every
operation whose result can be larger than its operands to a budget before it runs. The interpreter's trace hook stops a
rendering that takes too long.
"""

import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from functools import update_wrapper
from itertools import islice
from typing import Any, ClassVar

from jllama.errors import RAISED, InputError
from jllama.formats.files import label

MAX_TEMPLATE = 256 << 10  # characters
MAX_OUTPUT = 16 << 20  # characters
MAX_SECONDS = 2.0  # of the thread's CPU time
_BUDGET = 64 << 20  # characters or elements that operations may create, independent of the input
_PER_INPUT = 256  # additional ones for each character of the variables
_MAX_BITS = 4096  # of an integer
# Filters and methods whose result can be as large as the product of the operands' sizes. For all others it is at most
# about their sum.
_PRODUCTS = {
    "batch",
    "center",
    "expandtabs",
    "format",
    "indent",
    "join",
    "ljust",
    "replace",
    "rjust",
    "slice",
    "tojson",
}
_PRODUCTS |= {"translate", "zfill"}
_NOT_FOR_TEMPLATES = ("striptags", "urlize", "wordwrap", "xmlattr", "random")
_WIDE = re.compile(r"\d{5}|\*|\{[^{}]*\{")  # a format string with a width that can make its result very long


class _Exceeded(RuntimeError):
    """The template exceeds a limit."""


class _Meter:
    """The remaining budget of a rendering."""

    def __init__(self) -> None:
        self.left = 0

    def reset(self, variables: Mapping[str, Any]) -> None:
        self.left = _BUDGET + _PER_INPUT * _size(variables)

    def charge(self, amount: int) -> None:
        self.left -= amount
        if self.left < 0:
            raise _Exceeded("creates more characters or elements than it may")

    def operation(self, operator: str, left: Any, right: Any) -> None:
        """Charge an arithmetic operation before it runs."""
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            if operator in ("*", "**") and bits > _MAX_BITS:
                raise _Exceeded(f"computes an integer of more than {_MAX_BITS} bits")
        elif operator == "%":
            self.check_format(left)
            self.charge(_size(left) + _size(right))
        elif operator == "*":
            self.charge(_size(left, count=True) * _size(right, count=True))
        else:
            self.charge(_size(left) + _size(right))

    def check_format(self, text: Any) -> None:
        if isinstance(text, str) and _WIDE.search(text):
            raise _Exceeded("uses a format string with too large a width")

    def arguments(self, name: str, first: Any, rest: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
        """Charge a filter or a method before it runs. Returns its arguments, with iterators replaced by lists."""
        first, *others = (self.listed(value) for value in (first, *rest))
        if name in ("format", "format_map"):
            self.check_format(first)
        if name in _PRODUCTS:
            cost = _size(first)
            for value in (*others, *named.values()):
                cost *= max(1, _size(value, count=name not in ("format", "replace")))
            self.charge(cost)
        else:
            self.charge(sum(_size(value) for value in (first, *others)))
        return (first, *others)

    def listed(self, value: Any) -> Any:
        if not isinstance(value, Iterator):
            return value
        items = list(islice(value, 1 << 20))
        self.charge(len(items))
        return items

    def container(self, value: Any) -> Any:
        """Charge a new list, tuple or dict. It is charged at the size of its text: if nested containers repeat the same
        elements, they are small in memory but long as text."""
        self.charge(_size(value))
        return value

    def joined(self, parts: Iterable[Any]) -> str:
        """The concatenation of the texts of ``parts``."""
        texts = [str(part) for part in parts]
        self.charge(sum(map(len, texts)))
        return "".join(texts)


def _size(value: Any, *, count: bool = False) -> int:
    """The approximate number of characters or elements of a value. With ``count``, an integer is a repeat count, so its
    size is its absolute value."""
    if isinstance(value, str | bytes | range):
        return len(value)
    if isinstance(value, int):
        return abs(value) if count else 1
    if isinstance(value, Mapping):
        return sum(_size(k) + _size(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return len(value) + sum(_size(v) for v in value)
    return 1


class Template:
    """A compiled template. A lock serialises its renderings."""

    def __init__(self, text: str, where: str) -> None:
        try:
            import jinja2
        except ImportError:
            raise InputError(f"{where}: needs the jinja2 package (pip install 'jllama[chat]')") from None
        if len(text) > MAX_TEMPLATE:
            raise InputError(f"{where}: expected at most {MAX_TEMPLATE} characters, found {len(text)}")
        self._where, self._meter, self._lock = where, _Meter(), threading.Lock()
        self._raised = (*RAISED, SyntaxError, jinja2.TemplateError)
        try:
            self._template = _environment(self._meter).from_string(text)
        except self._raised as error:
            raise InputError(f"{where}: expected a jinja template, found: {_line(error)}") from None

    def render(self, variables: Mapping[str, Any]) -> str:
        """The output of the template for ``variables``."""
        with self._lock, _deadline(MAX_SECONDS):
            self._meter.reset(variables)
            try:
                return self._collected(variables)
            except self._raised as error:
                raise InputError(f"{self._where}: {_line(error)}") from None

    def _collected(self, variables: Mapping[str, Any]) -> str:
        pieces, size = [], 0
        for piece in self._template.generate(**variables):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_OUTPUT:
                raise _Exceeded(f"has an output of more than {MAX_OUTPUT} characters")
        return "".join(pieces)


def _line(error: BaseException) -> str:
    return label(" ".join((str(error) or type(error).__name__).split()), 200)


class _deadline:
    """A context that raises `_Exceeded` once the thread has used ``seconds`` of CPU time in it. It also stops functions
    that are called in the context."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __enter__(self) -> None:
        self._end = time.thread_time() + self._seconds
        self._before = sys.gettrace()
        sys.settrace(self._trace)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _trace(self, frame: Any, event: str, argument: Any) -> Any:
        if event == "line" and time.thread_time() > self._end:
            raise _Exceeded(f"takes longer than {self._seconds:g} s")
        return self._trace


def _environment(meter: _Meter) -> Any:
    """The environment in which Hugging Face renders chat templates, with all operations metered."""
    from jinja2 import TemplateError, nodes
    from jinja2.compiler import CodeGenerator
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Code(CodeGenerator):
        def visit_Concat(self, node: Any, frame: Any) -> None:
            self.write("environment.concat((")
            for part in node.nodes:
                self.visit(part, frame)
                self.write(", ")
            self.write("))")

        def visit_List(self, node: Any, frame: Any) -> None:
            self._metered(super().visit_List, node, frame)

        def visit_Dict(self, node: Any, frame: Any) -> None:
            self._metered(super().visit_Dict, node, frame)

        def visit_Tuple(self, node: Any, frame: Any) -> None:
            if node.ctx == "load":
                self._metered(super().visit_Tuple, node, frame)
            else:
                super().visit_Tuple(node, frame)

        def _metered(self, visit: Callable[..., None], node: Any, frame: Any) -> None:
            self.write("environment.container(")
            visit(node, frame)
            self.write(")")

    class Generation(Extension):
        """``{% generation %}`` marks answers for training. Only its body is rendered."""

        tags: ClassVar = {"generation"}  # pyright: ignore[reportIncompatibleVariableOverride]

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class Environment(ImmutableSandboxedEnvironment):
        code_generator_class = Code
        intercepted_binops = frozenset(("+", "*", "**", "%"))
        concat = staticmethod(meter.joined)
        container = staticmethod(meter.container)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            meter.operation(operator, left, right)
            return super().call_binop(context, operator, left, right)

        def call(__self, __context: Any, __obj: Any, *args: Any, **named: Any) -> Any:
            wrapped = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
            owner = getattr(wrapped, "__self__", None)
            if isinstance(owner, str | bytes | list | tuple | Mapping):
                args = meter.arguments(wrapped.__name__, owner, args, named)[1:]
            return super().call(__context, __obj, *args, **named)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.optimized = False  # else constant expressions would be evaluated at compile time, outside the limits
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": _strftime_now}
    del environment.globals["lipsum"]
    for name in _NOT_FOR_TEMPLATES:
        del environment.filters[name]
    environment.filters["tojson"] = _tojson
    environment.filters |= {name: _metered(name, function, meter) for name, function in environment.filters.items()}
    return environment


def _metered(name: str, function: Callable[..., Any], meter: _Meter) -> Callable[..., Any]:
    # Some filters take a jinja context or environment before the value.
    own = int(hasattr(function, "jinja_pass_arg"))

    def call(*args: Any, **named: Any) -> Any:
        checked = meter.arguments(name, args[own] if len(args) > own else None, args[own + 1 :], named)
        return function(*args[:own], *checked[: len(args) - own], **named)

    return update_wrapper(call, function)


def _strftime_now(format: str) -> str:
    if len(format) > 256 or _WIDE.search(format):
        raise _Exceeded("uses a format string with too large a width")
    return datetime.now().strftime(format)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

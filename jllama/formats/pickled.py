"""Reads the pickle in a torch file without torch and without Python's unpickler.

A pickle is a program for a small stack machine. The machine here supports only the instructions that torch's files use,
about two dozen. A file can only refer to the names in `GLOBALS`. Everything else is refused, and nothing is imported or
called. Python's unpickler is not safe even with a restricted ``find_class``: a memo index of four bytes can make it
allocate gigabytes, and a deeply nested key can crash the process.
"""

import struct
from dataclasses import dataclass
from typing import Any

from jllama.errors import InputError
from jllama.formats.files import label

STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
GLOBALS = frozenset(
    ["collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"]
    + [f"torch {name}" for name in STORAGES]
)
MAX_STEPS = 500_000  # Llama-2-70B in one file takes 33,000


@dataclass(frozen=True)
class Global:
    """A reference to a name in `GLOBALS`. It is never resolved to an object."""

    name: str


@dataclass(frozen=True)
class StorageRef:
    """A reference to a storage, which is a file in the archive."""

    dtype: str
    key: str
    size: int  # elements


@dataclass(frozen=True)
class TensorRef:
    """A tensor as the pickle describes it: a part of a storage."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Mark:
    pass


class _Machine:
    def __init__(self, data: bytes, where: str) -> None:
        self.data, self.where, self.at = data, where, 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def fail(self, expected: str, found: Any) -> InputError:
        return InputError(f"{self.where}: byte {self.at}: expected {expected}, found {label(found)}")

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise self.fail(f"{count} more bytes", f"{len(self.data) - self.at} (cut off?)")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, layout: str) -> int:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + 256)
        if end < 0:
            raise self.fail("a name", "none")
        return self.text(end + 1 - self.at)[:-1]

    def text(self, length: int) -> str:
        raw = self.take(length)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.fail("UTF-8 text", "other bytes") from None

    def pop(self, kind: type | tuple[type, ...] = object) -> Any:
        if not self.stack or isinstance(self.stack[-1], _Mark) or not isinstance(self.stack[-1], kind):
            raise self.fail("another value on the stack", self._top())
        return self.stack.pop()

    def top(self, kind: type) -> Any:
        if not self.stack or not isinstance(self.stack[-1], kind):
            raise self.fail(f"a {kind.__name__} on the stack", self._top())
        return self.stack[-1]

    def _top(self) -> str:
        return type(self.stack[-1]).__name__.strip("_") if self.stack else "nothing"

    def to_mark(self) -> list[Any]:
        for i in range(len(self.stack) - 1, -1, -1):
            if isinstance(self.stack[i], _Mark):
                items = self.stack[i + 1 :]
                del self.stack[i:]
                return items
        raise self.fail("a mark on the stack", "none")

    def find(self, index: int) -> Any:
        if index not in self.memo:
            raise self.fail("a remembered value", f"index {index}")
        return self.memo[index]

    def named(self, module: str, name: str) -> Global:
        if f"{module} {name}" not in GLOBALS:
            raise self.fail("a name that weights need", f"{module}.{name}")
        return Global(name)

    def set_items(self, items: list[Any]) -> None:
        target = self.top(dict)
        if len(items) % 2:
            raise self.fail("pairs of key and value", f"{len(items)} values")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int):
                raise self.fail("a string as key", type(key).__name__)
            target[key] = value

    def storage(self) -> StorageRef:
        match self.pop():
            case ("storage", Global(name=name), str(key), str(), int(size)) if name in STORAGES and size >= 0:
                return StorageRef(STORAGES[name], key, size)
        raise self.fail("a storage", "another persistent id")

    def called(self) -> Any:
        arguments, function = self.pop(tuple), self.pop(Global)
        match function.name, arguments:
            case "OrderedDict", ():
                return {}
            case "_rebuild_parameter", (TensorRef() as tensor, *_):
                return tensor
            case "_rebuild_tensor_v2", (StorageRef() as storage, int(offset), tuple(shape), tuple(strides), *_):
                if len(shape) <= 8 and all(type(n) is int and n >= 0 for n in (offset, *shape, *strides)):
                    return TensorRef(storage, offset, shape, strides)
        raise self.fail(f"the arguments of {function.name}", f"{len(arguments)} others")

    def run(self) -> Any:
        for _ in range(MAX_STEPS):
            code = self.take(1)
            if code == b".":
                return self.pop()
            step = _STEPS.get(code)
            if step is None:
                raise self.fail("an instruction that weights need", ascii(code))
            step(self)
        raise self.fail(f"at most {MAX_STEPS} instructions", "more")


def _build(machine: _Machine) -> None:
    """BUILD sets the state of an object. Here that is only the ``_metadata`` of an OrderedDict, which is ignored."""
    machine.pop()
    machine.top(dict)


def _tuple(count: int) -> Any:
    return lambda m: m.stack.append(tuple(reversed([m.pop() for _ in range(count)])))


def _push(value: Any) -> Any:
    return lambda m: m.stack.append(value)


def _number(layout: str) -> Any:
    return lambda m: m.stack.append(m.number(layout))


def _text(layout: str) -> Any:
    return lambda m: m.stack.append(m.text(m.number(layout)))


def _put(layout: str) -> Any:
    def step(m: _Machine) -> None:
        m.memo[m.number(layout)] = m.top(object)

    return step


def _append(m: _Machine) -> None:
    value = m.pop()
    m.top(list).append(value)


def _set_item(m: _Machine) -> None:
    value, key = m.pop(), m.pop()
    m.set_items([key, value])


def _stack_global(m: _Machine) -> None:
    name, module = m.pop(str), m.pop(str)
    m.stack.append(m.named(module, name))


def _extend(m: _Machine) -> None:
    items = m.to_mark()
    m.top(list).extend(items)


_STEPS: dict[bytes, Any] = {
    b"\x80": lambda m: m.take(1),  # PROTO
    b"\x95": lambda m: m.take(8),  # FRAME
    b"(": lambda m: m.stack.append(_Mark()),
    b")": _push(()),
    b"}": lambda m: m.stack.append({}),
    b"]": lambda m: m.stack.append([]),
    b"N": _push(None),
    b"\x88": _push(True),
    b"\x89": _push(False),
    b"\x85": _tuple(1),
    b"\x86": _tuple(2),
    b"\x87": _tuple(3),
    b"t": lambda m: m.stack.append(tuple(m.to_mark())),
    b"J": _number("<i"),
    b"K": _number("<B"),
    b"M": _number("<H"),
    b"G": _number(">d"),
    b"\x8a": lambda m: m.stack.append(int.from_bytes(m.take(m.number("<B")), "little", signed=True)),
    b"X": _text("<I"),
    b"\x8c": _text("<B"),
    b"q": _put("<B"),
    b"r": _put("<I"),
    b"\x94": lambda m: m.memo.__setitem__(len(m.memo), m.top(object)),  # MEMOIZE
    b"h": lambda m: m.stack.append(m.find(m.number("<B"))),
    b"j": lambda m: m.stack.append(m.find(m.number("<I"))),
    b"c": lambda m: m.stack.append(m.named(m.line(), m.line())),
    b"\x93": _stack_global,
    b"Q": lambda m: m.stack.append(m.storage()),
    b"R": lambda m: m.stack.append(m.called()),
    b"s": _set_item,
    b"u": lambda m: m.set_items(m.to_mark()),
    b"a": _append,
    b"e": _extend,
    b"b": _build,
}


def tensors_of(data: bytes, where: str) -> dict[str, TensorRef]:
    """Name -> tensor, for all tensors of a pickled state dict."""
    value = _Machine(data, where).run()
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a dictionary of tensors, found {type(value).__name__}")
    return {name: ref for name, ref in value.items() if isinstance(name, str) and isinstance(ref, TensorRef)}

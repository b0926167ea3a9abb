"""The one place where an implementation is chosen.

An `Op` is a reference in plain `jax.numpy` and, where there is one, a kernel that must agree with it.
`backend` is passed down from the caller and means

* ``"xla"``     the reference;
* ``"pallas"``  the kernel, or `Unsupported` with the reason: an explicit wish never falls back (where an op
  has no kernel, or is better without, like a norm that XLA fuses with its neighbours, there is none to wish for);
* ``"auto"``    the kernel where it can run, else the reference. `record` tells which and why.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax

from .layer_view import materialize

BACKENDS = ("auto", "xla", "pallas")


class Unsupported(Exception):
    """A kernel cannot run these arguments on this device; the message says why."""


@dataclass(frozen=True)
class Choice:
    """What ran for one op: ``impl`` is ``"xla"``, ``"pallas"``, or ``"ops"`` where several smaller ops took its place;
    ``why`` explains it."""

    impl: str
    why: str


_recorder: contextvars.ContextVar[dict[str, Choice] | None] = contextvars.ContextVar("choices", default=None)


@contextlib.contextmanager
def record() -> Iterator[dict[str, Choice]]:
    """Collect the choice made for every op that is traced inside the ``with`` block."""
    choices: dict[str, Choice] = {}
    token = _recorder.set(choices)
    try:
        yield choices
    finally:
        _recorder.reset(token)


def require_hopper() -> None:
    """Raise `Unsupported` unless the device that jax would use is a Hopper GPU."""
    device = _device()
    if device.platform != "gpu":
        raise Unsupported(f"needs an NVIDIA Hopper GPU, found platform {device.platform!r}")
    capability = getattr(device, "compute_capability", None)
    if capability != "9.0":
        raise Unsupported(f"needs compute capability 9.0 (Hopper), found {device.device_kind} with {capability}")


def _device() -> Any:
    default = jax.config.jax_default_device
    return default if isinstance(default, jax.Device) else jax.devices(default)[0]


@dataclass(frozen=True)
class Op:
    """A named operation: ``reference`` is its specification, ``kernel`` its fast equal.

    ``check(*args, **kwargs)`` raises `Unsupported`, before anything is launched, where the kernel cannot run;
    ``skip_reason(*args, **kwargs)`` says why XLA does without the kernel where it could, on every backend, or None.
    """

    name: str
    reference: Callable[..., Any]
    kernel: Callable[..., Any] | None = None
    check: Callable[..., None] | None = None
    skip_reason: Callable[..., str | None] | None = None

    def choose(self, backend: str, *args: Any, **kwargs: Any) -> Choice:
        """Decide, without running anything, which implementation these arguments get."""
        if backend not in BACKENDS:
            raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, found {backend!r}")
        if backend == "xla":
            return Choice("xla", "asked for")
        if self.kernel is None:
            return Choice("xla", "has no kernel: XLA fuses it with its neighbours")
        if self.skip_reason is not None and (why := self.skip_reason(*args, **kwargs)):
            return Choice("xla", why)
        try:
            require_hopper()
            if self.check is not None:
                self.check(*args, **kwargs)
        except Unsupported as reason:
            if backend == "pallas":
                raise Unsupported(f"{self.name}: {reason}") from None
            return Choice("xla", str(reason))
        return Choice("pallas", "asked for" if backend == "pallas" else "kernel runs here")

    def __call__(self, *args: Any, backend: str = "auto", **kwargs: Any) -> Any:
        choice = self._note(self.choose(backend, *args, **kwargs))
        if choice.impl == "xla":
            args, kwargs = materialize((args, kwargs))
            return self.reference(*args, **kwargs)
        assert self.kernel is not None
        return self.kernel(*args, **kwargs)

    def try_kernel(self, *args: Any, backend: str = "auto", **kwargs: Any) -> Any | None:
        """What the kernel gives, or None where it is refused, whatever the backend: for a caller that then goes by
        smaller ops, which face an explicit backend each by itself."""
        try:
            choice = self.choose(backend, *args, **kwargs)
        except Unsupported as reason:
            choice = Choice("xla", str(reason).removeprefix(f"{self.name}: "))
        if choice.impl == "xla":
            self._note(Choice("ops", choice.why))
            return None
        self._note(choice)
        assert self.kernel is not None
        return self.kernel(*args, **kwargs)

    def _note(self, choice: Choice) -> Choice:
        choices = _recorder.get()
        if choices is not None:
            choices[self.name] = choice
        return choice

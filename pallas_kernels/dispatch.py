"""The one place where an implementation is chosen.

An `Op` is a reference in plain `jax.numpy`, and at most one kernel per GPU generation, which must agree with it. The
caller passes `backend`:

* ``"xla"``     the reference;
* ``"pallas"``  the kernel, or `Unsupported` with the reason. It never falls back. (Where an op has no kernel, or XLA is
  better, as for a norm that it fuses with its neighbours, ``"pallas"`` means the reference, too.)
* ``"auto"``    the kernel where it can run, else the reference. `record` says which, and why.

The choice is made for the device that the computation is lowered for: see `arch`. At trace time jit may not know that
device, because its arguments may be committed to any. Then `jax.lax.platform_dependent` decides at lowering: both
implementations are traced, one is lowered, and XLA never sees a branch. Every op can be differentiated and batched: see
`transforms`.
"""

import contextlib
import contextvars
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from .arch import HOPPER, Arch, Target, elsewhere, pinned, target
from .layer_view import materialize
from .transforms import Unsupported, refuse, with_rules

BACKENDS = ("auto", "xla", "pallas")


@dataclass(frozen=True)
class Choice:
    """What ran for one op, and why. ``impl`` is ``"xla"``, ``"pallas"``, or ``"ops"`` where several smaller ops ran in
    its place."""

    impl: str
    why: str


_recorder: contextvars.ContextVar[dict[str, Choice] | None] = contextvars.ContextVar("choices", default=None)


@contextlib.contextmanager
def record() -> Iterator[dict[str, Choice]]:
    """Collect the choice made for every op that is traced inside the ``with`` block."""
    choices, outer = {}, _recorder.get()
    token = _recorder.set(choices)
    try:
        yield choices
    finally:
        _recorder.reset(token)
        if outer is not None:
            outer.update(choices)


@jax.tree_util.register_static
@dataclass(frozen=True)
class Recorded:
    """The choices of one trace, as part of a result's tree structure. jit keeps that structure with the compiled
    function and returns it with every call, at no cost."""

    items: tuple[tuple[str, Choice], ...]

    @property
    def choices(self) -> dict[str, Choice]:
        """The choices, by op name."""
        return dict(self.items)


def recorded[T](function: Callable[..., T]) -> Callable[..., tuple[T, Recorded]]:
    """``function``, which also returns what its trace chose. Put it under `jax.jit`. Its argument ``arch``, which must
    be static, is the device to compile for (None: not known)."""

    @functools.wraps(function)
    def call(*args: Any, arch: Arch | None = None, **kwargs: Any) -> tuple[T, Recorded]:
        with record() as choices, pinned(arch):
            out = function(*args, **kwargs)
        return out, Recorded(tuple(choices.items()))

    # jit looks up the names of static and donated arguments there.
    signature = inspect.signature(function)
    arch = inspect.Parameter("arch", inspect.Parameter.KEYWORD_ONLY, default=None)
    call.__signature__ = signature.replace(parameters=[*signature.parameters.values(), arch])  # type: ignore[attr-defined]
    return call


def require_kernels(arch: Arch | None = None) -> None:
    """Raise `Unsupported` unless a device, by default the one that jax would use, is of a generation with kernels."""
    _require((HOPPER.name,), arch or target().arch)


def _require(names: tuple[str, ...], arch: Arch) -> None:
    if arch.name not in names:
        raise Unsupported(f"needs {_gpu_of(names)}, found {arch}")


def _gpu_of(names: tuple[str, ...]) -> str:
    return f"an NVIDIA {' or '.join(name.title() for name in names)} GPU"


@dataclass(frozen=True)
class Kernel:
    """An implementation of an op for one GPU generation. ``check(*args, **kwargs)`` raises `Unsupported`, before any
    launch, where the kernel cannot run these arguments."""

    run: Callable[..., Any]
    check: Callable[..., None] | None = None


@dataclass(frozen=True, eq=False)  # equal only to itself: jax hashes the functions that it traces
class Op:
    """An operation that has a plain implementation and, for some devices, a kernel.

    ``reference`` is a `jax.numpy` function: it defines the result. ``kernels`` has the kernel for each family of
    devices, by `Arch.name`.

    ``skip_reason(*args, **kwargs)`` says why the reference runs, on every backend, although the kernel could; None
    where the kernel should run.
    """

    name: str
    reference: Callable[..., Any]
    kernels: Mapping[str, Kernel] = field(default_factory=dict)
    skip_reason: Callable[..., str | None] | None = None

    def choose(self, backend: str, *args: Any, **kwargs: Any) -> Choice:
        """Decide, without running anything, which implementation these arguments get."""
        return self._choose(backend, target(jax.tree.leaves((args, kwargs))).arch, args, kwargs)

    def __call__(self, *args: Any, backend: str = "auto", **kwargs: Any) -> Any:
        where = target(jax.tree.leaves((args, kwargs)))
        try:
            choice = self._choose(backend, where.arch, args, kwargs)
        except Unsupported as reason:
            if not elsewhere():
                raise
            return refuse(self._reference, args, kwargs, str(reason))
        return self._run(choice, where, self._reference, "xla", backend == "pallas", args, kwargs)

    def try_kernel(self, otherwise: Callable[..., Any], *args: Any, backend: str = "auto", **kwargs: Any) -> Any:
        """The kernel's result, or ``otherwise(*args, **kwargs)`` where the kernel is refused, on every backend. It is
        for callers that then use smaller ops; each of these applies the backend itself."""
        where = target(jax.tree.leaves((args, kwargs)))
        try:
            choice = self._choose(backend, where.arch, args, kwargs)
        except Unsupported as reason:
            choice = Choice("xla", str(reason).removeprefix(f"{self.name}: "))
        return self._run(choice, where, otherwise, "ops", False, args, kwargs)

    def _choose(self, backend: str, arch: Arch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Choice:
        if backend not in BACKENDS:
            raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, found {backend!r}")
        if backend == "xla":
            return Choice("xla", "asked for")
        if not self.kernels:
            return Choice("xla", "has no kernel: XLA fuses it with its neighbours")
        if self.skip_reason is not None and (why := self.skip_reason(*args, **kwargs)):
            return Choice("xla", why)
        try:
            _require(tuple(self.kernels), arch)
            if (check := self.kernels[arch.name].check) is not None:
                with pinned(arch):
                    check(*args, **kwargs)
        except Unsupported as reason:
            if backend == "pallas":
                raise Unsupported(f"{self.name}: {reason}") from None
            return Choice("xla", str(reason))
        return Choice("pallas", "asked for" if backend == "pallas" else "kernel runs here")

    def _reference(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = materialize((args, kwargs))
        return self.reference(*args, **kwargs)

    def _run(self, choice: Choice, where: Target, otherwise: Callable[..., Any], impl: str, strict: bool,
             args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # fmt: skip
        if choice.impl == "xla":
            self._note(Choice(impl, choice.why))
            return otherwise(*args, **kwargs)
        self._note(choice if where.certain else Choice(choice.impl, f"{choice.why}, if lowered for CUDA"))
        needed = f"needs {_gpu_of(tuple(self.kernels))}"
        return with_rules(
            self.kernels[where.arch.name].run,
            otherwise,
            where,
            args,
            kwargs,
            replaced=lambda why: self._note(Choice(impl, why)),
            refusal=f"{self.name}: {needed}" if strict else None,
        )

    def _note(self, choice: Choice) -> None:
        if (choices := _recorder.get()) is not None and not elsewhere():
            choices[self.name] = choice

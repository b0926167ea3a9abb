"""What a device has, and for which device a computation is traced.

Kernels are registered under the name of an `Arch` and take their sizes from it. No other file in this package names
the size of a GPU generation. To add a generation, add one entry to ``_FAMILIES`` and a folder beside ``hopper``.

A trace does not always know where it will run. `target` says what is known:

* where a mesh or an abstract device is set (`jax.set_mesh`, `jax.sharding.use_abstract_mesh`), that device;
* outside jit, the device that holds the arguments;
* in a process without a GPU, the CPU (or jax's default device);
* otherwise, under jit, this process's GPU, but not with certainty: jit lowers one trace for every device that its
  arguments are committed to. An op then traces both implementations (`jax.lax.platform_dependent`), and lowering picks
  one. Tracing both takes longer, by about the time that the references take. Callers that hold the arrays avoid that:
  they get the device from `known` and set it with `pinned`.
"""

import contextlib
import contextvars
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.core import Tracer


@dataclass(frozen=True)
class Arch:
    """What a device has. ``name`` is the GPU generation, under which kernels are registered. For a device without
    kernels it is the platform, and the sizes are 0."""

    name: str
    device: str  # as the vendor calls it, such as "NVIDIA H200"
    compute_capability: str = ""
    sms: int = 0  # streaming multiprocessors
    shared_bytes: int = 0  # shared memory that one block may have
    instructions: frozenset[str] = frozenset()

    def __str__(self) -> str:
        if not self.compute_capability:
            return f"platform {self.name!r}"
        return f"{self.device} with compute capability {self.compute_capability}"


# The numbers of an H200. Interpreted kernels on a CPU are planned for it, too.
HOPPER = Arch("hopper", "NVIDIA H200", "9.0", 132, 227 * 1024, frozenset(("wgmma", "tma", "clusters")))
_FAMILIES = {HOPPER.compute_capability: HOPPER}
_CAPABILITIES = {"H100": "9.0", "H200": "9.0", "H800": "9.0", "H20": "9.0", "GH200": "9.0"}  # by a word of its name
ELSEWHERE = Arch("other", "any device without kernels")  # the target while the reference is traced beside a kernel


@dataclass(frozen=True)
class Target:
    """The device to trace for. It is not ``certain`` where the same trace may be lowered for another platform."""

    arch: Arch
    certain: bool = True


_pinned: contextvars.ContextVar[Arch | None] = contextvars.ContextVar("arch", default=None)


def arch_of(device: Any) -> Arch:
    """The `Arch` of a `jax.Device` or `jax.sharding.AbstractDevice`. An abstract device has no compute capability, so
    its name decides."""
    if device.platform not in ("gpu", "cuda"):
        return Arch(device.platform, device.device_kind)
    words = device.device_kind.replace("-", " ").split()
    by_name = next((_CAPABILITIES[word] for word in words if word in _CAPABILITIES), "unknown")
    capability = getattr(device, "compute_capability", None) or by_name
    family = _FAMILIES.get(capability, Arch("gpu", device.device_kind, capability))
    cores = getattr(device, "core_count", None) or getattr(device, "num_cores", None)
    return replace(family, device=device.device_kind, sms=cores or family.sms)


def target(arguments: Iterable[Any] = ()) -> Target:
    """The device for which a computation on ``arguments`` is traced. The module's docstring lists the rules."""
    if (pinned := _pinned.get()) is not None:
        return Target(pinned)
    if (abstract := jax.sharding.get_abstract_mesh().abstract_device) is not None:
        return Target(arch_of(abstract))
    if (gpu := _gpu()) is None:
        return Target(arch_of(jax.devices()[0]))
    arrays = [a for a in arguments if isinstance(a, jax.Array)]
    if arrays and not any(isinstance(a, Tracer) for a in arrays):
        return Target(arch_of(min(arrays[0].devices(), key=lambda device: device.id)))
    return Target(arch_of(gpu), certain=False)


def planned() -> Arch:
    """The device that a kernel plans for: `target`, or `HOPPER` where that has no kernels (interpreted kernels)."""
    found = target().arch
    return found if found.sms else HOPPER


def known(tree: Any) -> Arch | None:
    """The device that holds the arrays of a tree; None where they are traced and the device is not certain."""
    found = target(jax.tree.leaves(tree))
    return found.arch if found.certain else None


@contextlib.contextmanager
def pinned(arch: Arch | None) -> Iterator[None]:
    """Trace everything inside the ``with`` block for ``arch``; None changes nothing. jit's cache does not know
    ``arch``, so a function that is compiled inside must take it as a static argument."""
    token = _pinned.set(arch or _pinned.get())
    try:
        yield
    finally:
        _pinned.reset(token)


def elsewhere() -> bool:
    """Whether the current trace is for `ELSEWHERE`."""
    return _pinned.get() is ELSEWHERE


def _gpu() -> Any:
    try:
        return jax.devices("gpu")[0]
    except RuntimeError:  # this process has none
        return None

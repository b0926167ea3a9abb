"""Free memory and nominal memory bandwidth of the device, and memory that is given back to the system."""

import contextlib
import ctypes
import os
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

Device = Any  # a jax.Device; jax exports that name as a variable, which type checkers reject as a type

# Bytes per second from the vendors' data sheets, for the percentage in the line of figures.
_BANDWIDTH = {
    "NVIDIA H200": 4.8e12,
    "NVIDIA H100 80GB HBM3": 3.35e12,
    "NVIDIA H100 PCIe": 2.0e12,
    "NVIDIA A100-SXM4-80GB": 2.039e12,
    "NVIDIA A100-SXM4-40GB": 1.555e12,
    "NVIDIA L40S": 0.864e12,
    "NVIDIA GeForce RTX 4090": 1.008e12,
    "NVIDIA GeForce RTX 3090": 0.936e12,
}

# Tokens a second of one row, relative to float32, by platform and the format of weights. Measured with SmolLM2-135M on
# two cores: docs/log-products.md, "CPU".
_DECODE_SPEED = {"cpu": {"float32": 1.0, "bfloat16": 1.0, "int8": 1.9}}
_WORTH_SAYING = 1.3  # how many times as fast it must be


def quicker_format(device: Device, found: str) -> str | None:
    """The format of weights that decodes clearly faster than ``found`` on a device, by measurement; None if there is
    none, or if nothing is known."""
    speeds = _DECODE_SPEED.get(device.platform, {})
    best = max(speeds, key=lambda name: speeds[name], default=found)
    return best if found in speeds and speeds[best] >= _WORTH_SAYING * speeds[found] else None


def default_device() -> Device:
    """The device on which arrays are placed by default."""
    return jax.devices()[0]


def bandwidth(device: Device) -> float | None:
    """Memory bandwidth of the device in bytes per second; None if it is not known."""
    return _BANDWIDTH.get(device.device_kind)


def free_bytes(device: Device) -> int | None:
    """Free memory of the device in bytes; None if it cannot be found out."""
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        return stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else None
    free = _meminfo_available()
    limit, used = (_integer(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        free = min(limit - used, free if free is not None else limit)
    return free


def trim_heap() -> None:
    """Return freed memory to the system. glibc keeps freed blocks of a few megabytes, and each thread of XLA has its
    own heap. For a large model, this adds up to gigabytes of unused memory."""
    with contextlib.suppress(OSError, AttributeError):  # other C libraries have no malloc_trim
        ctypes.CDLL(None).malloc_trim(0)


def free_on(mesh: Mesh | None) -> int | None:
    """Free memory of the default device, or of each device of a mesh that this process has."""
    if mesh is None:
        return free_bytes(default_device())
    devices = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    free = [n for n in map(free_bytes, devices) if n is not None]
    if not free:
        return None
    return min(free) // len(devices) if devices[0].platform == "cpu" else min(free)  # CPU devices share the memory


def _meminfo_available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        names = ("SC_PAGE_SIZE", "SC_AVPHYS_PAGES")
        return os.sysconf(names[0]) * os.sysconf(names[1]) if all(n in os.sysconf_names for n in names) else None
    return next(
        (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")),
        None,
    )


def _integer(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None  # "max": no limit

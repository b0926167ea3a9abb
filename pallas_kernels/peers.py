"""Whether the devices of a mesh can write into one another's memory from inside a kernel.

A kernel that adds up over devices needs a direct connection between any two, and all devices in one process.
"""

import ctypes
import functools
import os
from typing import Any

from jax.sharding import Mesh

MOST_DEVICES = 8  # that Mosaic has tables for


def why_apart(mesh: Mesh) -> str | None:
    """Why a kernel cannot add up over the devices of a mesh of GPUs. None where it can, and on other platforms, which
    have no kernels."""
    devices = tuple(mesh.devices.flat)
    return _why_apart(devices) if devices[0].platform == "gpu" else None


def _why_apart(devices: tuple[Any, ...]) -> str | None:
    if len(devices) > MOST_DEVICES:
        return f"a launch spans at most {MOST_DEVICES} devices, found {len(devices)}"
    if len({device.process_index for device in devices}) > 1:
        return "the devices belong to several processes"
    if [device.id for device in devices] != list(range(len(devices))):
        return f"a launch spans the devices from 0 on, in their order, found {[device.id for device in devices]}"
    if len({(device.device_kind, getattr(device, "core_count", None)) for device in devices}) > 1:
        return "the devices are of several kinds"
    allocator = os.environ.get("XLA_PYTHON_CLIENT_ALLOCATOR", "default")
    if allocator not in ("default", "bfc", "platform"):
        return f"XLA_PYTHON_CLIENT_ALLOCATOR={allocator}: its memory is not open to other devices"
    return _why_not_connected(tuple(device.local_hardware_id for device in devices))


_CAN_ACCESS, _NATIVE_ATOMICS = 2, 3  # CU_DEVICE_P2P_ATTRIBUTE_...: only NVLink has native atomics


@functools.cache
def _why_not_connected(ordinals: tuple[int, ...]) -> str | None:
    """Why two of the GPUs are not peers over NVLink."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "libcuda.so.1, which knows how devices are connected, is not there"
    found = ctypes.c_int()
    for a in ordinals:
        for b in ordinals:
            for attribute in (_CAN_ACCESS, _NATIVE_ATOMICS) if a != b else ():
                failed = driver.cuDeviceGetP2PAttribute(ctypes.byref(found), attribute, a, b)
                if failed or not found.value:
                    return f"devices {a} and {b} are not connected by NVLink"
    return None

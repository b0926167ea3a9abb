"""``--tp`` and ``--dp``: the mesh of devices that a command runs on."""

import argparse

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from jllama.errors import InputError


def mesh_of(args: argparse.Namespace) -> Mesh | None:
    """The mesh that the flags ask for; None: one device."""
    for flag in ("tp", "dp"):
        if getattr(args, flag) < 1:
            raise InputError(f"--{flag}: expected at least 1, found {getattr(args, flag)}")
    needed, devices = args.tp * args.dp, jax.devices()
    if needed == 1 and jax.process_count() == 1:
        return None
    if needed > len(devices) or (jax.process_count() > 1 and needed != len(devices)):
        flags = " ".join(f"--{flag} {getattr(args, flag)}" for flag in ("tp", "dp") if getattr(args, flag) > 1)
        found = f"{len(devices)} ({devices[0].device_kind})"
        found += f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
        raise InputError(f"{flags or '--tp 1'}: expected {needed} devices, found {found}")
    chosen = np.array(devices[:needed]).reshape(args.dp, args.tp)
    return Mesh(chosen, ("data", "model"), axis_types=(AxisType.Auto,) * 2)

"""Lowering for an H200 on a machine that has none."""

from collections.abc import Callable
from typing import Any

import jax

SMS = 132
H200 = jax.sharding.AbstractMesh(
    (), (), abstract_device=jax.sharding.AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=SMS)
)


def lower(f: Callable[..., Any], *args: Any) -> None:
    """Lower for an H200, on a machine that has none."""
    with jax.sharding.use_abstract_mesh(H200):
        jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",))


def several(**sizes: int) -> jax.sharding.AbstractMesh:
    """A mesh of H200s, with these sizes of its axes."""
    kinds = (jax.sharding.AxisType.Auto,) * len(sizes)
    shape, names = tuple(sizes.values()), tuple(sizes)
    return jax.sharding.AbstractMesh(shape, names, axis_types=kinds, abstract_device=H200.abstract_device)

"""Lowering for an H200 on a machine that has none."""

from collections.abc import Callable
from typing import Any

import jax

from bench.lowered_modules import watched

SMS = 132
H200 = jax.sharding.AbstractMesh(
    (), (), abstract_device=jax.sharding.AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=SMS)
)


def several(**sizes: int) -> jax.sharding.AbstractMesh:
    """A mesh of H200s, with these sizes of its axes."""
    kinds = (jax.sharding.AxisType.Auto,) * len(sizes)
    shape, names = tuple(sizes.values()), tuple(sizes)
    return jax.sharding.AbstractMesh(shape, names, axis_types=kinds, abstract_device=H200.abstract_device)


def lower(
    f: Callable[..., Any], *args: Any, ops: int = 6_000, equations: int = 30_000, mesh: Any = H200, **how: Any
) -> str:
    """Lower for an H200, or a mesh of some, on a machine that has none, and bound Mosaic's work for every kernel.
    ``how`` is for jit.

    The bounds are numbers of operations and solver steps, because seconds depend on the machine. Mosaic infers layouts
    with a constraint solver in Python. After each layout that it guesses, it goes through all equations of the kernel.
    So a kernel without explicit layouts may take minutes: the step of the 70B in int4 took a minute and 1,456,000
    visits of an equation. Now it takes 7,200. ``printed`` is explained in `bench.lowered_modules.Lowered`: that step
    had 12,300,000 while every load was an operation of its own."""
    with jax.sharding.use_abstract_mesh(mesh), watched(hashes=False) as kernels:
        text = jax.jit(f, **how).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert kernels
    for kernel in kernels:
        assert kernel.ops < ops
        assert kernel.equations < equations
        assert kernel.printed < 3_000_000
    return text

"""The persistent decode step of a model that several devices share.

Pallas's GPU interpreter has no memory of other devices. So the devices are simulated one after the other, with the
exchange between two launches: that shows what is sent, what is added up, and in which order. Real shapes are lowered
for devices that are not there. On GPUs the steps run (marker gpu, on a machine with several).
"""

import functools
import re
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_steps import EPS, FORMATS, ON_GPU, Case, arguments, compare, error
from h200 import SMS, lower, several
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec as P
from test_decode_step import abstract

from jllama.config import preset
from jllama.mesh.layout import widened
from pallas_kernels import StepWeights, decode_step, peers
from pallas_kernels.decode_step import CASES
from pallas_kernels.hopper.decode_step.checks import shape_of
from pallas_kernels.hopper.decode_step.interpreted import launch_per_phase
from pallas_kernels.hopper.decode_step.plan import StepTiles
from pallas_kernels.hopper.decode_step.run import step_arrays
from pallas_kernels.hopper.decode_step.tuned import plan_for_device

pytestmark = pytest.mark.timeout(240)

ROWS, COLUMNS = ("wqkv", "w_gate_up", "head"), ("wo", "w_down")  # what of a weight is divided


def shard(args: tuple, device: int, devices: int) -> tuple:
    """What one of the devices has of a step's arguments: some of the heads, of the hidden units and of the
    vocabulary."""
    x, w, k, v, *rest = args
    kv_heads, D, q_width = k.shape[2], k.shape[4], w.wo.shape[-1]

    def rows(a: jax.Array, sizes: list[int]) -> jax.Array:
        """A part of each of several matrices that are stacked along the rows."""
        parts = jnp.split(a, np.cumsum(sizes)[:-1], axis=-2)
        return jnp.concatenate([jnp.split(part, devices, axis=-2)[device] for part in parts], axis=-2)

    def columns(a: jax.Array) -> jax.Array:
        return a if a.shape[-1] == 1 else jnp.split(a, devices, axis=-1)[device]

    stacked = {
        "wqkv": [q_width, kv_heads * D, kv_heads * D],
        "w_gate_up": [w.w_down.shape[-1]] * 2,
        "head": [w.head.shape[0]],
    }
    parts = {name: jax.tree.map(functools.partial(rows, sizes=s), getattr(w, name)) for name, s in stacked.items()}
    parts |= {name: jax.tree.map(columns, getattr(w, name)) for name in COLUMNS}
    caches = [jnp.split(cache, devices, axis=2)[device] for cache in (k, v)]
    return x, replace(w, **parts), *caches, *rest


def test_simulated_devices() -> None:
    """Two devices, each with hidden units that are no multiple of a stage; N tiles overlap."""
    devices, case = 2, Case((9,), blocks=3, size=dict(layers=2, heads=4, kv_heads=2, hidden=640))
    args = case.arguments()
    shards = [shard(args, i, devices) for i in range(devices)]
    shape = replace(shape_of(*shards[0][:3], eps=EPS), devices=devices, axis="model")
    plan = plan_for_device(shape, StepTiles(depth=4, chunk=2048), case.blocks)
    plan = replace(plan, interpret=True)
    arrays = [step_arrays(plan, *one) for one in shards]
    left = launch_per_phase(plan, *zip(*arrays, strict=True), plgpu.InterpretGPUParams())  # type: ignore[arg-type]
    for one in left[1:]:  # the residual stream has the same bits everywhere
        np.testing.assert_array_equal(one.x, left[0].x)
    tokens, (B, T) = shape.tokens, args[0].shape[:2]
    logits = jnp.concatenate([one.logits[:tokens] for one in left], axis=-1).reshape(B, T, -1)
    caches = [jnp.concatenate([getattr(one, name) for one in left], axis=2) for name in "kv"]
    compare((logits, *caches), args)


# Lowered for H200s: the real shapes


def on_mesh(args: tuple, mesh: Any, backend: str = "pallas") -> Any:
    """A step under `jax.shard_map`, with what every device has of the arguments."""
    w = args[1]

    def spec(name: str, weight: Any) -> Any:
        lead = (None,) * (weight.ndim - 2)
        if name in ROWS:
            return jax.tree.map(lambda _: P(*lead, "model"), weight)
        if name in COLUMNS:
            return jax.tree.map(lambda a: P(*lead, None, "model") if a.shape[-1] > 1 else P(), weight)
        return P()

    weights = replace(w, **{field.name: spec(field.name, getattr(w, field.name)) for field in fields(StepWeights)})
    rows = "data" if "data" in mesh.axis_names else None
    cache, given = P(None, rows, "model"), P(rows)
    step = functools.partial(decode_step, eps=EPS, axis="model", backend=backend)
    layout = given, weights, cache, cache, given, given, given
    return jax.shard_map(step, mesh=mesh, in_specs=layout, out_specs=(P(rows, None, "model"), cache, cache))


@pytest.mark.parametrize(
    ("case", "fmt", "devices", "batch"),
    [("7b", "bf16", 4, 1), ("7b", "int4-g128", 4, 1), ("70b", "int8", 4, 1), ("70b", "int4-g128", 2, 8)],
)
def test_real_shapes_lower(case: str, fmt: str, devices: int, batch: int) -> None:
    hidden = widened(preset(case), devices, FORMATS[fmt].get("group")).hidden_dim
    args, mesh = abstract(fmt, batch, 1, 1024, **CASES[case] | dict(hidden=hidden)), several(model=devices)
    text = lower(on_mesh(args, mesh), *args, mesh=mesh)
    assert text.count("@mosaic_gpu") == 1
    assert "all_reduce" not in text
    assert "uses_xla_collective_metadata = true" in text


def test_groups_of_devices_lower() -> None:
    """Rows over ``data``, and in each group the model over ``model``."""
    args, mesh = abstract("bf16", 4, 1, 256, **CASES["tinyllama"]), several(data=2, model=2)
    text = lower(on_mesh(args, mesh), *args, mesh=mesh)
    assert text.count("@mosaic_gpu") == 1
    assert "all_reduce" not in text
    assert "uses_xla_collective_metadata = true" in text


def test_lowers_where_rows_are_divided() -> None:
    """Rows over the axis ``data``: a launch a device that exchanges nothing. The kernel changes arrays in place, which
    jax allows under `jax.shard_map` only if they are not marked as varying."""
    args, mesh = abstract("bf16", 4, 1, 256, **CASES["tinyllama"]), several(data=2)
    step = functools.partial(decode_step, eps=EPS, backend="pallas")
    rows, cache = P("data"), P(None, "data")
    given = rows, P(), cache, cache, rows, rows, rows
    text = lower(jax.shard_map(step, mesh=mesh, in_specs=given, out_specs=(rows, cache, cache)), *args, mesh=mesh)
    assert text.count("@mosaic_gpu") == 1
    assert "uses_xla_collective_metadata = false" in text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(process_index=1), "belong to several processes"),
        (dict(id=5), r"from 0 on, in their order, found \[0, 5\]"),
        (dict(device_kind="NVIDIA H100"), "of several kinds"),
        ({}, "libcuda|not connected by NVLink"),
    ],
)
def test_devices_that_are_no_peers(change: dict[str, Any], reason: str) -> None:
    first = dict(id=0, process_index=0, device_kind="NVIDIA H200", core_count=SMS, local_hardware_id=98)
    devices = SimpleNamespace(**first), SimpleNamespace(**first | dict(id=1, local_hardware_id=99) | change)
    found = peers._why_apart(devices)
    assert found is not None
    assert re.search(reason, found)


# On GPUs


@pytest.mark.gpu
@pytest.mark.skipif(jax.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("fmt", ON_GPU)
def test_step_on_several_gpus(fmt: str) -> None:
    compare_with_psum(fmt, 1, (5, 0, 300))


@pytest.mark.gpu
@pytest.mark.skipif(jax.device_count() < 4, reason="needs four GPUs")
def test_step_in_groups_of_gpus() -> None:
    compare_with_psum("bf16", 2, (5, 0, 300, 64))


def compare_with_psum(fmt: str, groups: int, start: tuple[int, ...]) -> None:
    """A step is that of the reference, which adds up with psum, and has the same bits each time."""
    devices = (2 if jax.device_count() < 4 else 4) // groups
    size = dict(dim=1024, hidden=devices * 896, heads=16, kv_heads=8, head_dim=64, vocab=2048, layers=3)
    args = jax.jit(lambda: arguments(fmt, start, 2, 512, **size))()
    shape, names = ((groups, devices), ("data", "model")) if groups > 1 else ((devices,), ("model",))
    mesh = jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(shape))
    wanted = jax.jit(on_mesh(args, mesh, "xla"))(*args)
    step = jax.jit(on_mesh(args, mesh))
    out = step(*args)
    for mine, reference in zip(out, wanted, strict=True):
        assert error(mine, reference) < 2e-2
    for _ in range(100):
        jax.tree.map(np.testing.assert_array_equal, step(*args), out)

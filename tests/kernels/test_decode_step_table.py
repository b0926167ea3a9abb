"""The table of phases: the checks of its entries, the order of producer and consumers, and an added phase."""

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from decode_steps import EPS, SMALL, Case, error
from h200 import lower
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import StepWeights
from pallas_kernels.attention import attention_reference
from pallas_kernels.decode_step import CASES, decode_step_reference
from pallas_kernels.ffn import ffn_reference
from pallas_kernels.formats import WeightFormat
from pallas_kernels.hopper.common.tiles import Format
from pallas_kernels.hopper.decode_step.block import Block
from pallas_kernels.hopper.decode_step.memory import StepBuffers, buffer_shapes
from pallas_kernels.hopper.decode_step.phase import Phase, ProductPhase, check_table
from pallas_kernels.hopper.decode_step.plan import StepPlan, StepShape, StepTiles, plan_step
from pallas_kernels.hopper.decode_step.run import run_phases
from pallas_kernels.hopper.decode_step.schedule import TileStages, over_tiles
from pallas_kernels.hopper.decode_step.table import ATTEND, DOWN, GATE_UP, HEAD, LAYER_PHASES, OUT, QKV
from pallas_kernels.matmul import matmul_reference
from pallas_kernels.qkv import rotate, split_heads, write
from pallas_kernels.rms_norm import rms_norm_reference

DOCS = Path(__file__).parents[2] / "docs" / "kernels.md"


def plan_of(case: str, blocks: int, **tiles: int) -> StepPlan:
    sizes: dict[str, Any] = dict(batch=1, queries=1, max_len=1024, fmt=Format(WeightFormat.BFLOAT16))
    return plan_step(StepShape(**CASES[case], **sizes, eps=EPS), StepTiles(**tiles), blocks, LAYER_PHASES, HEAD)


def test_the_table_fits_together() -> None:
    check_table(LAYER_PHASES, HEAD)
    weights = {field.name for field in dataclasses.fields(StepWeights)}
    buffers = {field.name for field in dataclasses.fields(StepBuffers)}
    for phase in (*LAYER_PHASES, HEAD):
        assert {*phase.reads, *phase.writes} <= buffers
        if isinstance(phase, ProductPhase):
            assert {phase.weight, phase.gain or phase.weight} <= weights
    slots = [phase.scale_slot for phase in LAYER_PHASES if isinstance(phase, ProductPhase)]
    assert all(a != b for a, b in zip(slots, [*slots[1:], HEAD.scale_slot], strict=True))


@pytest.mark.parametrize(
    ("phases", "reason"),
    [
        ((ATTEND, QKV, OUT, GATE_UP, DOWN), "attend: no earlier phase writes qkv"),
        ((QKV, QKV, ATTEND, OUT, GATE_UP, DOWN), "different names"),
        ((QKV, ATTEND, OUT, GATE_UP, dataclasses.replace(DOWN, writes=("hidden",))), "down: a product phase must not"),
        ((QKV, ATTEND, dataclasses.replace(OUT, residual="logs"), GATE_UP, DOWN), "o: attend writes its residual logs"),
    ],
)
def test_phases_that_do_not_fit_are_refused(phases: tuple[Phase, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_table(phases, HEAD)


def test_counts_follow_from_the_table() -> None:
    """The arrivals and fills before a phase are the sum over all earlier phases, counted one by one."""
    plan = plan_of("tinyllama", 132)
    arrivals, fills = 0, {0: 0, 1: 0}
    for layer in range(3):
        for phase in plan.layer_phases:
            assert plan.arrivals_before(phase, layer) == arrivals
            arrivals += plan.blocks
            if isinstance(phase, ProductPhase):
                assert plan.scale_fills_before(phase, layer) == fills[phase.scale_slot]
                fills[phase.scale_slot] += 1
    assert plan.arrivals_before(HEAD, 3) == arrivals
    assert plan.scale_fills_before(HEAD, 3) == fills[HEAD.scale_slot]


def test_buffers_are_as_wide_as_they_are_read() -> None:
    plan = plan_of("7b", 132)
    shapes = buffer_shapes(plan)
    for phase in plan.product_phases:
        assert shapes[phase.reads[0]].shape[-1] >= plan.product(phase).padded_inner
        assert shapes[phase.writes[0]].shape[-1] >= getattr(plan.shape, phase.outer)
    assert shapes["x"] == shapes["x_mid"]


@pytest.mark.parametrize("blocks", [66, 132, 200])
@pytest.mark.parametrize("phase", [QKV, OUT, GATE_UP, DOWN, HEAD], ids=lambda phase: phase.name)
def test_producer_and_consumers_walk_the_same_stages(phase: ProductPhase, blocks: int) -> None:
    """The producer's order (Python integers) and the consumers' order (loop variables) are equal, and visit every step
    of every K split once."""
    plan = plan_of("tinyllama", blocks, chunk=2048)
    b = Block(plan, *[None] * 4, index=blocks - 1, warpgroup=0)  # type: ignore[arg-type]

    def order(unroll: bool) -> list[tuple[int, ...]]:
        stages: list[tuple[int, ...]] = []

        def visit(s: TileStages, count: Any) -> Any:
            stages.append(tuple(map(int, (s.chunk, s.tile, s.first_step, s.number))))
            return s.after(count)

        with jax.disable_jit():
            count = over_tiles(b, phase, jnp.int32(0), visit, unroll=unroll)
        assert int(count) == sum(number for *_, number in stages)
        return stages

    p, stages = plan.product(phase), order(unroll=True)
    assert stages == order(unroll=False)
    steps = [sum(number for _, tile, _, number in stages if tile == t) for t in range(p.wgmma_tiles)]
    assert set(steps) == {p.split_steps if p.has_tile(blocks - 1) else 0}


# The worked example of docs/kernels.md


def documented_phases() -> tuple[Phase, ...]:
    """The table that the example's code makes."""
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL):
        exec(block, names)
    return names["WITH_QK_NORM"]


def reference(x: Any, w: StepWeights, k: Any, v: Any, start: Any, cos: Any, sin: Any) -> Any:
    """`decode_step_reference` with a norm of q and k."""
    ones, (L, _, kv_heads, _, D) = jnp.ones(k.shape[4], x.dtype), k.shape
    for i in range(L):
        h = rms_norm_reference(x, w.attn_norm[i], eps=EPS)
        heads = split_heads(matmul_reference(h, w.wqkv[i]), w.wqkv.shape[1] // D // kv_heads - 2, D)
        q, k_new = (rotate(rms_norm_reference(a, ones, eps=EPS), cos, sin) for a in heads[:2])
        k, v = write(k, k_new, start, i), write(v, heads[2], start, i)
        x = x + matmul_reference(attention_reference(q, k[i], v[i], start).reshape(*x.shape[:2], -1), w.wo[i])
        x = ffn_reference(x, w.ffn_norm[i], w.w_gate_up[i], w.w_down[i], eps=EPS)
    return matmul_reference(rms_norm_reference(x, w.norm, eps=EPS), w.head, out_dtype=jnp.float32), k, v


@pytest.mark.parametrize("blocks", [1, 2])
def test_a_norm_of_q_and_k_is_one_entry(blocks: int) -> None:
    x, weights, *rest = Case((5, 9), queries=2).arguments()
    args = x, dataclasses.replace(weights, wqkv=3 * weights.wqkv), *rest  # heads that a norm changes
    options = dict(tiles=StepTiles(depth=4, chunk=1024), blocks=blocks, interpret=plgpu.InterpretGPUParams())
    left = run_phases(*args, eps=EPS, layer_phases=documented_phases(), **options)  # type: ignore[arg-type]
    logits, k, v = jax.jit(reference)(*args)
    found = left.logits[:4].reshape(logits.shape)
    assert error(found, logits) < 2e-2
    assert error(left.k, k) < 2e-2
    assert error(left.v, v) < 2e-2
    without, k_without, _ = jax.jit(functools.partial(decode_step_reference, eps=EPS))(*args)
    assert error(found, without) > 0.1
    assert error(left.k, k_without) > 0.1


def test_a_norm_of_q_and_k_lowers() -> None:
    args = Case((5, 9), size=SMALL | dict(dim=1024, heads=8, kv_heads=2, head_dim=128)).arguments()
    lower(functools.partial(run_phases, eps=EPS, layer_phases=documented_phases()), *args)

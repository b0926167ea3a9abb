"""The persistent decode step against its reference.

Tiny models run in Pallas's GPU interpreter, with one launch per phase. Real shapes are lowered for an H200, as the
single launch that a GPU runs; that needs no GPU. On a Hopper GPU they run (marker gpu).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_steps import EPS, FORMATS, REFUSED, SMALL, Case, compare
from h200 import H200, SMS, lower
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

from jllama.cache import init_cache
from jllama.config import LlamaConfig
from jllama.model import forward
from jllama.params import init, stack
from jllama.rope import rotations as model_rotations
from jllama.step import step_weights
from pallas_kernels import QuantizedTensor, Unsupported
from pallas_kernels.decode_step import CASES, StepWeights, check, decode_step, decode_step_kernel
from pallas_kernels.hopper.common.limbs import split_into_limbs
from pallas_kernels.hopper.decode_step.checks import shape_of
from pallas_kernels.hopper.decode_step.memory import buffer_shapes
from pallas_kernels.hopper.decode_step.plan import StepTiles
from pallas_kernels.hopper.decode_step.tuned import plan_for_device

pytestmark = pytest.mark.timeout(240)  # twice the time on a slow machine with two cores

SMALL_CASES = {
    "one-launch": Case((70,), 128, blocks=1, size=dict(layers=2)),  # all phases, while the producer runs ahead
    "one-launch-in-chunks": Case(
        (0, 65), 128, queries=3, blocks=1, size=dict(layers=2, hidden=1280), tiles=dict(chunk=1024, consumers=1)
    ),
    "ragged-from-empty": Case((0, 5, 64), 72, blocks=5, tiles=dict(stages=1)),
    "many-tokens-past-the-end": Case((61,), queries=4, size=dict(head_dim=128, heads=2), tiles=dict(chunk=1024)),
    "chunks-of-one-token": Case((5,), blocks=1, size=dict(hidden=1280), tiles=dict(chunk=1024)),
    "cuts-in-chunks-the-last-shorter": Case((5,), blocks=4, size=dict(hidden=2176)),
    "a-tile-of-two-cuts": Case((3,), blocks=3, size=dict(dim=256, heads=4, kv_heads=2, hidden=128)),
    "int8": Case((9,), fmt="int8", blocks=1),
    "int8-groups": Case((9,), fmt="int8-g64", queries=2, blocks=1),
    "int4": Case((9,), fmt="int4-g128", queries=2, blocks=1, size=dict(dim=256, heads=4, kv_heads=2)),
    "int4-a-tile-of-two-cuts-the-last-half-a-stage": Case(
        (5,), fmt="int4-g128", blocks=3, size=dict(dim=256, heads=4, kv_heads=2, hidden=640), tiles=dict(step=256)
    ),
}


@pytest.mark.parametrize("name", SMALL_CASES)
def test_phases_interpreted(name: str) -> None:
    case = SMALL_CASES[name]
    args = case.arguments()
    tiles = StepTiles(**(dict(depth=4, chunk=2048, consumers=2) | case.tiles))
    even = SMALL["dim"] // 8 % case.blocks == 0
    interpret = plgpu.InterpretGPUParams(detect_races=even)
    out = decode_step_kernel(*args, eps=EPS, tiles=tiles, blocks=case.blocks, interpret=interpret)
    jax.block_until_ready(out)
    assert not (even and interpret_pallas_call.get_races().races_found)
    compare(out, args)


@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30, 0.0])
def test_limbs_add_up_to_x(size: float) -> None:
    """Two limbs hold every bit of a bfloat16 that is not far below the largest of its block."""
    x = jax.random.normal(jax.random.key(0), (8, 256), jnp.float32).astype(jnp.bfloat16) * jnp.bfloat16(size)
    (first, second), scale = split_into_limbs(x)
    assert jnp.abs(first.astype(jnp.int32)).max() <= 127
    exact = np.asarray(x, np.float64)
    back = np.asarray(scale, np.float64)[:, None] * (np.asarray(first) * 256.0 + np.asarray(second)) / (127 * 256)
    assert np.abs(back - exact).max(initial=0) <= 2.0**-16 * 2 * np.abs(exact).max(initial=0)
    assert np.linalg.norm(back - exact) <= 1e-4 * np.linalg.norm(exact)


def test_limbs_of_nan_and_infinity_are_not_finite() -> None:
    x = jnp.ones((2, 256), jnp.bfloat16).at[0, 3].set(jnp.nan).at[1, 5].set(jnp.inf)
    limbs, scale = split_into_limbs(x)
    assert not jnp.isfinite(sum(d.astype(jnp.float32) for d in limbs) * scale[:, None]).any()


# The reference


def test_reference_is_the_models_forward() -> None:
    """Two steps of `jllama.model.forward` and of the reference, on stacked weights and cache."""
    config = LlamaConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=96, vocab_size=80)
    params = init(config, jax.random.key(0), dtype=jnp.float32)
    weights = step_weights(stack(params))
    cache = init_cache(config, 2, 16, jnp.float32).replace(lengths=jnp.array([3, 0], jnp.int32))
    step = jax.jit(functools.partial(decode_step, eps=config.norm_eps, backend="xla"))
    whole = jax.jit(functools.partial(forward, backend="xla"))
    k, v = jnp.stack(cache.k), jnp.stack(cache.v)
    for tokens in (jnp.array([[7, 9], [8, 1]]), jnp.array([[5], [6]])):
        start = cache.lengths
        cos, sin = model_rotations(start[:, None] + jnp.arange(tokens.shape[1]), config)
        x = params.embed[tokens]
        logits, k, v = step(x, weights, k, v, start, cos, sin)
        wanted, cache = whole(params, tokens, cache)
        np.testing.assert_allclose(logits, wanted, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(k, jnp.stack(cache.k), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(v, jnp.stack(cache.v), rtol=1e-5, atol=1e-5)


# Lowered for an H200: the real shapes


def abstract(fmt: str, batch: int, queries: int, max_len: int, **size: int) -> tuple:
    """The arguments of a real model, without its gigabytes."""
    array, L, D, dim = jax.ShapeDtypeStruct, size["layers"], size["head_dim"], size["dim"]

    def weight(*shape: int) -> Any:
        form = FORMATS[fmt]
        if not form:
            return array(shape, jnp.bfloat16)
        scale = (*shape[:-1], shape[-1] // form.get("group", shape[-1]))
        data = array(shape, form["fmt"])
        return QuantizedTensor(data, array(scale, jnp.float16 if "group" in form else jnp.float32))  # type: ignore[arg-type]

    norms = [array(shape, jnp.bfloat16) for shape in ((L, dim), (L, dim), (dim,))]
    weights = StepWeights(
        attn_norm=norms[0],  # type: ignore[arg-type]
        wqkv=weight(L, (size["heads"] + 2 * size["kv_heads"]) * D, dim),
        wo=weight(L, dim, size["heads"] * D),
        ffn_norm=norms[1],  # type: ignore[arg-type]
        w_gate_up=weight(L, 2 * size["hidden"], dim),
        w_down=weight(L, dim, size["hidden"]),
        norm=norms[2],  # type: ignore[arg-type]
        head=weight(size["vocab"], dim),
    )
    x, cache = (array(s, jnp.bfloat16) for s in ((batch, queries, dim), (L, batch, size["kv_heads"], max_len, D)))
    rotation = array((batch, queries, D // 2), jnp.float32)
    return x, weights, cache, cache, array((batch,), jnp.int32), rotation, rotation


@pytest.mark.parametrize(
    ("case", "fmt", "batch", "queries"),
    [("7b", "bf16", 1, 1), ("7b", "int8", 8, 1), ("7b", "int4-g128", 1, 8), ("70b", "bf16", 1, 8),
     ("70b", "int4-g128", 1, 8), ("tinyllama", "bf16", 3, 2), ("tinyllama", "int4-g128", 1, 8)],
)  # fmt: skip
def test_real_shapes_lower(case: str, fmt: str, batch: int, queries: int) -> None:
    args = abstract(fmt, batch, queries, 1024, **CASES[case])
    with jax.sharding.use_abstract_mesh(H200):
        check(*args, eps=EPS)
    text = lower(functools.partial(decode_step_kernel, eps=EPS), *args, ops=5_000, equations=10_000)
    assert text.count("@mosaic_gpu") == 1  # one launch, whose buffers, the cache among them, are changed in place
    shape = shape_of(*args[:3], eps=EPS)
    assert (
        text.count("output_tuple_indices") == len(buffer_shapes(plan_for_device(shape, blocks=SMS))) + 2 + 1
    )  # k, v, semaphore


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(queries=9), "1 to 8 tokens"),
        (dict(head_dim=32), "head_dim must be 64 or 128"),
        (dict(heads=64, kv_heads=4), "at most 8 query heads"),
        (dict(max_len=1023), "multiple of 8"),
        (dict(dim=2048 + 32), "dim must be a multiple of 64"),
        (dict(vocab=32001), "vocab must be a multiple of 8"),
    ],
)
def test_refused_with_the_reason(change: dict[str, int], reason: str) -> None:
    size = CASES["tinyllama"] | change
    args = abstract("bf16", 1, size.pop("queries", 1), size.pop("max_len", 1024), **size)
    with jax.sharding.use_abstract_mesh(H200), pytest.raises(Unsupported, match=reason):
        check(*args, eps=EPS)


@pytest.mark.parametrize("fmt", REFUSED)
def test_refused_formats(fmt: str) -> None:
    args = abstract(fmt, 1, 1, 1024, **CASES["tinyllama"])
    with jax.sharding.use_abstract_mesh(H200), pytest.raises(Unsupported, match="has run on a GPU"):
        check(*args, eps=EPS)


def test_refused_tiles() -> None:
    args = abstract("int4-g128", 1, 1, 1024, **CASES["tinyllama"])
    with jax.sharding.use_abstract_mesh(H200), pytest.raises(Unsupported, match="groups of 128 inputs: must divide 64"):
        check(*args, eps=EPS, tiles=StepTiles(step=64))


def test_refused_under_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "/tmp/mps")
    args = abstract("bf16", 1, 1, 1024, **CASES["tinyllama"])
    with jax.sharding.use_abstract_mesh(H200), pytest.raises(Unsupported, match="CUDA_MPS_PIPE_DIRECTORY"):
        check(*args, eps=EPS)


def test_refused_dtypes_and_grids() -> None:
    args = abstract("bf16", 1, 1, 1024, **CASES["tinyllama"])
    mixed = dataclasses.replace(args[1], head=jax.ShapeDtypeStruct(args[1].head.shape, jnp.float16))
    with jax.sharding.use_abstract_mesh(H200):
        with pytest.raises(Unsupported, match="one format"):
            check(args[0], mixed, *args[2:], eps=EPS)
        with pytest.raises(Unsupported, match="would wait for one another forever"):
            check(*args, eps=EPS, blocks=133)

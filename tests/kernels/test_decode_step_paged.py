"""The persistent decode step over pages gives, bit for bit, what it gives over a contiguous cache."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_steps import (
    EPS,
    ON_GPU,
    SMALL_ON_GPU,
    Case,
    arguments,
    compare_pages,
    error,
    exact,
    in_pages,
    on_host,
    rotations,
    same_bits,
)
from h200 import H200, lower
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

from bench.lowered_modules import decode_step_case
from pallas_kernels import Unsupported
from pallas_kernels.decode_step import check, decode_step, decode_step_kernel
from pallas_kernels.hopper.decode_step.plan import StepTiles
from pallas_kernels.paged_attention import PAGE

pytestmark = pytest.mark.timeout(240)  # twice the time on a slow machine with two cores

NONE = 99  # no page


def interpreted(args: tuple, **how: Any) -> tuple:
    tiles, interpret = StepTiles(depth=4, chunk=2048, consumers=2), plgpu.InterpretGPUParams(detect_races=True)
    out = decode_step_kernel(*args, eps=EPS, tiles=tiles, blocks=1, interpret=interpret, **how)
    jax.block_until_ready(out)
    assert not interpret_pallas_call.get_races().races_found
    return out


def test_pages_interpreted() -> None:
    """Rows 0 and 1 share a page, row 1 ends at the end of its table, row 2 is empty, row 3 has lost its pages."""
    case = Case((64, 127, 0, 70), queries=2, size=dict(layers=2))
    table = np.asarray([[1, 5], [1, 3], [NONE, NONE], [NONE, NONE]])
    contiguous, paged, listed = in_pages(case.arguments(), table, 7)
    out = interpreted(paged, table=listed)
    compare_pages(out, interpreted(contiguous), paged, table)
    assert error(out[0][0], exact(paged, listed)[0][0]) < 2e-2


def test_reference_over_pages_is_the_reference() -> None:
    """For rows whose tokens all have a page. A row that has none reads what it finds."""
    size = dict(dim=64, hidden=96, heads=4, kv_heads=2, head_dim=16, vocab=40, layers=1)
    args = arguments("bf16", (64, 127, 0), 2, PAGE, draws=on_host, **size)
    table = np.asarray([[1, 5, NONE], [1, 3, 2], [NONE] * 3])
    contiguous, paged, listed = in_pages(args, table, 7)
    out, wanted = exact(paged, listed), exact(contiguous)
    np.testing.assert_allclose(out[0][:2], wanted[0][:2], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out[1][:, 2, :, 0], wanted[1][:, 1, :, 2 * PAGE], rtol=1e-5, atol=1e-5)
    untouched = np.asarray([0, 4, 6])
    for found, before in zip(out[1:], paged[2:4], strict=True):
        np.testing.assert_array_equal(found[:, untouched], before[:, untouched].astype(jnp.float32))


# Lowered for an H200: the real shapes


@pytest.mark.parametrize(
    ("model", "fmt", "batch"), [("7b", "int4-g128", 1), ("70b", "int8", 8), ("tinyllama", "bf16", 3)]
)
def test_real_shapes_over_pages_lower(model: str, fmt: str, batch: int) -> None:
    case = decode_step_case(model, fmt, batch, 1, paged=True)
    table = case.options["table"]
    with jax.sharding.use_abstract_mesh(H200):
        check(*case.args, eps=EPS, table=table)

    def step(*args: Any) -> Any:
        return decode_step_kernel(*args[:-1], eps=EPS, table=args[-1])

    text = lower(step, *case.args, table, equations=10_000, donate_argnums=(2, 3))
    assert text.count("@mosaic_gpu") == 1
    entry = text[text.index("@main") :].splitlines()[0]
    assert entry.count("tf.aliasing_output") == 2
    pool = "x".join(map(str, case.args[2].shape))
    touched = [line for line in text.splitlines() if f"tensor<{pool}xbf16>" in line and "func" not in line]
    assert all("mosaic_gpu" in line or line.strip().startswith("return") for line in touched), touched


@pytest.mark.parametrize(
    ("size", "table", "reason"),
    [
        (16, jax.ShapeDtypeStruct((8, 4), jnp.int32), "pages must hold 64 positions, found 16"),
        (64, jax.ShapeDtypeStruct((7, 4), jnp.int32), "integers for 8 rows, found int32 \\(7, 4\\)"),
        (64, jax.ShapeDtypeStruct((8, 4), jnp.float32), "integers for 8 rows, found float32"),
        (64, jax.ShapeDtypeStruct((8, 0), jnp.int32), "integers for 8 rows"),
    ],
)
def test_refused_with_the_reason(size: int, table: jax.ShapeDtypeStruct, reason: str) -> None:
    x, weights, k, _, *rest = decode_step_case("tinyllama", "bf16", 8, 1, paged=True).args
    pool = jax.ShapeDtypeStruct((*k.shape[:3], size, k.shape[4]), k.dtype)
    with jax.sharding.use_abstract_mesh(H200), pytest.raises(Unsupported, match=reason):
        check(x, weights, pool, pool, *rest, eps=EPS, table=table)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", ON_GPU)
def test_many_steps_over_pages_on_gpu(fmt: str) -> None:
    """2,000 steps over donated pages read the keys that they wrote. A second run, and one over a contiguous cache, give
    the same bits."""
    size, steps, P = SMALL_ON_GPU, 2000, 33
    table = np.random.RandomState(1).permutation(3 * P).reshape(3, P)
    args = arguments(fmt, (0, 7, 90), 1, 8, **size)
    contiguous, paged, listed = in_pages(args, table, 3 * P + 1)
    xs = jax.random.normal(jax.random.key(1), (steps, 3, 1, size["dim"]), jnp.bfloat16)

    def run(k: jax.Array, v: jax.Array, **how: Any) -> tuple:
        def one(carry: tuple, x: jax.Array) -> tuple:
            k, v, start = carry
            place = start, *rotations(start, 1, size["head_dim"])
            logits, k, v = decode_step(x, args[1], k, v, *place, eps=EPS, backend="pallas", **how)
            return (k, v, start + 1), logits

        (k, v, _), logits = jax.lax.scan(one, (k, v, args[4]), xs)
        return logits, k, v

    step = jax.jit(run, donate_argnums=(0, 1))
    first, again = (step(*map(jnp.copy, paged[2:4]), table=listed) for _ in range(2))
    same_bits(first, again)
    np.testing.assert_array_equal(first[0], step(*contiguous[2:4])[0])

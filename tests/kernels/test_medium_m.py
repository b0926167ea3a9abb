"""The medium-M GEMM and what follows attention in a layer, against float32 references.

Small shapes are interpreted, real ones are lowered for an H200, and run on a Hopper GPU (marker gpu)."""

import collections
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from h200 import H200, SMS, lower
from jax.experimental.mosaic.gpu.fragmented_array import FragmentedArray
from jax.experimental.pallas import mosaic_gpu as plgpu
from test_products import FORMATS, abstract, error, exact, interpreter, normal, race_free, weight

from pallas_kernels import (
    LayerView,
    QuantizedTensor,
    SplitRows,
    Unsupported,
    dequantize,
    finish_layer,
    matmul,
    split_rows,
    takes_limbs,
)
from pallas_kernels.finish_layer import CASES, check_finish_layer, finish_layer_kernel
from pallas_kernels.hopper.add_norm import add_norm, warpgroups_for
from pallas_kernels.hopper.common.tiles import format_of
from pallas_kernels.hopper.gemm.medium_m import check_medium_m, medium_m_gemm
from pallas_kernels.hopper.gemm.medium_m_plan import EXACT_COLUMNS, MediumMProblem, MediumMTiles, make_plan
from pallas_kernels.rms_norm import rms_norm_reference

pytestmark = pytest.mark.timeout(120)

EPS = 1e-5
Array = jax.Array


# The interpreter: small shapes, every path


SPLIT = (33, 192, MediumMTiles(64, k_splits=2, depth=3), 3)  # K splits, added by a fusion
TWO_CONSUMERS = (9, 128, MediumMTiles(128, depth=2), 1)
OVERLAPPING = (200, 80, MediumMTiles(80, depth=2), 1)  # wgmma tiles that overlap, and columns of two accumulators
FEW_ROWS = (17, 192, MediumMTiles(48, depth=2), 2)  # of x, fewer than wgmma takes
MOVED_UP = (200, 96, MediumMTiles(96, k_splits=2, depth=2), 2)  # the last consumer's rows of x, of which some have two


@pytest.mark.parametrize(
    ("fmt", "case"),
    [
        ("bf16", SPLIT),
        ("int8", TWO_CONSUMERS),
        ("int8-g32", OVERLAPPING),
        ("int4-g128", SPLIT),
        ("bf16", FEW_ROWS),
        ("bf16", MOVED_UP),
    ],
)
def test_medium_m_interpreted(fmt: str, case: tuple[int, int, MediumMTiles, int]) -> None:
    rows, out, tiles, sms = case
    x, w = normal(0, rows, 256), weight(fmt, out, 256)
    # Where wgmma tiles overlap, two warpgroups write the same values to one place: the detector would call that a race.
    detects = case is not OVERLAPPING
    params = interpreter() if detects else plgpu.InterpretGPUParams()
    y = medium_m_gemm(x, w, out_dtype=jnp.float32, tiles=tiles, sms=sms, interpret=params)
    # Of more columns, scaled weights are rounded, as the reference rounds them.
    wanted = exact(x, w, rounded=rows > EXACT_COLUMNS)
    assert error(race_free(y) if detects else y, wanted) < 1e-5


@pytest.mark.parametrize(("case", "swiglu"), [(SPLIT, False), ((12, 384, MediumMTiles(192, depth=2), 1), True)])
def test_medium_m_interpreted_with_limbs(case: tuple[int, int, MediumMTiles, int], swiglu: bool) -> None:
    rows, out, tiles, sms = case
    x, w = normal(0, rows, 256), weight("int8", out, 256)
    how = dict(swiglu=swiglu, out_dtype=jnp.float32, tiles=tiles, sms=sms, interpret=interpreter())
    y = race_free(medium_m_gemm(split_rows(x), w, **how))
    assert 1e-6 < error(y, exact(x, w, swiglu=swiglu)) < 1e-4  # less would say that nothing was split


@pytest.mark.parametrize("fmt", ["bf16", "int4-g128"])
def test_medium_m_interpreted_with_everything_after_it(fmt: str) -> None:
    """SwiGLU, whose gate and up lie across the consumers, a layer of a stack, float16, several work tiles a block."""
    x, w = normal(0, 17, 256, dtype=jnp.float16), weight(fmt, 3, 384, 256)
    w = w if isinstance(w, QuantizedTensor) else w.astype(jnp.float16)
    residual = normal(2, 17, 192, dtype=jnp.float16)
    how = dict(swiglu=True, out_dtype=jnp.float32, tiles=MediumMTiles(192, depth=2), sms=1, interpret=interpreter())
    y = race_free(medium_m_gemm(x, w, layer=2, residual=residual, **how))
    assert error(y, exact(x, w[2], swiglu=True, residual=residual)) < 1e-5


def test_add_norm_interpreted_with_limbs() -> None:
    sums, x, w = normal(0, 3, 5, 512, dtype=jnp.float32), normal(1, 5, 512), normal(2, 512)
    y, h = add_norm(sums, x, w, eps=EPS, split=True, interpret=interpreter())
    wanted = (sums[0] + sums[1] + sums[2] + x.astype(jnp.float32)).astype(x.dtype)  # in the order of the splits
    np.testing.assert_array_equal(race_free(y), wanted)
    assert isinstance(h, SplitRows)
    assert error(h.x, rms_norm_reference(wanted, w, eps=EPS)) < 1e-3
    for found, expected in zip(jax.tree.leaves(h), jax.tree.leaves(split_rows(h.x)), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_finish_layer_interpreted() -> None:
    out, x, norms = normal(0, 10, 1, 128), normal(1, 10, 1, 256), [normal(i, 256) for i in (2, 3)]
    wo, gate_up, down = weight("int8", 256, 128), weight("int8", 256, 256, seed=4), weight("bf16", 256, 128, seed=5)
    assert takes_limbs(x, gate_up)
    y, h = finish_layer_kernel(
        out, x, wo, norms[0], gate_up, down, norms[1], eps=EPS, sms=2, interpret=plgpu.InterpretGPUParams()
    )
    y1, h1 = finish_layer.reference(*floats(out, x, wo, norms[0], gate_up, down, norms[1]), eps=EPS)
    assert error(y, y1) < 5e-3
    assert error(h, h1) < 5e-3


def floats(*arrays: Any) -> list[Array]:
    return [dequantize(a) if isinstance(a, QuantizedTensor) else a.astype(jnp.float32) for a in arrays]


# Lowered for an H200: the real shapes


def arguments(case: str, fmt: str, rows: int) -> tuple[Any, ...]:
    dim, hidden, q_width = (CASES[case][n] for n in ("dim", "hidden", "q_width"))
    out, x, norm = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((rows, 1, q_width), (rows, 1, dim), (dim,)))
    weights = [abstract(fmt, 3, *shape) for shape in ((dim, q_width), (2 * hidden, dim), (dim, hidden))]
    return out, x, weights[0], norm, weights[1], weights[2], norm


@pytest.mark.parametrize(
    ("case", "fmt", "rows"),
    [
        ("7b", "bf16", 256),
        ("7b", "int8", 16),
        ("7b", "int8", 256),
        ("7b", "int4-g128", 64),
        ("7b", "int8-g32", 32),
        ("llama3-8b", "bf16", 16),
        ("70b", "int4-g128", 128),
        ("tinyllama", "bf16", 64),
        ("tinyllama", "int8", 64),
    ],
)
def test_a_layer_is_five_launches(case: str, fmt: str, rows: int) -> None:
    """Between the kernels nothing is left for XLA but names of the same bytes: reshapes."""

    def run(out: Array, x: Array, wo: Any, ffn_norm: Array, gate_up: Any, down: Any, norm: Array) -> Any:
        wo, gate_up, down = (LayerView(w, 1) for w in (wo, gate_up, down))
        return finish_layer(out, x, wo, ffn_norm, gate_up, down, norm, eps=EPS, backend="pallas")

    with jax.sharding.use_abstract_mesh(H200):
        text = jax.jit(run).trace(*arguments(case, fmt, rows)).lower(lowering_platforms=("cuda",)).as_text()
    functions = {name: ops(body) for name, body in re.findall(r"func\.func \w+ @(\w+)\((.*?)\n  }", text, re.DOTALL)}
    main = functions.pop("main")
    assert all(kernel.pop("custom_call") == 1 and set(kernel) <= {"reshape"} for kernel in functions.values())
    assert main["call"] == 5
    # Of so many rows, the large-M GEMM is faster for gate and up as integers: it halves the tiles of its last wave.
    assert sum("large_m" in name for name in functions) == (rows > 192 and fmt != "bf16")
    assert set(main) <= {"call", "constant", "reshape"}


def ops(text: str) -> dict[str, int]:
    """How often every operation stands in a function."""
    return dict(collections.Counter(re.findall(r"= (?:stablehlo\.)?(\w+)", re.sub(r"\{.*", "", text))))


@pytest.mark.parametrize("dim", [512, 1536, 2048, 2560, 5120, 8192])
def test_add_norm_sums_nothing_in_memory_that_its_warpgroups_share(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mosaic adds up the warps of a warpgroup in scratch memory of the block. Several warpgroups race there on a GPU;
    the interpreter does not see it."""
    reduce, sums = FragmentedArray.reduce, []

    def recorded(array: Any, op: Any, axis: Any, scratch: Any = None, **how: Any) -> Any:
        sums.append(scratch)
        return reduce(array, op, axis, scratch, **how)

    monkeypatch.setattr(FragmentedArray, "reduce", recorded)
    shapes = ((3, 64, dim), jnp.float32), ((64, dim), jnp.bfloat16), ((dim,), jnp.bfloat16)
    lower(functools.partial(add_norm, eps=EPS), *(jax.ShapeDtypeStruct(*s) for s in shapes))
    assert sums
    assert set(sums) == {None}


@pytest.mark.parametrize("out_dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("rows", [16, 64])
def test_products_of_a_batch_are_one_launch(rows: int, out_dtype: Any) -> None:
    for out in (12288, 32000):
        x, w = jax.ShapeDtypeStruct((rows, 1, 4096), jnp.bfloat16), abstract("bf16", out, 4096)
        with jax.sharding.use_abstract_mesh(H200):
            run = jax.jit(lambda x, w: matmul(x, w, out_dtype=out_dtype, backend="pallas"))
            text = run.trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("@mosaic_gpu") == 1
        assert not re.search(r"stablehlo\.(add|convert|transpose|pad|concatenate|multiply)", text)


@pytest.mark.parametrize("rows", [9, 32, 64])
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("case", CASES)
def test_plan_keeps_the_gpu_busy(case: str, fmt: str, rows: int) -> None:
    """The busiest multiprocessor reads little more than the mean."""
    dim, hidden = CASES[case]["dim"], CASES[case]["hidden"]
    for out, inner, swiglu in ((2 * hidden, dim, True), (dim, hidden, False), (3 * dim, dim, False)):
        form = format_of(abstract(fmt, out, inner))
        problem = MediumMProblem(form, rows, inner, out, swiglu, jnp.bfloat16, jnp.bfloat16, not swiglu)
        p = make_plan(problem, None, SMS)
        assert p.turns * p.n_tile * -(-p.steps // p.k_splits) < 1.3 * out * p.steps / SMS
        assert p.depth >= 3


# What is refused


@pytest.mark.parametrize(
    ("shape", "fmt", "reason"),
    [
        ((4096, 4000), "bf16", "4000 inputs: must be a multiple of 64"),
        ((4100, 4096), "bf16", "4100 outputs: must be a multiple of 8, at least 64"),
        ((48, 4096), "bf16", "48 outputs: must be a multiple of 8, at least 64"),
    ],
)
def test_refused(shape: tuple[int, int], fmt: str, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        check_medium_m(jax.ShapeDtypeStruct((9, shape[1]), jnp.bfloat16), abstract(fmt, *shape))


def test_refused_layers() -> None:
    with pytest.raises(Unsupported, match="8 rows: from 9 to 256 gain"):
        check_finish_layer(*arguments("7b", "bf16", 8))
    *most, norm = arguments("7b", "bf16", 9)
    with pytest.raises(Unsupported, match="norms have shapes"):
        check_finish_layer(*most, jax.ShapeDtypeStruct((8,), norm.dtype))
    assert [warpgroups_for(dim) for dim in (640, 576, 16640)] == [None] * 3


def test_limbs_are_for_batches_and_for_int8_with_one_scale_a_row() -> None:
    def taken(rows: int, fmt: str = "int8", inner: int = 4096) -> bool:
        x = jax.ShapeDtypeStruct((rows, 1, inner), jnp.bfloat16)
        return takes_limbs(x, LayerView(abstract(fmt, 3, 12288, inner), 1))

    assert [taken(rows) for rows in (8, 9, 96, 97)] == [False, True, True, False]
    assert not any(taken(64, fmt) for fmt in FORMATS if fmt != "int8")
    assert taken(64, inner=2**17)
    assert not taken(64, inner=2**17 + 64)  # int32 sums could overflow


# Compiled, on a Hopper GPU


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [9, 33, 64, 100, 256])
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("case", ["7b", "tinyllama"])
def test_finish_layer_on_gpu(case: str, fmt: str, rows: int) -> None:
    dim, hidden, q_width = (CASES[case][n] for n in ("dim", "hidden", "q_width"))
    out, x, norms = normal(0, rows, 1, q_width), normal(1, rows, 1, dim), [normal(i, dim) for i in (2, 3)]
    shapes = (dim, q_width), (2 * hidden, dim), (dim, hidden)
    wo, gate_up, down = (jax.jit(lambda s=s, i=i: weight(fmt, *s, seed=i))() for i, s in enumerate(shapes))
    run = jax.jit(functools.partial(finish_layer, eps=EPS, backend="pallas"))
    y, h = run(out, x, wo, norms[0], gate_up, down, norms[1])
    y1, h1 = finish_layer.reference(*floats(out, x, wo, norms[0], gate_up, down, norms[1]), eps=EPS)
    assert error(y, y1) < 5e-3
    assert error(h, h1) < 5e-3
    for _ in range(3):
        np.testing.assert_array_equal(run(out, x, wo, norms[0], gate_up, down, norms[1])[0], y)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [9, 64, 256])
@pytest.mark.parametrize("fmt", FORMATS)
def test_swiglu_on_gpu(fmt: str, rows: int) -> None:
    x, w = normal(0, rows, 4096), jax.jit(lambda: weight(fmt, 22016, 4096))()
    y = jax.jit(lambda x, w: medium_m_gemm(x, w, swiglu=True, out_dtype=jnp.float32))(x, w)
    assert error(y, exact(x, w, swiglu=True, rounded=rows > EXACT_COLUMNS)) < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "tiles"),
    [
        (17, MediumMTiles(48)),
        (128, MediumMTiles(176, 64)),
        (200, MediumMTiles(176, 64)),
        (256, MediumMTiles(96, 64, k_splits=2)),
    ],
)
def test_rows_first_on_gpu(rows: int, tiles: MediumMTiles) -> None:
    x, w = normal(0, rows, 4096), jax.jit(lambda: weight("bf16", 4400, 4096))()
    for swiglu in [False] if tiles.k_splits > 1 else [False, True]:
        y = jax.jit(lambda x, w, s=swiglu: medium_m_gemm(x, w, swiglu=s, tiles=tiles))(x, w)
        assert error(y, exact(x, w, swiglu=swiglu)) < 3e-3


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [9, 40, 64, 96])
@pytest.mark.parametrize("swiglu", [False, True])
def test_limbs_on_gpu(rows: int, swiglu: bool) -> None:
    x, w = normal(0, rows, 4096), jax.jit(lambda: weight("int8", 12288, 4096))()
    run = jax.jit(lambda x, w: medium_m_gemm(split_rows(x), w, swiglu=swiglu, out_dtype=jnp.float32))
    y = run(x, w)
    assert error(y, exact(x, w, swiglu=swiglu)) < 1e-4
    np.testing.assert_array_equal(run(x, w), y)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [512, 2048, 4096, 5120, 8192])
def test_add_norm_with_limbs_on_gpu(dim: int) -> None:
    sums, x, w = normal(0, 3, 64, dim, dtype=jnp.float32), normal(1, 64, dim), normal(2, dim)
    y, h = jax.jit(functools.partial(add_norm, eps=EPS, split=True))(sums, x, w)
    assert error(h.x, rms_norm_reference(y, w, eps=EPS)) < 1e-3
    expected = split_rows(h.x)
    np.testing.assert_allclose(h.scale, expected.scale, rtol=1e-6)
    whole, wanted = (254 * a[0].astype(jnp.int32) + a[1] for a in (h.limbs, expected.limbs))
    assert int(jnp.abs(whole - wanted).max()) <= 1

"""The product and feed-forward kernels against float32 references.

Small shapes run in Pallas's GPU interpreter, with its race detector. Real shapes are lowered for an H200, which needs
no GPU and finds what the interpreter cannot: wrong layouts, tile sizes, shared memory. On a Hopper GPU they run (marker
gpu).
"""

import functools
from typing import Any

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from h200 import SMS, lower
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import QuantizedTensor, Unsupported, dequantize, ffn, matmul, quantize
from pallas_kernels.ffn import CASES as FFN_CASES
from pallas_kernels.ffn import check_ffn, ffn_kernel, ffn_reference
from pallas_kernels.hopper.common.limbs import split_into_limbs
from pallas_kernels.hopper.common.tiles import format_of
from pallas_kernels.hopper.gemm.large_m import LargeMTiles, check_large_m, large_m_gemm
from pallas_kernels.hopper.gemm.small_m import SmallMTiles, check_small_m, plan, small_m_gemm
from pallas_kernels.hopper.gemm.small_m import tiles_for as small_m_tiles_for
from pallas_kernels.hopper.rms_norm import check_norm, norm_rows
from pallas_kernels.matmul import CASES, check_product, product
from pallas_kernels.rms_norm import CASES as NORM_CASES
from pallas_kernels.rms_norm import rms_norm, rms_norm_reference

pytestmark = pytest.mark.timeout(120)

FORMATS = {
    "bf16": {},
    "int8": dict(fmt="int8"),
    "int8-g32": dict(fmt="int8", group=32),
    "int4-g128": dict(fmt="int4", group=128),
}
Array = jax.Array


def normal(seed: int, *shape: int, dtype: Any = jnp.bfloat16) -> Array:
    return draws.normal(seed, shape, dtype)


def weight(fmt: str, *shape: int, seed: int = 1) -> Any:
    return stored(fmt, normal(seed, *shape))


@functools.partial(jax.jit, static_argnums=0)
def stored(fmt: str, w: Array) -> Any:
    """Weights in a format. Every row has another size: bfloat16 has so few bits that many rows would have one scale,
    and a kernel that reads the scale of another row would pass."""
    rows = (0.5 + jnp.arange(w.shape[-2]) % 97 / 97) * w.shape[-1] ** -0.5
    w *= rows[:, None].astype(w.dtype)
    return quantize(w, **FORMATS[fmt]) if FORMATS[fmt] else w


def abstract(fmt: str, *shape: int) -> Any:
    """An abstract weight of a real shape, which takes no memory."""
    if not FORMATS[fmt]:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    group = FORMATS[fmt].get("group", shape[-1])
    return QuantizedTensor(
        jax.ShapeDtypeStruct(shape, FORMATS[fmt]["fmt"]),  # type: ignore[arg-type]
        jax.ShapeDtypeStruct(
            (*shape[:-1], shape[-1] // group), jnp.float16 if "group" in FORMATS[fmt] else jnp.float32
        ),  # type: ignore[arg-type]
    )


@functools.partial(jax.jit, static_argnames=("swiglu", "rounded"))
def exact(x: Array, w: Any, *, swiglu: bool = False, residual: Array | None = None, rounded: bool = False) -> Array:
    """The product in float32. With ``rounded``, the dequantised weights are first rounded to x's dtype."""
    if isinstance(w, QuantizedTensor):
        grouped = w.scale.shape[-1] > 1
        w = dequantize(w, x.dtype if rounded and grouped else jnp.float32)
    y = jnp.matmul(x.astype(jnp.float32), w.astype(jnp.float32).T, precision="highest")
    if swiglu:
        gate, up = jnp.split(y, 2, axis=-1)
        y = jax.nn.silu(gate) * up
    return y if residual is None else y + residual.astype(jnp.float32)


def error(y: Array, reference: Array) -> float:
    y, reference = np.asarray(y, np.float32), np.asarray(reference, np.float32)
    assert y.shape == reference.shape
    return float(np.linalg.norm(y - reference) / np.linalg.norm(reference))


def interpreter() -> Any:
    return plgpu.InterpretGPUParams(detect_races=True)


def race_free(y: Array) -> Array:
    """``y``, after a check that the race detector found no race between warpgroups."""
    y.block_until_ready()
    assert not interpret_pallas_call.get_races().races_found
    return y


# The interpreter: small shapes, every path


@pytest.mark.parametrize(
    ("rows", "out", "tiles", "sms"),
    [
        (1, 192, SmallMTiles(step=128, consumers=2, n_tile=64, k_splits=1, depth=4), 3),  # finished in the kernel
        (2, 160, SmallMTiles(step=128, consumers=1, n_tile=32, k_splits=1, depth=2), 3),  # fewer rows than a wgmma tile
        (8, 176, SmallMTiles(step=256, consumers=3, n_tile=88, k_splits=1, depth=3), 1),  # tiles that overlap
        (3, 192, SmallMTiles(step=128, consumers=2, n_tile=64, depth=4), 3),  # K splits
    ],
)
@pytest.mark.parametrize("fmt", FORMATS)
def test_small_m_interpreted(fmt: str, rows: int, out: int, tiles: SmallMTiles, sms: int) -> None:
    x, w = normal(0, rows, 512), weight(fmt, out, 512)
    y = race_free(small_m_gemm(x, w, out_dtype=jnp.float32, tiles=tiles, sms=sms, interpret=interpreter()))
    assert error(y, exact(x, w)) < 1e-5


@pytest.mark.parametrize("size", [1e-30, 1.0, 3e30])
def test_three_limbs_are_a_row(size: float) -> None:
    """Inputs that are a hundredth of the row's largest keep every bit."""
    x = (normal(0, 4, 4096) * jnp.bfloat16(size)).at[:, 5].mul(100)
    limbs, scale = split_into_limbs(x, 3)
    back = sum(np.asarray(d, np.float64) * 256 ** (2 - i) for i, d in enumerate(limbs)) / 2**21
    small = np.delete(back * np.asarray(scale, np.float64)[:, None] - np.asarray(x, np.float64), 5, axis=1)
    assert np.abs(small).max() <= 2.0**-21 * np.abs(np.asarray(x, np.float64)).max()
    assert np.linalg.norm(small) <= 5e-5 * np.linalg.norm(np.delete(np.asarray(x, np.float64), 5, axis=1))


@pytest.mark.parametrize(
    ("rows", "out", "tiles", "sms"),
    [
        (1, 192, SmallMTiles(step=128, consumers=2, n_tile=64, k_splits=1, depth=4, limbs=True), 3),
        # Fewer rows than a wgmma tile; several work tiles per block; K splits.
        (2, 160, SmallMTiles(step=128, consumers=1, n_tile=32, k_splits=1, depth=2, limbs=True), 3),
        (2, 176, SmallMTiles(step=256, consumers=3, n_tile=88, k_splits=1, depth=3, limbs=True), 1),
        (1, 320, SmallMTiles(step=128, consumers=2, n_tile=64, depth=4, limbs=True), 4),
    ],
)
@pytest.mark.parametrize("fmt", ["int8", "int4-g128"])
def test_small_m_interpreted_with_limbs(fmt: str, rows: int, out: int, tiles: SmallMTiles, sms: int) -> None:
    """The largest input does not matter: one in the first row is a hundred times the others."""
    x, w = normal(0, rows, 768).at[0, 5].mul(100), weight(fmt, out, 768)
    y = race_free(small_m_gemm(x, w, out_dtype=jnp.float32, tiles=tiles, sms=sms, interpret=interpreter()))
    assert error(y, exact(x, w)) < 1e-6


@pytest.mark.parametrize("fmt", ["bf16", "int8", "int4-g128"])
def test_small_m_interpreted_with_everything_after_it(fmt: str) -> None:
    """SwiGLU, a layer of a stack, N tiles that are no multiple of 64, float16, several work tiles per block."""
    x, w = normal(0, 2, 256, dtype=jnp.float16), weight(fmt, 3, 176, 256)
    w = w if isinstance(w, QuantizedTensor) else w.astype(jnp.float16)
    residual = normal(2, 2, 88, dtype=jnp.float16)
    tiles = SmallMTiles(step=128, consumers=1, n_tile=88, k_splits=1, depth=2, limbs=fmt != "bf16")
    y = race_free(
        small_m_gemm(
            x,
            w,
            layer=2,
            swiglu=True,
            residual=residual,
            out_dtype=jnp.float32,
            tiles=tiles,
            sms=1,
            interpret=interpreter(),
        )
    )
    assert error(y, exact(x, w[2], swiglu=True, residual=residual)) < 1e-5


@pytest.mark.parametrize(
    ("fmt", "swiglu", "how"),
    [(fmt, False, "halves") for fmt in FORMATS]
    + [
        ("bf16", True, "split_rows"),
        ("bf16", True, "halves"),
        ("int8", True, "exchange"),
        ("int4-g128", True, "exchange"),
    ],
)
def test_large_m_interpreted(fmt: str, swiglu: bool, how: str) -> None:
    """Every way in which the two consumers divide a tile."""
    x, w = normal(0, 100, 128), weight(fmt, 256 if swiglu else 128, 128)
    tiles = {
        "halves": LargeMTiles(out=128, rows=64, depth=2),
        "split_rows": LargeMTiles(out=64, rows=64, split_rows=True, depth=2),
        "exchange": LargeMTiles(out=64, rows=192, exchange=True, depth=2),
    }[how]
    y = race_free(large_m_gemm(x, w, swiglu=swiglu, out_dtype=jnp.float32, tiles=tiles, sms=2, interpret=interpreter()))
    # Consumers exchange values rounded to x's dtype, as the reference rounds gate and up.
    assert error(y, exact(x, w, swiglu=swiglu, rounded=True)) < (3e-3 if how == "exchange" else 1e-5)


@pytest.mark.parametrize(
    ("tiles", "sms"),
    [
        (LargeMTiles(out=128, rows=64, depth=2), 1),
        (LargeMTiles(out=128, rows=128, depth=3, row_splits=2), 2),  # two whole tiles of four, two partial ones
        (LargeMTiles(out=128, rows=128, depth=3, row_splits=2, pair=True), 4),
    ],
)
def test_large_m_interpreted_with_residual(tiles: LargeMTiles, sms: int) -> None:
    x, w, residual = normal(0, 192, 128), weight("bf16", 2, 256, 128), normal(2, 192, 256)
    y = race_free(large_m_gemm(x, w, layer=1, residual=residual, tiles=tiles, sms=sms, interpret=interpreter()))
    assert error(y, exact(x, w[1], residual=residual)) < 3e-3


@pytest.mark.parametrize(("rows", "dim"), [(5, 256), (2, 384)])
def test_norm_interpreted(rows: int, dim: int) -> None:
    x, w = normal(0, rows, dim), normal(2, dim)
    y = race_free(norm_rows(x, w, eps=1e-5, interpret=interpreter()))
    assert error(y, rms_norm_reference(x, w, eps=1e-5)) < 1e-3


@pytest.mark.parametrize("rows", [2, 65])
def test_ffn_interpreted(rows: int) -> None:
    x, norm = normal(0, 1, rows, 256), normal(1, 256)
    gate_up, down = weight("bf16", 256, 256), weight("bf16", 256, 128)
    y = ffn_kernel(x, norm, gate_up, down, eps=1e-5, sms=2, interpret=interpreter())
    reference = ffn_reference(*(a.astype(jnp.float32) for a in (x, norm, gate_up, down)), eps=1e-5)
    assert error(race_free(y), reference) < 3e-3


# Lowered for an H200: the real shapes


@pytest.mark.parametrize(("case", "rows"), [("7b-down", 1), ("70b-gate-up", 8), ("70b-gate-up", 33), ("13b-down", 512)])
@pytest.mark.parametrize("fmt", FORMATS)
def test_real_shapes_lower(fmt: str, case: str, rows: int) -> None:
    out, inner = CASES[case]["out"], CASES[case]["inner"]
    x, w = jax.ShapeDtypeStruct((rows, inner), jnp.bfloat16), abstract(fmt, out, inner)
    check_product(x, w)
    equations = 60_000 if fmt == "int8-g32" else 30_000  # groups of 32: four scales a step for every row
    lower(lambda x, w: product(x, w, out_dtype=jnp.float32), x, w, equations=equations)


@pytest.mark.parametrize("rows", [512, 1024, 4096])
@pytest.mark.parametrize("fmt", ["bf16", "int8"])
def test_tiles_that_fill_the_gpu_lower(fmt: str, rows: int) -> None:
    """Pairs of blocks, and halves of the remaining tiles."""
    for out, swiglu in ((12288, False), (22016, True)):
        x, w = jax.ShapeDtypeStruct((rows, 4096), jnp.bfloat16), abstract(fmt, out, 4096)
        check_large_m(x, w, swiglu=swiglu)
        lower(lambda x, w, swiglu=swiglu: large_m_gemm(x, w, swiglu=swiglu), x, w)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("case", NORM_CASES)
def test_norm_lowers(case: str, dtype: Any) -> None:
    rows, dim = NORM_CASES[case]["rows"], NORM_CASES[case]["dim"]
    x, w = jax.ShapeDtypeStruct((rows, dim), dtype), jax.ShapeDtypeStruct((dim,), dtype)
    check_norm(x, w)
    lower(lambda x, w: norm_rows(x, w, eps=1e-5), x, w)


@pytest.mark.parametrize(
    ("case", "fmt", "rows"),
    [(case, fmt, rows) for case in FFN_CASES for fmt in ("bf16", "int4-g128") for rows in (1, 512)]
    + [("70b", "bf16", 8), ("70b", "bf16", 64), ("70b", "int8", 1), ("70b", "int8", 8), ("70b", "int8", 64)]
    + [("70b", "int8", 512), ("70b", "int4-g128", 8), ("70b", "int4-g128", 64)],
)
def test_ffn_lowers(case: str, fmt: str, rows: int) -> None:
    dim, hidden = FFN_CASES[case]["dim"], FFN_CASES[case]["hidden"]
    x, norm = jax.ShapeDtypeStruct((1, rows, dim), jnp.bfloat16), jax.ShapeDtypeStruct((dim,), jnp.bfloat16)
    gate_up, down = abstract(fmt, 2 * hidden, dim), abstract(fmt, dim, hidden)
    check_ffn(x, norm, gate_up, down)
    lower(lambda *a: ffn_kernel(*a, eps=1e-5), x, norm, gate_up, down)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("rows", [1, 8])
def test_plan_keeps_the_gpu_busy(case: str, fmt: str, rows: int) -> None:
    """The busiest multiprocessor reads little more than the mean, and has enough copies in flight to keep the memory
    busy."""
    out, inner = CASES[case]["out"], CASES[case]["inner"]
    form = format_of(abstract(fmt, out, inner))
    p = plan(out, inner, rows, form, small_m_tiles_for(form, out, inner, rows), SMS)
    turns = -(-p.n_tiles * p.k_splits // p.blocks)
    assert turns * p.n_tile * -(-p.steps // p.k_splits) < 1.2 * out * p.steps / SMS
    assert p.depth * p.n_tile * (inner // p.steps) * form.bits / 8 > 32 * 1024


# What kernels refuse, before anything runs


@pytest.mark.parametrize(
    ("shape", "dtype", "rows", "reason"),
    [
        ((4096, 4096), jnp.float32, 1, "must be bfloat16 or float16"),
        ((4096, 4096), jnp.float16, 1, "weight is bfloat16 but activations are float16"),
        ((4096, 288), jnp.bfloat16, 1, "288 inputs: must be a multiple of 128"),
        ((4100, 4096), jnp.bfloat16, 1, "4100 outputs: must be a multiple of 8"),
        ((4096, 288), jnp.bfloat16, 300, "288 inputs: must be a multiple of 64"),
        ((4000, 4096), jnp.bfloat16, 300, "4000 outputs: must be a multiple of 128"),
    ],
)
def test_refused(shape: tuple[int, int], dtype: Any, rows: int, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        check_product(jax.ShapeDtypeStruct((rows, shape[1]), dtype), abstract("bf16", *shape))


def test_refused_rows_and_inputs() -> None:
    w = abstract("bf16", 4096, 4096)
    with pytest.raises(Unsupported, match="at most 8 rows, found 9"):
        check_small_m(jax.ShapeDtypeStruct((9, 4096), jnp.bfloat16), w)
    with pytest.raises(Unsupported, match="activations have 4032 inputs, the weight has 4096"):
        check_large_m(jax.ShapeDtypeStruct((65, 4032), jnp.bfloat16), w)
    with pytest.raises(Unsupported, match="norm has shape"):
        check_ffn(jax.ShapeDtypeStruct((1, 4096), jnp.bfloat16), jnp.ones(8), w, w)


def test_refused_limbs() -> None:
    x, tiles = jax.ShapeDtypeStruct((1, 4096), jnp.bfloat16), SmallMTiles(step=128, consumers=2, limbs=True)
    for fmt in ("bf16", "int8-g32"):
        with pytest.raises(Unsupported, match="limbs are for integer weights"):
            check_small_m(x, abstract(fmt, 4096, 4096), tiles=tiles)
    with pytest.raises(Unsupported, match="limbs of at most 2 rows, found 3"):
        check_small_m(jax.ShapeDtypeStruct((3, 4096), jnp.bfloat16), abstract("int8", 4096, 4096), tiles=tiles)


def test_refused_pairs() -> None:
    x, pair = jax.ShapeDtypeStruct((512, 4096), jnp.bfloat16), LargeMTiles(out=128, rows=256, pair=True)
    with pytest.raises(Unsupported, match="384 outputs: must be a multiple of 256"):
        check_large_m(x, abstract("bf16", 384, 4096), tiles=pair)
    with pytest.raises(Unsupported, match="for float weights"):
        check_large_m(x, abstract("int8", 512, 4096), tiles=pair)


@pytest.mark.parametrize(
    ("dim", "dtype", "reason"),
    [
        (4096, jnp.float32, "must be bfloat16 or float16"),
        (4100, jnp.bfloat16, "4100 features: must be a multiple of 128"),
    ],
)
def test_refused_norms(dim: int, dtype: Any, reason: str) -> None:
    x, w = jax.ShapeDtypeStruct((1, dim), dtype), jax.ShapeDtypeStruct((dim,), dtype)
    with pytest.raises(Unsupported, match=reason):
        check_norm(x, w)


def test_few_rows_are_normed_by_xla_on_every_backend() -> None:
    few, many, w = jnp.ones((4, 128)), jnp.ones((512, 128)), jnp.ones(128)
    assert rms_norm.choose("pallas", few, w, eps=1e-5).why.startswith("fewer than")
    with pytest.raises(Unsupported, match="rms_norm: "):
        rms_norm(many, w, eps=1e-5, backend="pallas")


# Compiled, on a Hopper GPU


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [256, 4096])
@pytest.mark.parametrize("dim", [2048, 4096, 5120, 8192])
def test_norm_on_gpu(dim: int, rows: int) -> None:
    x, w = normal(0, rows, dim), normal(2, dim)
    y = rms_norm(x, w, eps=1e-5, backend="pallas")
    assert error(y, rms_norm_reference(x.astype(jnp.float32), w.astype(jnp.float32), eps=1e-5)) < 3e-3


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 8, 33, 64, 100, 512])
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("case", ["7b-down", "13b-down", "7b-head", "70b-gate-up"])
def test_product_on_gpu(case: str, fmt: str, rows: int) -> None:
    out, inner = CASES[case]["out"], CASES[case]["inner"]
    # One input is a hundred times the others. The limbs of the others must still be precise.
    x, w = normal(0, rows, inner).at[0, 5].mul(100), jax.jit(lambda: weight(fmt, out, inner))()
    run = jax.jit(lambda x, w: matmul(x, w, out_dtype=jnp.float32, backend="pallas"))
    y, reference = run(x, w), exact(x, w, rounded=rows > 64)
    assert error(y, reference) < 1e-4
    if rows in (8, 512):  # a compilation takes seconds
        assert error(matmul(x, w, backend="pallas"), reference) < 3e-3
    for _ in range(3):
        np.testing.assert_array_equal(run(x, w), y)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 100])
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("case", FFN_CASES)
def test_ffn_on_gpu(case: str, fmt: str, rows: int) -> None:
    dim, hidden = FFN_CASES[case]["dim"], FFN_CASES[case]["hidden"]
    x, norm = normal(0, 1, rows, dim), normal(1, dim)
    gate_up, down = jax.jit(lambda: (weight(fmt, 2 * hidden, dim), weight(fmt, dim, hidden, seed=2)))()
    y = ffn(x, norm, gate_up, down, eps=1e-5, backend="pallas")
    full = [dequantize(w) if isinstance(w, QuantizedTensor) else w.astype(jnp.float32) for w in (gate_up, down)]
    reference = ffn_reference(x.astype(jnp.float32), norm.astype(jnp.float32), *full, eps=1e-5)
    assert error(y, reference) < 5e-3  # three roundings to bf16 on the way: the norm, the hidden layer, the result

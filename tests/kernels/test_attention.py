"""The attention kernels against the reference in float32: interpreted, cross-lowered, and compiled on the GPU."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from h200 import lower
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import Unsupported, attention, decode_attention
from pallas_kernels.attention import CASES, attention_reference
from pallas_kernels.hopper.attention import decode as flash_decode
from pallas_kernels.hopper.attention import prefill as flash_attention

TOLERANCE = 5e-3  # relative to the norm, for 16-bit inputs and outputs


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes of one call; ``size`` multiplies the queries, and so the scores."""

    T: int
    S: int
    heads: int
    kv_heads: int
    head_dim: int
    start: tuple[int, ...]
    dtype: str = "bfloat16"
    size: float = 1.0

    @property
    def batch(self) -> int:
        return len(self.start)

    def shapes(self) -> list[jax.ShapeDtypeStruct]:
        """q, k, v and start."""
        keys = (self.batch, self.kv_heads, self.S, self.head_dim)
        return [
            jax.ShapeDtypeStruct((self.batch, self.T, self.heads, self.head_dim), self.dtype),
            *[jax.ShapeDtypeStruct(keys, self.dtype)] * 2,
            jax.ShapeDtypeStruct((self.batch,), jnp.int32),
        ]

    def arguments(self, seed: int = 0) -> list[jax.Array]:
        q, k, v, _ = self.shapes()
        q, k, v = (normal(3 * seed + i, a.shape, self.dtype) for i, a in enumerate((q, k, v)))
        return [q * jnp.asarray(self.size, self.dtype), k, v, jnp.array(self.start, jnp.int32)]


# Small enough for the interpreter: a few tiles that cover every case of the schedule.
PREFILL_SMALL = {
    "diagonal": Case(130, 136, 2, 1, 64, (0,)),
    "continued-ragged": Case(70, 300, 2, 2, 128, (100, 230), "float16"),
    "one-token": Case(1, 3, 2, 2, 128, (0, 2)),
    "large-scores": Case(9, 40, 2, 1, 64, (0, 31), size=30.0),
}
DECODE_SMALL = {
    "one-query": Case(1, 200, 2, 2, 64, (150,)),
    "shared-8-to-1": Case(3, 300, 8, 1, 128, (63, 290), "float16", 10.0),
    "eight-queries-odd": Case(8, 77, 8, 1, 64, (0, 64), size=10.0),
    "first-token": Case(1, 1, 2, 2, 64, (0,)),
    "many-parts": Case(1, 1100, 4, 1, 64, (1090,)),
}
# Real sizes, compiled on the GPU.
PREFILL = {
    **PREFILL_SMALL,
    "7b": Case(1024, 1024, 32, 32, 128, (0,)),
    "70b-odd": Case(1001, 1003, 64, 8, 128, (0, 2)),
    "tinyllama": Case(777, 2048, 32, 4, 64, (0, 500, 1271), "float16"),
    "chunk-far-behind": Case(256, 8192, 8, 8, 128, (7000, 0)),
    "rows-past-cache": Case(200, 128, 4, 4, 128, (0,)),
}
DECODE = {
    **DECODE_SMALL,
    "7b": Case(1, 4096, 32, 32, 128, (4095,)),
    "70b": Case(8, 8192, 64, 8, 128, (0, 8000), size=10.0),
    "tinyllama-odd": Case(5, 1001, 32, 4, 64, (0, 500, 996), "float16"),
    "ragged-batch": Case(1, 300, 16, 2, 128, (0, 63, 64, 299), size=30.0),
    "one-key-head": Case(1, 8192, 8, 1, 128, (8000,)),
    "split-between-two-queries": Case(2, 128, 4, 4, 64, (62, 126)),
}
SMALL = [("prefill", n) for n in PREFILL_SMALL] + [("decode", n) for n in DECODE_SMALL]
FULL = [("prefill", n) for n in PREFILL] + [("decode", n) for n in DECODE]


def find(kind: str, name: str) -> tuple[Case, Callable[..., jax.Array]]:
    if kind == "prefill":
        return PREFILL[name], flash_attention.flash_attention
    return DECODE[name], flash_decode.flash_decode


@jax.jit
def exact(q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array) -> jax.Array:
    """The reference in float32."""
    return attention_reference(*(x.astype(jnp.float32) for x in (q, k, v)), start)


def error(out: jax.Array, arguments: list[jax.Array]) -> float:
    """The distance from the reference in float32, relative to its norm."""
    reference = np.asarray(exact(*arguments))
    return float(np.linalg.norm(np.asarray(out, np.float32) - reference) / np.linalg.norm(reference))


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("kind", "name"), SMALL)
def test_interpreted(kind: str, name: str) -> None:
    case, kernel = find(kind, name)
    # Small tiles and two stages, so that every slot of the ring is reused.
    tiles = (
        flash_attention.PrefillTiles(keys=64, stages=2, blocks=2)  # several items per block
        if kind == "prefill"
        else flash_decode.DecodeTiles(keys=64, stages=2, blocks=8 * case.heads)
    )
    arguments = case.arguments()
    out = kernel(*arguments, tiles=tiles, interpret=plgpu.InterpretGPUParams(detect_races=True))
    assert error(out, arguments) < TOLERANCE
    assert not gpu_callbacks.get_races().races_found


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("kind", "name"), [case for case in FULL if case not in SMALL])
def test_lowers_for_hopper(kind: str, name: str) -> None:
    case, kernel = find(kind, name)
    text = lower(kernel, *case.shapes())
    assert "mosaic_gpu" in text


def test_keys_behind_a_row_are_not_seen() -> None:
    case = DECODE["one-query"]
    q, k, v, start = case.arguments()
    tiles, interpret = flash_decode.DecodeTiles(keys=64, stages=2, blocks=6), plgpu.InterpretGPUParams()
    out = flash_decode.flash_decode(q, k, v, start, tiles=tiles, interpret=interpret)
    behind = jnp.arange(case.S) > start[0]
    k, v = (jnp.where(behind[:, None], 1e4, x) for x in (k, v))
    k, v = (x.at[:, :, 192:].set(jnp.nan) for x in (k, v))  # whole tiles after the row's end are not read
    again = flash_decode.flash_decode(q, k, v, start, tiles=tiles, interpret=interpret)
    np.testing.assert_array_equal(np.asarray(out, np.float32), np.asarray(again, np.float32))


@pytest.mark.parametrize("splits", [1, 3, flash_decode.FUSED_SPLITS + 1])
def test_join(splits: int) -> None:
    random = np.random.default_rng(0)
    parts = random.standard_normal((2, 3, splits, 4, 8), np.float32)
    logs = 200 * random.standard_normal((2, 3, splits, 4, 1), np.float32)  # exp2 of these does not fit in float32
    logs[0, 0, 1:] = -np.inf  # key splits without a key
    weights = np.exp2(logs.astype(np.float64) - logs.max(axis=2, keepdims=True))
    expected = (parts * weights).sum(axis=2) / weights.sum(axis=2)
    np.testing.assert_allclose(np.asarray(jax.jit(flash_decode.join)(parts, logs)), expected, rtol=1e-3, atol=1e-5)


REFUSED = {
    "float32": (Case(4, 8, 2, 2, 64, (0,), "float32"), "bfloat16"),
    "head_dim": (Case(4, 8, 2, 2, 80, (0,)), "head_dim"),
    "uneven heads": (Case(4, 8, 3, 2, 64, (0,)), "do not divide"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("module", [flash_attention, flash_decode])
def test_refused(module, name: str) -> None:
    case, reason = REFUSED[name]
    with pytest.raises(Unsupported, match=reason):
        module.check(*case.shapes())


def test_decode_refuses_more_rows_than_a_tile_has() -> None:
    with pytest.raises(Unsupported, match="64 query rows"):
        flash_decode.check(*Case(8, 64, 16, 1, 64, (0,)).shapes())


@pytest.mark.parametrize("name", CASES)
def test_models_are_supported(name: str) -> None:
    heads = CASES[name]
    for T, check in ((512, flash_attention.check), (1, flash_decode.check), (8, flash_decode.check)):
        check(*Case(T, 2048, start=(0,), **heads).shapes())


@pytest.mark.gpu
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("kind", "name"), FULL)
def test_compiled(kind: str, name: str) -> None:
    case, _ = find(kind, name)
    op = jax.jit({"prefill": attention, "decode": decode_attention}[kind], static_argnames="backend")
    for seed in range(2):
        arguments = case.arguments(seed)
        out = op(*arguments, backend="pallas")
        with jax.default_matmul_precision("highest"):
            assert error(out, arguments) < TOLERANCE
        again = op(*arguments, backend="pallas")
        np.testing.assert_array_equal(np.asarray(out, np.float32), np.asarray(again, np.float32))

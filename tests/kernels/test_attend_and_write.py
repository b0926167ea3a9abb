"""Rotary, cache write and attention of a decode step in one launch, beside the operations that it replaces:
interpreted, lowered for an H200, and compiled on one (marker gpu)."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from h200 import lower
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import PAGE, Choice, Unsupported, attend_and_write, project_and_attend, record
from pallas_kernels.attend_and_write import CASES, attend_and_write_reference, project_and_attend_kernel
from pallas_kernels.hopper.attention.decode import (
    DecodeTiles,
    check_and_write,
    flash_decode,
    flash_decode_and_write,
    flash_decode_paged,
)
from pallas_kernels.hopper.gemm.medium_m import medium_m_sums
from pallas_kernels.hopper.gemm.medium_m_plan import MediumMTiles
from pallas_kernels.layer_view import LayerView

INTERPRET = plgpu.InterpretGPUParams()
LAYERS, LAYER = 2, 1
TOLERANCE = 5e-3  # relative to the norm, for 16-bit inputs and outputs


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes of one call. Rows have ``pages`` pages each, in no order, or as many positions side by side."""

    start: tuple[int, ...]
    T: int = 1
    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 64
    pages: int = 2
    dtype: str = "bfloat16"
    paged: bool = True
    dead: tuple[int, ...] = ()  # rows that have no pages
    tiles: DecodeTiles | None = None  # interpreted

    @property
    def pool(self) -> int:
        return len(self.start) * self.pages + 1

    def shapes(self) -> list[Any]:
        """y, k, v, table, start, cos and sin."""
        B, D, f32 = len(self.start), self.head_dim, jnp.float32
        y = jax.ShapeDtypeStruct((B, self.T, (self.heads + 2 * self.kv_heads) * D), self.dtype)
        size = (self.pool, self.kv_heads, PAGE, D) if self.paged else (B, self.kv_heads, self.pages * PAGE, D)
        cache = jax.ShapeDtypeStruct((LAYERS, *size), self.dtype)
        table = jax.ShapeDtypeStruct((B, self.pages), jnp.int32) if self.paged else None
        angles = jax.ShapeDtypeStruct((B, self.T, D // 2), f32)
        return [y, cache, cache, table, jax.ShapeDtypeStruct((B,), jnp.int32), angles, angles]

    def arguments(self, seed: int = 0) -> list[Any]:
        """Random numbers. The other layer is NaN, and so is page 0, which nobody has."""
        y, k, _, table, _, cos, _ = self.shapes()
        k, v = (hidden(normal(seed + i, k.shape, self.dtype), self.paged) for i in (1, 2))
        if self.paged:
            numbers = 1 + np.random.RandomState(seed).permutation(self.pool - 1)
            rows = numbers.reshape(table.shape).astype(np.int32)
            for row, start in enumerate(self.start):
                rows[row, (start + self.T - 1) // PAGE + 1 :] = self.pool + 3
            rows[list(self.dead)] = self.pool + 7
            table = jnp.asarray(rows)
        angles = np.random.RandomState(seed).uniform(0, 6, cos.shape)
        start = jnp.asarray(self.start, jnp.int32)
        cos, sin = (jnp.asarray(a, jnp.float32) for a in (np.cos(angles), np.sin(angles)))
        return [normal(seed, y.shape, self.dtype), k, v, table, start, cos, sin]


@functools.partial(jax.jit, static_argnums=1)
def hidden(cache: jax.Array, paged: bool) -> jax.Array:
    """NaN in layer 0, and in page 0."""
    cache = cache.at[0].set(jnp.nan)
    return cache.at[:, 0].set(jnp.nan) if paged else cache


SMALL = {
    "one-head-each": Case((70, 0, 63), kv_heads=2, heads=2, head_dim=128),
    "first-of-a-page": Case((64, 127), heads=4, kv_heads=2, tiles=DecodeTiles(keys=64, stages=2, blocks=1)),
    "eight-share": Case((90,), heads=8, dtype="float16", head_dim=128),
    "twelve-share": Case((5,), heads=12, pages=1),
    "dead-rows-and-full-ones": Case((3, 128, 70, 300), dead=(0, 2), tiles=DecodeTiles(keys=64, stages=2, blocks=1)),
    "splits": Case((190, 20), heads=2, pages=3, tiles=DecodeTiles(keys=64, stages=2, blocks=6)),
    "three-queries": Case((62, 126, 10), T=3, heads=4, kv_heads=2),
    "side-by-side": Case((70, 127, 128), heads=2, kv_heads=2, head_dim=128, paged=False),
    "side-by-side-in-splits": Case((190, 40), T=2, pages=3, paged=False, tiles=DecodeTiles(64, 2, 4)),
}


def chain(case: Case, arguments: list[Any], **options: Any) -> tuple[jax.Array, ...]:
    """What the launch replaces: the operations of the reference around the kernel of attention."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, table: Any, start: jax.Array, *, layer: int) -> jax.Array:
        if case.paged:
            return flash_decode_paged(q, k, v, table, start, layer=layer, **options)
        return flash_decode(q, LayerView(k, layer), LayerView(v, layer), start, **options)

    return attend_and_write_reference(*arguments, layer=LAYER, attend=attend)


def assert_equal(found: tuple[jax.Array, ...], wanted: tuple[jax.Array, ...]) -> None:
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def assert_close(case: Case, found: tuple[jax.Array, ...], arguments: list[Any]) -> None:
    """To the reference in float32; rows without pages are of no matter."""
    y, k, v, *rest = arguments
    live = np.setdiff1d(np.arange(len(case.start)), case.dead)
    exact = jax.jit(functools.partial(attend_and_write_reference, layer=LAYER))
    reference = exact(*(a.astype(jnp.float32) for a in (y, k, v)), *rest)
    a, b = (np.asarray(x[0], np.float32)[live] for x in (found, reference))
    assert np.linalg.norm(a - b) < TOLERANCE * np.linalg.norm(b)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", SMALL)
def test_interpreted_it_gives_the_bits_of_what_it_replaces(name: str) -> None:
    case = SMALL[name]
    arguments = case.arguments()
    check_and_write(*arguments, layer=LAYER)
    races = plgpu.InterpretGPUParams(detect_races=name in ("one-head-each", "three-queries"))
    # One after the other: two interpreted kernels at once would wait for each other's threads.
    found = jax.block_until_ready(flash_decode_and_write(*arguments, layer=LAYER, tiles=case.tiles, interpret=races))
    assert not races.detect_races or not gpu_callbacks.get_races().races_found
    assert_close(case, found, arguments)
    assert_equal(found, chain(case, arguments, tiles=case.tiles, interpret=INTERPRET))


def test_interpreted_with_the_product_it_adds_k_splits() -> None:
    """In their order, and rounded once: the bits of a product that was added before."""
    y, *arguments = SMALL["one-head-each"].arguments()
    x, w = normal(7, (3, 1, 256), "bfloat16"), normal(8, (y.shape[-1], 256), "bfloat16") / 16
    how = dict(tiles=MediumMTiles(128, k_splits=2, depth=2), sms=6, interpret=INTERPRET)
    first, second = jax.block_until_ready(medium_m_sums(x[:, 0], w, **how))
    y = (first + second).astype(y.dtype).reshape(y.shape)
    wanted = jax.block_until_ready(flash_decode_and_write(y, *arguments, layer=LAYER, interpret=INTERPRET))
    assert_equal(project_and_attend_kernel(x, w, *arguments, layer=LAYER, **how), wanted)


LARGE = {
    f"{name}-{rows}x{T}": Case(tuple(range(3, 3 + 20 * rows, 20)), T=T, pages=22, **sizes)
    for name, all_sizes in CASES.items()
    for sizes in ({key: all_sizes[key] for key in ("heads", "kv_heads", "head_dim")},)
    for rows, T in ((9, 1), (64, 1), (3, 8))
}
LARGE["7b-side-by-side"] = dataclasses.replace(LARGE["7b-64x1"], paged=False)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", LARGE)
def test_lowers_for_hopper(name: str) -> None:
    case = LARGE[name]
    with record() as choices:
        text = lower(functools.partial(attend_and_write, layer=LAYER), *case.shapes(), donate_argnums=(1, 2))
    assert choices["attend_and_write"] == Choice("pallas", "kernel runs here")
    assert text.count("custom_call @mosaic_gpu") == 1


REFUSED = {
    "multiple of 8": dict(args={1: (2, 4, 2, 100, 64), 2: (2, 4, 2, 100, 64), 3: None}),
    "must have one shape": dict(args={1: (2, 9, 1, 64, 64)}),
    "are not q's heads": dict(args={0: (4, 1, 256)}),
    "are not float32": dict(args={5: (4, 1, 16), 6: (4, 1, 16)}),
    "64 query rows": dict(args={0: (4, 1, 148 * 64)}),
    "found 48": dict(args={1: (2, 9, 2, 48, 64), 2: (2, 9, 2, 48, 64)}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refused(reason: str) -> None:
    arguments = Case((0,) * 4, heads=4, kv_heads=2).shapes()
    for place, shape in REFUSED[reason]["args"].items():
        arguments[place] = None if shape is None else jax.ShapeDtypeStruct(shape, arguments[place].dtype)
    with pytest.raises(Unsupported, match=reason):
        check_and_write(*arguments, layer=LAYER)


# Compiled, on a Hopper GPU


@pytest.mark.gpu
@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", SMALL | LARGE)
def test_compiled(name: str) -> None:
    """Close to the reference, and to the operations that it replaces: XLA and Mosaic may round a rotated number
    differently, so a few keys may have another last bit. Values and everything else in the cache have the same bits."""
    case = (SMALL | LARGE)[name]
    arguments = case.arguments()
    run = jax.jit(functools.partial(attend_and_write, layer=LAYER, backend="pallas"))
    found, wanted = run(*arguments), jax.jit(functools.partial(chain, case))(arguments)
    with jax.default_matmul_precision("highest"):
        assert_close(case, found, arguments)
    same = functools.partial(np.array_equal, equal_nan=True)
    assert same(*(np.asarray(a[2], np.float32) for a in (found, wanted)))
    k, other = (np.asarray(a[1], np.float32) for a in (found, wanted))
    differ = ~((k == other) | (np.isnan(k) & np.isnan(other)))
    assert differ.sum() <= 2e-3 * len(case.start) * case.T * case.kv_heads * case.head_dim
    np.testing.assert_allclose(k[differ], other[differ], rtol=2**-7)


@pytest.mark.gpu
@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", ["llama3-8b-64x1", "tinyllama-9x1", "tinyllama-64x1"])
def test_compiled_with_the_product(name: str) -> None:
    """Of these shapes, the product has K splits."""
    case = LARGE[name]
    y, *arguments = case.arguments()
    x, w = normal(7, (len(y), 1, 2048), y.dtype), normal(8, (y.shape[-1], 2048), y.dtype) / 45
    run = jax.jit(functools.partial(project_and_attend, layer=LAYER, backend="pallas"))
    found = run(x, w, *arguments)
    with jax.default_matmul_precision("highest"):
        assert_close(case, found, [x.astype(jnp.float32) @ w.astype(jnp.float32).T, *arguments])
    assert_equal(run(x, w, *arguments)[:1], found[:1])

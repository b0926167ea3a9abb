"""The kernels of paged attention against the reference and the contiguous kernels: interpreted, cross-lowered, and
compiled on the GPU."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from h200 import H200
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import Unsupported, paged_attention
from pallas_kernels.hopper.attention import decode, prefill
from pallas_kernels.paged_attention import CASES, PAGE, gather, paged_attention_reference

TOLERANCE = 5e-3  # relative to the norm, for 16-bit inputs and outputs


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes of one call. Rows from ``shared`` on have the pages of row 0 as their first ones."""

    T: int
    heads: int
    kv_heads: int
    head_dim: int
    start: tuple[int, ...]
    pages: int  # of a row
    dtype: str = "bfloat16"
    shared: int = 0  # how many first pages all rows share

    @property
    def own(self) -> int:
        return self.pages - self.shared

    @property
    def pool(self) -> int:
        return self.shared + self.own * len(self.start) + 2  # two belong to nobody

    def shapes(self) -> list[jax.ShapeDtypeStruct]:
        """q, k, v, table and start."""
        pages = jax.ShapeDtypeStruct((2, self.pool, self.kv_heads, PAGE, self.head_dim), self.dtype)
        q = jax.ShapeDtypeStruct((len(self.start), self.T, self.heads, self.head_dim), self.dtype)
        table = jax.ShapeDtypeStruct((len(self.start), self.pages), jnp.int32)
        return [q, pages, pages, table, jax.ShapeDtypeStruct((len(self.start),), jnp.int32)]

    def arguments(self, seed: int = 0) -> list[jax.Array]:
        """Random queries and pages, and a table in no order. Layer 0, pages of nobody and pages behind a row's last
        position are NaN, and table entries behind it are no pages."""
        q, k, v, _, _ = self.shapes()
        keys = jax.random.split(jax.random.key(seed), 3)
        q, k, v = (jax.random.normal(key, a.shape, self.dtype) for key, a in zip(keys, (q, k, v), strict=True))
        numbers = np.random.RandomState(seed).permutation(self.pool).astype(np.int32)
        table = np.empty((len(self.start), self.pages), np.int32)
        table[:, : self.shared] = numbers[: self.shared]
        table[:, self.shared :] = numbers[self.shared : -2].reshape(-1, self.own)
        for row, start in enumerate(self.start):
            table[row, (start + self.T - 1) // PAGE + 1 :] = (self.pool, -1, 1 << 30)[row % 3]
        unseen = np.setdiff1d(np.arange(self.pool), table)
        k, v = (a.at[0].set(jnp.nan).at[1, unseen].set(jnp.nan) for a in (k, v))
        return [q, k, v, jnp.asarray(table), jnp.asarray(self.start, jnp.int32)]


# Small enough for the interpreter: a few tiles that cover every case of the schedule.
DECODE_SMALL = {
    "one-query": Case(1, 2, 2, 64, (150, 0), 3),
    "shared-8-to-1": Case(3, 8, 1, 128, (63, 290), 5, "float16", shared=1),
    "shared-4-to-1": Case(2, 8, 2, 64, (126, 128, 5), 3),
    "eight-queries": Case(8, 8, 1, 64, (0, 64), 2),
    "many-parts": Case(1, 4, 1, 64, (1090,), 18),
}
PREFILL_SMALL = {
    "one-row": Case(130, 2, 1, 64, (0,), 3),
    "pieces-of-one-prompt": Case(40, 2, 2, 128, (64, 104, 144), 3, "float16", shared=3),
    "behind-a-prefix": Case(70, 4, 2, 64, (128, 230), 5, shared=2),
}
SMALL = {**DECODE_SMALL, **PREFILL_SMALL}
# Real sizes, compiled on the GPU.
DECODE = {
    **DECODE_SMALL,
    "7b": Case(1, 32, 32, 128, (4095,), 64),
    "7b-64-ragged-rows": Case(1, 32, 32, 128, tuple(range(3, 1283, 20)), 21, shared=0),
    "70b": Case(8, 64, 8, 128, (0, 8000), 128),
    "tinyllama": Case(5, 32, 4, 64, (0, 500, 996), 16, "float16"),
    "tinyllama-64-rows": Case(1, 32, 4, 64, tuple(range(0, 640, 10)), 10),
}
PREFILL = {
    **PREFILL_SMALL,
    "7b": Case(1024, 32, 32, 128, (0,), 16),
    "70b": Case(500, 64, 8, 128, (0, 600), 18),
    "tinyllama": Case(777, 32, 4, 64, (0, 500, 1271), 32, "float16"),
    "packed-pieces": Case(128, 32, 32, 128, tuple(range(0, 2048, 128)), 32, shared=32),
}
FULL = {**DECODE, **PREFILL}


def kernel(case: Case, *, paged: bool = True) -> Any:
    module = decode if case.T <= 8 else prefill
    name = "flash_decode" if case.T <= 8 else "flash_attention"
    return getattr(module, f"{name}_paged" if paged else name)


def small_tiles(case: Case, keys: int) -> Any:
    """Two stages, so that every slot of the ring is used again."""
    if case.T <= 8:
        return decode.DecodeTiles(keys=keys, stages=2, blocks=8 * case.heads)
    return prefill.PrefillTiles(keys=keys, stages=2, blocks=2)  # several items a block


def contiguous(arguments: list[jax.Array]) -> list[jax.Array]:
    """The same for the contiguous kernel: zeros where a row has no page."""
    q, k, v, table, start = arguments
    last = (start + q.shape[1] - 1) // PAGE
    seen = (jnp.arange(table.shape[1] * PAGE) // PAGE <= last[:, None])[:, None, :, None]
    return [q, *(jnp.where(seen, gather(a, table, 1), 0) for a in (k, v)), start]


def assert_close(out: jax.Array, arguments: list[jax.Array]) -> None:
    q, k, v, start = contiguous(arguments)
    table = jnp.arange(k.shape[0] * k.shape[2] // PAGE).reshape(k.shape[0], -1)
    B, kv_heads, _, D = k.shape
    pools = [a.reshape(B, kv_heads, -1, PAGE, D).swapaxes(1, 2).reshape(1, -1, kv_heads, PAGE, D) for a in (k, v)]
    wanted = paged_attention_reference(*(a.astype(jnp.float32) for a in (q, *pools)), table, start, layer=0)
    wanted, found = np.asarray(wanted), np.asarray(out, np.float32)
    assert np.linalg.norm(found - wanted) < TOLERANCE * np.linalg.norm(wanted)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("keys", [64, 128])
@pytest.mark.parametrize("name", SMALL)
def test_interpreted(name: str, keys: int) -> None:
    case = SMALL[name]
    arguments = case.arguments()
    tiles, interpret = small_tiles(case, keys), plgpu.InterpretGPUParams(detect_races=True)
    out = kernel(case)(*arguments, layer=1, tiles=tiles, interpret=interpret)
    assert not gpu_callbacks.get_races().races_found
    assert_close(out, arguments)
    same = kernel(case, paged=False)(*contiguous(arguments), tiles=tiles, interpret=plgpu.InterpretGPUParams())
    np.testing.assert_array_equal(np.asarray(out, np.float32), np.asarray(same, np.float32))

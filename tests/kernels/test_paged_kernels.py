"""The kernels of paged attention against the reference and the contiguous kernels: interpreted, cross-lowered, and
compiled on the GPU."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from h200 import H200, lower
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import Unsupported, paged_attention
from pallas_kernels.hopper.attention import decode, prefill
from pallas_kernels.paged_attention import CASES, PAGE, gather, paged_attention_reference

INTERPRET = plgpu.InterpretGPUParams()
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
    keys: int = 128  # of a tile, interpreted

    @property
    def own(self) -> int:
        return self.pages - self.shared

    @property
    def pool(self) -> int:
        return self.shared + self.own * len(self.start) + 2  # the first and the last belong to nobody

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
        q, k, v = (normal(3 * seed + i, a.shape, self.dtype) for i, a in enumerate((q, k, v)))
        # A number outside the pool is clamped to its first or last page, which nobody has.
        numbers = 1 + np.random.RandomState(seed).permutation(self.pool - 2).astype(np.int32)
        table = np.empty((len(self.start), self.pages), np.int32)
        table[:, : self.shared] = numbers[: self.shared]
        table[:, self.shared :] = numbers[self.shared :].reshape(len(self.start), self.own)
        for row, start in enumerate(self.start):
            table[row, (start + self.T - 1) // PAGE + 1 :] = (self.pool, -1, 1 << 30)[row % 3]
        unseen = np.setdiff1d(np.arange(self.pool), table)
        k, v = (hidden(a, unseen) for a in (k, v))
        return [q, k, v, jnp.asarray(table), jnp.asarray(self.start, jnp.int32)]


@jax.jit
def hidden(pages: jax.Array, unseen: np.ndarray) -> jax.Array:
    """NaN in layer 0 and in these pages of layer 1."""
    return pages.at[0].set(jnp.nan).at[1, unseen].set(jnp.nan)


# Small enough for the interpreter: a few tiles that cover every case of the schedule.
DECODE_SMALL = {
    "one-query": Case(1, 1, 1, 64, (150, 0), 3, keys=64),
    "shared-8-to-1": Case(3, 8, 1, 128, (63, 290), 5, "float16", shared=1),
    "shared-4-to-1": Case(2, 8, 2, 64, (126, 5), 2),
    "eight-queries": Case(8, 1, 1, 64, (0, 121), 2),
}
PREFILL_SMALL = {
    # The last query has the last key of a page. The queries that fill up to 136 have none.
    "one-row": Case(130, 1, 1, 64, (62,), 4),
    "pieces-of-one-prompt": Case(40, 2, 1, 128, (64, 104), 3, "float16", shared=3),
    "behind-a-prefix": Case(16, 1, 1, 64, (128, 230), 5, shared=2, keys=64),
}
SMALL = {**DECODE_SMALL, **PREFILL_SMALL}
# Real sizes, compiled on the GPU.
DECODE = {
    **DECODE_SMALL,
    "7b": Case(1, 32, 32, 128, (4095,), 64),
    "7b-64-ragged-rows": Case(1, 32, 32, 128, tuple(range(3, 1283, 20)), 21),
    "70b": Case(8, 64, 8, 128, (0, 8000), 128),
    "tinyllama": Case(5, 32, 4, 64, (0, 500, 996), 16, "float16"),
    "tinyllama-64-rows": Case(1, 32, 4, 64, tuple(range(0, 640, 10)), 10),
}
PREFILL = {
    **PREFILL_SMALL,
    "7b-prompt": Case(1024, 32, 32, 128, (0,), 16),
    "70b-prompt": Case(500, 64, 8, 128, (0, 600), 18),
    "tinyllama-prompt": Case(777, 32, 4, 64, (0, 500, 1271), 32, "float16"),
    "packed-pieces": Case(128, 32, 32, 128, tuple(range(0, 2048, 128)), 32, shared=32),
}
FULL = {**DECODE, **PREFILL}


def kernel(case: Case, *, paged: bool = True) -> Any:
    module = decode if case.T <= 8 else prefill
    name = "flash_decode" if case.T <= 8 else "flash_attention"
    return getattr(module, f"{name}_paged" if paged else name)


def small_tiles(case: Case) -> Any:
    """Two stages, so that every slot of the ring is used again."""
    if case.T <= 8:  # tiles of one page: the keys of a row in two splits; of two pages: in one
        blocks = len(case.start) * case.kv_heads * 128 // case.keys
        return decode.DecodeTiles(keys=case.keys, stages=2, blocks=blocks)
    return prefill.PrefillTiles(keys=case.keys, stages=2, blocks=1)  # several items a block


@jax.jit
def contiguous(arguments: list[jax.Array]) -> list[jax.Array]:
    """The same for the contiguous kernel: zeros where a row has no page."""
    q, k, v, table, start = arguments
    last = (start + q.shape[1] - 1) // PAGE
    seen = (jnp.arange(table.shape[1] * PAGE) // PAGE <= last[:, None])[:, None, :, None]
    return [q, *(jnp.where(seen, gather(a, table, 1), 0) for a in (k, v)), start]


@jax.jit
def exact(arguments: list[jax.Array]) -> jax.Array:
    """The reference in float32, on pages in order."""
    q, k, v, start = contiguous(arguments)
    table = jnp.arange(k.shape[0] * k.shape[2] // PAGE).reshape(k.shape[0], -1)
    B, kv_heads, _, D = k.shape
    pools = [a.reshape(B, kv_heads, -1, PAGE, D).swapaxes(1, 2).reshape(1, -1, kv_heads, PAGE, D) for a in (k, v)]
    return paged_attention_reference(*(a.astype(jnp.float32) for a in (q, *pools)), table, start, layer=0)


def assert_close(out: jax.Array, arguments: list[jax.Array]) -> None:
    wanted, found = np.asarray(exact(arguments)), np.asarray(out, np.float32)
    assert np.linalg.norm(found - wanted) < TOLERANCE * np.linalg.norm(wanted)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", SMALL)
def test_interpreted(name: str) -> None:
    arguments = SMALL[name].arguments()
    interpret = plgpu.InterpretGPUParams(detect_races=name in ("one-query", "pieces-of-one-prompt"))
    out = kernel(SMALL[name])(*arguments, layer=1, tiles=small_tiles(SMALL[name]), interpret=interpret)
    assert not interpret.detect_races or not gpu_callbacks.get_races().races_found
    assert_close(out, arguments)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["shared-4-to-1", "one-row"])
def test_interpreted_pages_give_the_bits_of_contiguous_keys(name: str) -> None:
    arguments, options = SMALL[name].arguments(), dict(tiles=small_tiles(SMALL[name]), interpret=INTERPRET)
    # One after the other: two interpreted kernels at once would wait for each other's threads.
    paged = np.asarray(kernel(SMALL[name])(*arguments, layer=1, **options), np.float32)
    plain = np.asarray(kernel(SMALL[name], paged=False)(*contiguous(arguments), **options), np.float32)
    np.testing.assert_array_equal(paged, plain)


def test_the_page_of_a_bad_table_entry_is_one_of_the_pool() -> None:
    """A row without pages, as the engine pads its calls, reads what is there: no address outside the pool."""
    case = DECODE_SMALL["one-query"]
    q, k, v, _, start = case.arguments()
    k, v = (a.at[1, 0].set(1.0).at[1, -1].set(2.0) for a in (k, v))
    bad = jnp.asarray([[-5] * 3, [1 << 30] * 3])
    run = functools.partial(decode.flash_decode_paged, layer=1, tiles=small_tiles(case), interpret=INTERPRET)
    out = run(q, k, v, bad, start)
    np.testing.assert_array_equal(np.asarray(out[:, 0, 0, 0], np.float32), [1.0, 2.0])


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", [name for name in FULL if name not in SMALL])
def test_lowers_for_hopper(name: str) -> None:
    case = FULL[name]
    text = lower(functools.partial(kernel(case), layer=1), *case.shapes())
    assert text.count("custom_call @mosaic_gpu") == 1


def test_nothing_stands_beside_the_kernel_where_rows_fill_the_device() -> None:
    case = DECODE["7b-64-ragged-rows"]
    text = lower(functools.partial(decode.flash_decode_paged, layer=1), *case.shapes())
    operations = {line.split(" = ")[1].split()[0] for line in text.splitlines() if " = stablehlo." in line}
    # Those of the layer's number are constants; a reshape is none at all.
    assert operations == {"stablehlo.constant", "stablehlo.convert", "stablehlo.reshape", "stablehlo.custom_call"}


@pytest.mark.parametrize("T", [1, 8, 9, 512])
@pytest.mark.parametrize("name", CASES)
def test_models_are_supported(name: str, T: int) -> None:
    sizes = {key: CASES[name][key] for key in ("heads", "kv_heads", "head_dim")}
    case = Case(T, start=(0,), pages=16, **sizes)
    with jax.sharding.use_abstract_mesh(H200):
        assert paged_attention.choose("pallas", *case.shapes(), layer=0).impl == "pallas"


REFUSED = {
    "bfloat16": Case(1, 2, 2, 64, (0,), 1, "float32"),
    "head_dim": Case(1, 2, 2, 80, (0,), 1),
    "do not divide": Case(1, 3, 2, 64, (0,), 1),
    "64 query rows": Case(8, 16, 1, 64, (0,), 1),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refused(reason: str) -> None:
    with jax.sharding.use_abstract_mesh(H200), pytest.raises(Unsupported, match=f"paged_attention: .*{reason}"):
        paged_attention.choose("pallas", *REFUSED[reason].shapes(), layer=0)


def test_pages_that_do_not_fill_tiles_are_refused() -> None:
    q, k, _, table, start = Case(1, 2, 2, 64, (0,), 1).shapes()
    small = jax.ShapeDtypeStruct((*k.shape[:3], 48, 64), k.dtype)
    with jax.sharding.use_abstract_mesh(H200), pytest.raises(Unsupported, match="divides 128, found 48"):
        paged_attention.choose("pallas", q, small, small, table, start, layer=0)


@pytest.mark.gpu
@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", FULL)
def test_compiled(name: str) -> None:
    case = FULL[name]
    op = jax.jit(functools.partial(paged_attention, backend="pallas"))
    for seed in range(2):
        arguments = case.arguments(seed)
        out = op(*arguments, layer=1)
        with jax.default_matmul_precision("highest"):
            assert_close(out, arguments)
        for other in (op(*arguments, layer=jnp.int32(1)), jax.jit(kernel(case, paged=False))(*contiguous(arguments))):
            np.testing.assert_array_equal(np.asarray(out, np.float32), np.asarray(other, np.float32))

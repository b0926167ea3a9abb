"""Decode steps for tests: their arguments, the reference's results, and the tolerances for a kernel."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import QuantizedTensor, dequantize, quantize
from pallas_kernels.decode_step import CASES, StepWeights, decode_step_reference
from pallas_kernels.paged_attention import PAGE, gather

EPS = 1e-5
ON_GPU = {"bf16": {}, "int8": dict(fmt="int8"), "int4-g128": dict(fmt="int4", group=128)}
REFUSED = {"int8-g64": dict(fmt="int8", group=64)}  # has not run on a GPU
FORMATS = ON_GPU | REFUSED
SMALL = dict(dim=128, hidden=256, heads=2, kv_heads=1, head_dim=64, vocab=128, layers=1)
SMALL_ON_GPU = dict(dim=512, hidden=1024, heads=8, kv_heads=2, head_dim=64, vocab=1000, layers=3)
# Sizes, lengths of the rows of the cache, and new tokens a row.
GPU_CASES = {
    "small": (SMALL_ON_GPU, (127, 0, 300), 2),  # over pages, the first row goes on in another one
    "7b-layers": (CASES["7b"] | dict(layers=2), (700,), 1),
    "7b-eight": (CASES["7b"] | dict(layers=2), (700, 1, 0, 64, 63, 65, 900, 127), 1),
    "70b-layers": (CASES["70b"] | dict(layers=1), (700,), 8),
    "tinyllama": (CASES["tinyllama"] | dict(layers=2), (1020, 9), 4),
}


def on_device(seed: int) -> Callable[[tuple[int, ...]], Any]:
    """Normally distributed arrays for the sizes of real models."""
    keys = iter(jax.random.split(jax.random.key(seed), 16))
    return lambda shape: jax.random.normal(next(keys), shape, jnp.float32)


def on_host(seed: int) -> Callable[[tuple[int, ...]], Any]:
    """The same for tiny models: NumPy compiles nothing."""
    random = np.random.default_rng(seed)
    return lambda shape: random.standard_normal(shape, np.float32)


def arguments(
    fmt: str, start: tuple[int, ...], queries: int, max_len: int, seed: int = 0, draws: Any = on_device, **size: int
) -> tuple:
    """Random weights of a stable scale, a cache with content up to ``start``, and new tokens."""
    dim, D, L, hidden = size["dim"], size["head_dim"], size["layers"], size["hidden"]
    heads, kv_heads, B = size["heads"], size["kv_heads"], len(start)
    draw = draws(seed)

    def normal(*shape: int, mean: float = 0.0, scale: float = 1.0) -> jax.Array:
        return jnp.asarray((mean + scale * draw(shape)).astype(jnp.bfloat16))

    def weight(*shape: int) -> Any:
        w = normal(*shape, scale=shape[-1] ** -0.5)
        return jax.jit(functools.partial(quantize, **FORMATS[fmt]))(w) if FORMATS[fmt] else w

    weights = StepWeights(
        attn_norm=normal(L, dim, mean=1.0, scale=0.1),
        wqkv=weight(L, (heads + 2 * kv_heads) * D, dim),
        wo=weight(L, dim, heads * D),
        ffn_norm=normal(L, dim, mean=1.0, scale=0.1),
        w_gate_up=weight(L, 2 * hidden, dim),
        w_down=weight(L, dim, hidden),
        norm=normal(dim, mean=1.0, scale=0.1),
        head=weight(size["vocab"], dim),
    )
    x = normal(B, queries, dim)
    k, v = normal(L, B, kv_heads, max_len, D), normal(L, B, kv_heads, max_len, D)
    begin = jnp.asarray(start, jnp.int32)
    return x, weights, k, v, begin, *rotations(begin, queries, D)


@functools.partial(jax.jit, static_argnums=(1, 2))
def rotations(start: jax.Array, queries: int, D: int) -> tuple[jax.Array, jax.Array]:
    positions = start[:, None] + jnp.arange(queries)
    angles = positions[..., None] * (10000.0 ** (-jnp.arange(0, D, 2) / D))
    return jnp.cos(angles), jnp.sin(angles)


def in_pages(args: tuple, table: np.ndarray, pages: int, seed: int = 9) -> tuple[tuple, tuple, jax.Array]:
    """A step over a contiguous cache, and the same step over pages with random content, with its table. An entry past
    the last page means that there is no page; the contiguous cache has the last page's content there, as
    `paged_attention.gather` reads it. Pages that nobody can read are NaN."""
    x, weights, k, _, *rest = args
    L, _, kv_heads, _, D = k.shape
    keys = jax.random.split(jax.random.key(seed))
    readable = np.isin(np.arange(pages), [*np.unique(table), pages - 1])[:, None, None, None]
    shape = L, pages, kv_heads, PAGE, D
    pools = [jnp.where(readable, jax.random.normal(key, shape), jnp.nan).astype(k.dtype) for key in keys]
    listed = jnp.asarray(table, jnp.int32)
    rows = [jnp.stack([gather(pool, listed, i) for i in range(L)]) for pool in pools]
    return (x, weights, *rows, *rest), (x, weights, *pools, *rest), listed


def compare_pages(paged: tuple, contiguous: tuple, args: tuple, table: np.ndarray) -> None:
    """Check that a step over pages (``args``) gave, bit for bit, what the one over a contiguous cache gave, and wrote
    the new keys and values to their pages and nowhere else."""
    np.testing.assert_array_equal(paged[0], contiguous[0])
    start, queries = np.asarray(args[4]), args[0].shape[1]
    for found, before, rows in zip(paged[1:], args[2:4], contiguous[1:], strict=True):
        wanted, rows = np.array(before, np.float32), np.asarray(rows, np.float32)
        for row, first in enumerate(start):
            for at in range(first, first + queries):
                if at // PAGE < table.shape[1] and (page := table[row, at // PAGE]) < wanted.shape[1]:
                    wanted[:, page, :, at % PAGE] = rows[:, row, :, at]
        np.testing.assert_array_equal(np.asarray(found, np.float32), wanted)


def same_bits(found: Any, wanted: Any) -> None:
    """Bits, because a bfloat16 NaN, which pages of nobody hold, does not equal itself."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(*(np.asarray(x).view(np.dtype(f"u{x.dtype.itemsize}")) for x in (a, b)))


def exact(args: tuple, table: jax.Array | None = None) -> tuple:
    """The reference in float32, with dequantised weights."""

    def widen(a: Any) -> Any:
        if isinstance(a, QuantizedTensor):
            return dequantize(a)
        return a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a

    wide = jax.tree.map(widen, args, is_leaf=lambda a: isinstance(a, QuantizedTensor))
    return jax.jit(functools.partial(decode_step_reference, eps=EPS))(*wide, table=table)


def error(a: Any, reference: Any) -> float:
    a, reference = np.asarray(a, np.float32), np.asarray(reference, np.float32)
    assert a.shape == reference.shape
    return float(np.linalg.norm(a - reference) / np.linalg.norm(reference))


def compare(out: tuple, args: tuple, tolerance: float = 2e-2) -> None:
    """Check that logits and new keys are within bf16's rounding of the residual stream, and the rest of the cache is
    unchanged."""
    logits, k, v = out
    reference = exact(args)
    assert error(logits, reference[0]) < tolerance
    x, start, S = args[0], np.asarray(args[4]), args[2].shape[3]
    slots = start[:, None] + np.arange(x.shape[1])
    new = np.zeros((len(start), S), bool)
    for row, places in zip(new, slots, strict=True):
        row[places[places < S]] = True
    for mine, before, wanted in ((k, args[2], reference[1]), (v, args[3], reference[2])):
        mine, before, wanted = (np.asarray(a, np.float32).swapaxes(2, 3) for a in (mine, before, wanted))
        np.testing.assert_array_equal(mine[:, ~new], before[:, ~new])
        if new.any():
            assert error(mine[:, new], wanted[:, new]) < tolerance


@dataclasses.dataclass(frozen=True)
class Case:
    """One step of a tiny model, small enough for the interpreter. ``blocks`` must divide the outputs. Otherwise two
    blocks write the same values to the same place, and the race detector reports that."""

    start: tuple[int, ...]
    max_len: int = 64
    queries: int = 1
    fmt: str = "bf16"
    blocks: int = 2
    size: dict[str, int] = dataclasses.field(default_factory=dict)
    tiles: dict[str, int] = dataclasses.field(default_factory=dict)

    def arguments(self) -> tuple:
        return arguments(self.fmt, self.start, self.queries, self.max_len, draws=on_host, **(SMALL | self.size))

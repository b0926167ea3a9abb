"""The persistent decode step on a GPU: real shapes, every phase over thousands of steps, and the hang detector."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_steps import (
    EPS,
    GPU_CASES,
    ON_GPU,
    SMALL,
    SMALL_ON_GPU,
    Case,
    arguments,
    compare,
    compare_pages,
    error,
    in_pages,
    rotations,
    same_bits,
)
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention import attention_reference
from pallas_kernels.decode_step import decode_step
from pallas_kernels.ffn import swiglu
from pallas_kernels.hopper.decode_step import launch
from pallas_kernels.hopper.decode_step.memory import StepBuffers
from pallas_kernels.hopper.decode_step.plan import StepTiles
from pallas_kernels.hopper.decode_step.run import run_phases
from pallas_kernels.matmul import matmul_reference
from pallas_kernels.paged_attention import PAGE
from pallas_kernels.qkv import rotate
from pallas_kernels.rms_norm import rms_norm_reference

pytestmark = pytest.mark.timeout(180)


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", ON_GPU)
@pytest.mark.parametrize("name", GPU_CASES)
def test_step_on_gpu(name: str, fmt: str) -> None:
    """Over a contiguous cache and over pages. Rows share a page; of several, the last has lost its pages."""
    (size, start, queries), P = GPU_CASES[name], 16
    table = np.random.RandomState(0).permutation(len(start) * P).reshape(-1, P)
    table[np.asarray(start) >= PAGE, 0] = table[0, 0]
    if len(start) > 1:
        table[-1] = 1000
    args = jax.jit(lambda: arguments(fmt, start, queries, 8, **size))()
    contiguous, paged, listed = in_pages(args, table, len(start) * P + 3)
    step = jax.jit(functools.partial(decode_step, eps=EPS, backend="pallas"))
    out, over_pages = step(*contiguous), step(*paged, table=listed)
    compare(out, contiguous)
    compare_pages(over_pages, out, paged, table)
    for _ in range(20):
        same_bits(step(*contiguous), out)
        same_bits(step(*paged, table=listed), over_pages)


@pytest.mark.gpu
def test_many_steps_on_gpu() -> None:
    """A donated scan of steps, each with fresh inputs, reads the keys that it wrote. After every step the logits are
    those of the reference on the same cache."""
    size, steps, D = SMALL_ON_GPU, 500, SMALL_ON_GPU["head_dim"]
    args = arguments("bf16", (0, 7), 1, 512, **size)
    weights, k, v, start = args[1:5]
    xs = jax.random.normal(jax.random.key(1), (steps, 2, 1, size["dim"]), jnp.bfloat16)

    def run(backend: str, k: jax.Array, v: jax.Array) -> tuple:
        def one(carry: tuple, x: jax.Array) -> tuple:
            k, v, start = carry
            logits, k, v = decode_step(x, weights, k, v, start, *rotations(start, 1, D), eps=EPS, backend=backend)
            return (k, v, start + 1), logits

        return jax.lax.scan(one, (k, v, start), xs)

    step = jax.jit(functools.partial(run, "pallas"), donate_argnums=(0, 1))
    found, again = (step(jnp.copy(k), jnp.copy(v)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, again, found)
    for mine, wanted in zip(found[1], jax.jit(functools.partial(run, "xla"))(k, v)[1], strict=True):
        assert error(mine, wanted) < 2e-2


def by_phase(args: tuple, done: StepBuffers) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The output of each phase of a step (one layer, one token a row), and what the reference computes from the output
    of the previous phase."""
    x, w, k, v, start, cos, sin = args
    B, D, kv_heads = x.shape[0], k.shape[4], k.shape[2]
    layer = jax.tree.map(lambda a: a[0], (w.attn_norm, w.wqkv, w.wo, w.ffn_norm, w.w_gate_up, w.w_down))
    attn_norm, wqkv, wo, ffn_norm, w_gate_up, w_down = layer
    dim, inner = w_down.shape
    x_mid, hidden, x_out = done.x_mid[:B, :dim], done.hidden[:B, :inner], done.x[:B, :dim]

    qkv = done.qkv[:B].reshape(B, 1, -1, D)
    q, k_new, v_new = jnp.split(qkv, [qkv.shape[2] - 2 * kv_heads, qkv.shape[2] - kv_heads], axis=2)
    here = jnp.arange(B), slice(None), start
    keys = k[0].at[here].set(rotate(k_new, cos, sin)[:, 0])
    values = v[0].at[here].set(v_new[:, 0])
    attended = attention_reference(rotate(q, cos, sin), keys, values, start).reshape(B, -1)
    weights = jax.nn.softmax(done.logs[:, :B] * np.log(2), axis=0)  # the other columns, up to 8, are padding
    parts = done.parts[:, :B].reshape(*weights.shape, 8)
    joined = (parts * weights[..., None]).sum(0).reshape(B, -1)[:, : wo.shape[1]].astype(jnp.bfloat16)

    norm = functools.partial(rms_norm_reference, eps=EPS)
    wide = functools.partial(matmul_reference, out_dtype=jnp.float32)
    return {
        "qkv": (done.qkv[:B], wide(norm(x[:, 0], attn_norm), wqkv)),
        "attend": (joined, attended),
        "cache": (done.k[0][here], rotate(k_new, cos, sin)[:, 0]),
        "o": (x_mid, x[:, 0] + wide(joined, wo)),
        "gate_up": (hidden, swiglu(wide(norm(x_mid, ffn_norm), w_gate_up))),
        "down": (x_out, x_mid + wide(hidden, w_down)),
        "head": (done.logits[:B], wide(norm(x_out, w.norm), w.head)),
    }


def worst(mine: jax.Array, wanted: jax.Array) -> jax.Array:
    """The largest difference, relative to the number and to the mean magnitude. A value that a block read too early
    shows; rounding of a number far above the others does not."""
    mine, wanted = mine.astype(jnp.float32), wanted.astype(jnp.float32)
    return (jnp.abs(mine - wanted) / (jnp.abs(wanted) + jnp.sqrt((wanted * wanted).mean()))).max()


def test_phases_are_compared_as_they_should() -> None:
    """`by_phase` on an interpreted step: the GPU stress test compares with the right values and detects an error."""
    case = Case((5, 9), 64, fmt="int8", blocks=2)
    args = case.arguments()
    tiles = StepTiles(depth=4, chunk=1024)
    done = run_phases(*args, eps=EPS, tiles=tiles, blocks=2, interpret=plgpu.InterpretGPUParams())
    errors = jax.jit(lambda *a: {name: worst(*both) for name, both in by_phase(*a).items()})(args, done)
    assert max(errors.values()) < 0.06, errors
    done = dataclasses.replace(done, hidden=done.hidden.at[0, 7].add(1))
    assert jax.jit(lambda *a: worst(*by_phase(*a)["gate_up"]))(args, done) > 0.1


@pytest.mark.gpu
@pytest.mark.timeout(300)
@pytest.mark.parametrize("fmt", ON_GPU)
def test_every_phase_of_10000_steps_on_gpu(fmt: str) -> None:
    """Fresh inputs at every step, so a value that a block reads too early is one of another step, and wrong."""
    size = dict(dim=1024, hidden=2048, heads=16, kv_heads=8, head_dim=64, vocab=2048, layers=1)
    _, weights, k, v, *_ = arguments(fmt, (0, 0, 0), 1, 512, **size)

    def one(state: tuple, key: jax.Array) -> tuple:
        k, v, errors = state
        x = jax.random.normal(key, (3, 1, size["dim"]), jnp.bfloat16)
        start = jax.random.randint(key, (3,), 0, 500)
        args = (x, weights, k, v, start, *rotations(start, 1, size["head_dim"]))
        done = run_phases(*args, eps=EPS)
        new = jnp.stack([worst(*both) for both in by_phase(args, done).values()])
        return (done.k, done.v, jnp.maximum(errors, new)), None

    keys = jax.random.split(jax.random.key(2), 10_000)
    errors = jax.jit(lambda k, v: jax.lax.scan(one, (k, v, jnp.zeros(7)), keys)[0][2])(k, v)
    assert errors.max() < 0.06, errors


@pytest.mark.gpu
def test_a_stalled_step_says_where_on_gpu(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    """With one block missing, a step with a spin limit ends, and names the first phase that no block could enter."""
    args = arguments("bf16", (3,), 1, 64, **(SMALL | dict(dim=1024, hidden=1024)))
    whole = launch.plgpu.kernel

    def one_block_less(*args: Any, grid: tuple[int], **options: Any) -> Any:
        return whole(*args, grid=(grid[0] - 1,), **options)

    monkeypatch.setattr(launch.plgpu, "kernel", one_block_less)
    jax.block_until_ready(jax.jit(functools.partial(run_phases, eps=EPS, spin_limit=10_000))(*args))
    assert "stopped waiting for attend of layer 0" in capfd.readouterr().out

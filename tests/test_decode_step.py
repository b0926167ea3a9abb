"""The persistent decode step against its reference.

Tiny models run in Pallas's GPU interpreter, a launch for every phase; the real shapes are lowered for an H200 without
one, as the single launch that a GPU runs; on a Hopper GPU they run (marker gpu).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from h200 import H200, SMS
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

from jllama.cache import init_cache
from jllama.config import LlamaConfig
from jllama.model import forward
from jllama.params import init, stack
from jllama.rope import rotations as model_rotations
from pallas_kernels import QuantizedTensor, Unsupported, dequantize, persistent_launch, quantize
from pallas_kernels.attention import attention_reference
from pallas_kernels.decode_step import (
    CASES,
    StepWeights,
    check,
    decode_step,
    decode_step_kernel,
    decode_step_reference,
    phases,
    plan_of,
    rotate_reference,
    shape_of,
)
from pallas_kernels.ffn import swiglu
from pallas_kernels.matmul import matmul_reference
from pallas_kernels.persistent_lanes import digits_of
from pallas_kernels.persistent_launch import buffers
from pallas_kernels.persistent_plan import Tiles
from pallas_kernels.rms_norm import rms_norm_reference

pytestmark = pytest.mark.timeout(60)

EPS = 1e-5
FORMATS = {"bf16": {}, "int8": dict(bits=8), "int4-g128": dict(bits=4, group=128)}
SMALL = dict(dim=128, hidden=256, heads=2, kv_heads=1, head_dim=64, vocab=128, layers=1)


def arguments(fmt: str, start: tuple[int, ...], queries: int, max_len: int, seed: int = 0, **size: int) -> tuple:
    """Random weights of a stable scale, a cache with content up to ``start``, and new tokens."""
    dim, D, L, hidden = size["dim"], size["head_dim"], size["layers"], size["hidden"]
    heads, kv_heads, B = size["heads"], size["kv_heads"], len(start)
    keys = iter(jax.random.split(jax.random.key(seed), 16))

    def normal(*shape: int, scale: float = 1.0) -> jax.Array:
        return (jax.random.normal(next(keys), shape, jnp.float32) * scale).astype(jnp.bfloat16)

    def weight(*shape: int) -> Any:
        w = normal(*shape, scale=shape[-1] ** -0.5)
        return quantize(w, **FORMATS[fmt]) if FORMATS[fmt] else w

    weights = StepWeights(
        attn_norm=1 + normal(L, dim, scale=0.1),
        wqkv=weight(L, (heads + 2 * kv_heads) * D, dim),
        wo=weight(L, dim, heads * D),
        ffn_norm=1 + normal(L, dim, scale=0.1),
        w_gate_up=weight(L, 2 * hidden, dim),
        w_down=weight(L, dim, hidden),
        norm=1 + normal(dim, scale=0.1),
        head=weight(size["vocab"], dim),
    )
    x = normal(B, queries, dim)
    k, v = normal(L, B, kv_heads, max_len, D), normal(L, B, kv_heads, max_len, D)
    begin = jnp.array(start, jnp.int32)
    return x, weights, k, v, begin, *rotations(begin, queries, D)


def rotations(start: jax.Array, queries: int, D: int) -> tuple[jax.Array, jax.Array]:
    positions = start[:, None] + jnp.arange(queries)
    angles = positions[..., None] * (10000.0 ** (-jnp.arange(0, D, 2) / D))
    return jnp.cos(angles), jnp.sin(angles)


def exact(args: tuple) -> tuple:
    """The reference in float32, of the weights that the quantised ones stand for."""

    def widen(a: Any) -> Any:
        if isinstance(a, QuantizedTensor):
            return dequantize(a)
        return a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a

    wide = jax.tree.map(widen, args, is_leaf=lambda a: isinstance(a, QuantizedTensor))
    return jax.jit(functools.partial(decode_step_reference, eps=EPS))(*wide)


def error(a: Any, reference: Any) -> float:
    a, reference = np.asarray(a, np.float32), np.asarray(reference, np.float32)
    assert a.shape == reference.shape
    return float(np.linalg.norm(a - reference) / np.linalg.norm(reference))


def compare(out: tuple, args: tuple, tolerance: float = 2e-2) -> None:
    """Logits and new keys within bf16's rounding of the residual stream; all else in the cache untouched."""
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
    """One step of a tiny model, small enough for the interpreter. ``blocks`` that do not divide the outputs let two
    blocks write the same values to the same place, which the race detector would report."""

    start: tuple[int, ...]
    max_len: int = 64
    queries: int = 1
    fmt: str = "bf16"
    blocks: int = 2
    size: dict[str, int] = dataclasses.field(default_factory=dict)
    tiles: dict[str, int] = dataclasses.field(default_factory=dict)

    def arguments(self) -> tuple:
        return arguments(self.fmt, self.start, self.queries, self.max_len, **(SMALL | self.size))


SMALL_CASES = {
    "one-launch": Case((70,), 128, blocks=1, size=dict(layers=2)),  # all phases, the ring running ahead
    "one-launch-in-chunks": Case(
        (0, 65), 128, queries=3, blocks=1, size=dict(layers=2, hidden=1280), tiles=dict(chunk=1024, consumers=1)
    ),
    "ragged-from-empty": Case((0, 5, 64), 72, blocks=5, tiles=dict(stages=1)),
    "many-tokens-past-the-end": Case((61,), queries=4, size=dict(head_dim=128, heads=2), tiles=dict(chunk=1024)),
    "chunks-of-one-token": Case((5,), blocks=1, size=dict(hidden=1280), tiles=dict(chunk=1024)),
    "cuts-in-chunks-the-last-shorter": Case((5,), blocks=4, size=dict(hidden=2176)),
    "a-tile-of-two-cuts": Case((3,), blocks=6, size=dict(dim=256, heads=4, kv_heads=2)),
    "int8": Case((9,), fmt="int8", blocks=1),
    "int4": Case((9,), fmt="int4-g128", queries=2, blocks=1, size=dict(dim=256, heads=4, kv_heads=2)),
    "int4-a-tile-of-two-cuts": Case(
        (3,), fmt="int4-g128", blocks=6, size=dict(dim=512, heads=4, kv_heads=2), tiles=dict(step=256)
    ),
    "int4-cuts": Case(
        (5,), fmt="int4-g128", blocks=8, size=dict(dim=256, heads=4, kv_heads=2, hidden=1280), tiles=dict(step=256)
    ),
}


@pytest.mark.parametrize("name", SMALL_CASES)
def test_phases_interpreted(name: str) -> None:
    case = SMALL_CASES[name]
    args = case.arguments()
    tiles = Tiles(**(dict(depth=4, chunk=2048, consumers=2) | case.tiles))
    even = SMALL["dim"] // 8 % case.blocks == 0
    interpret = plgpu.InterpretGPUParams(detect_races=even)
    out = decode_step_kernel(*args, eps=EPS, tiles=tiles, blocks=case.blocks, interpret=interpret)
    jax.block_until_ready(out)
    assert not (even and interpret_pallas_call.get_races().races_found)
    compare(out, args)


@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30, 0.0])
def test_digits_are_x(size: float) -> None:
    """Two digits give back every bit of a bfloat16 that is not far below the largest of its block."""
    x = jax.random.normal(jax.random.key(0), (8, 256), jnp.float32).astype(jnp.bfloat16) * jnp.bfloat16(size)
    (first, second), scale = digits_of(x)
    assert jnp.abs(jnp.stack([first, second]).astype(jnp.int32)).max() <= 127
    exact = np.asarray(x, np.float64)
    back = np.asarray(scale, np.float64)[:, None] * (np.asarray(first) + np.asarray(second) / 254.0) / 127
    assert np.abs(back - exact).max(initial=0) <= 2.0**-16 * 2 * np.abs(exact).max(initial=0)
    assert np.linalg.norm(back - exact) <= 1e-4 * np.linalg.norm(exact)


def test_digits_of_what_is_no_number_are_worth_none() -> None:
    x = jnp.ones((2, 256), jnp.bfloat16).at[0, 3].set(jnp.nan).at[1, 5].set(jnp.inf)
    digits, scale = digits_of(x)
    assert not jnp.isfinite(sum(d.astype(jnp.float32) for d in digits) * scale[:, None]).any()


# The reference


def test_reference_is_the_models_forward() -> None:
    """Two steps of `jllama.model.forward` and of the reference, on stacked weights and cache."""
    config = LlamaConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=96, vocab_size=80)
    params = init(config, jax.random.key(0), dtype=jnp.float32)
    layers = stack(params).layers
    fields = {f.name: getattr(layers, f.name) for f in dataclasses.fields(layers)}
    weights = StepWeights(**fields, norm=params.norm, head=params.head)
    cache = init_cache(config, 2, 16, jnp.float32).replace(lengths=jnp.array([3, 0], jnp.int32))
    k, v = jnp.stack(cache.k), jnp.stack(cache.v)
    for tokens in (jnp.array([[7, 9], [8, 1]]), jnp.array([[5], [6]])):
        start = cache.lengths
        cos, sin = model_rotations(start[:, None] + jnp.arange(tokens.shape[1]), config)
        x = params.embed[tokens]
        logits, k, v = decode_step(x, weights, k, v, start, cos, sin, eps=config.norm_eps, backend="xla")
        wanted, cache = forward(params, tokens, cache, backend="xla")
        np.testing.assert_allclose(logits, wanted, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(k, jnp.stack(cache.k), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(v, jnp.stack(cache.v), rtol=1e-5, atol=1e-5)


# Lowered for an H200: the real shapes


def abstract(fmt: str, batch: int, queries: int, max_len: int, **size: int) -> tuple:
    """The arguments of a real model, without its gigabytes."""
    array, L, D, dim = jax.ShapeDtypeStruct, size["layers"], size["head_dim"], size["dim"]

    def weight(*shape: int) -> Any:
        if not FORMATS[fmt]:
            return array(shape, jnp.bfloat16)
        grouped = "group" in FORMATS[fmt]
        scale = (*shape[:-1], shape[-1] // FORMATS[fmt].get("group", shape[-1]))
        data = array(shape, jnp.int8 if FORMATS[fmt]["bits"] == 8 else jnp.int4)
        return QuantizedTensor(data, array(scale, jnp.float16 if grouped else jnp.float32))  # type: ignore[arg-type]

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
    [("7b", "bf16", 1, 1), ("7b", "int8", 8, 1), ("7b", "int4-g128", 1, 1), ("70b", "bf16", 1, 8),
     ("tinyllama", "bf16", 3, 2)],
)  # fmt: skip
def test_real_shapes_lower(case: str, fmt: str, batch: int, queries: int) -> None:
    size = CASES[case]
    if case == "70b":  # all that is special in one tile a strip: the whole takes half a minute
        size = size | dict(hidden=8192, vocab=8192)
    args = abstract(fmt, batch, queries, 1024, **size)
    with jax.sharding.use_abstract_mesh(H200):
        check(*args, eps=EPS)
        step = jax.jit(functools.partial(decode_step_kernel, eps=EPS))
        text = step.trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 1  # one launch, whose buffers, the cache among them, are changed in place
    shape = shape_of(*args[:3], eps=EPS)
    assert text.count("output_tuple_indices") == len(buffers(plan_of(shape, blocks=SMS))) + 2 + 1  # k, v, semaphore


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(queries=9), "1 to 8 tokens"),
        (dict(head_dim=32), "head_dim must be 64 or 128"),
        (dict(heads=64, kv_heads=4), "at most 8 query heads"),
        (dict(max_len=1023), "multiple of 8"),
        (dict(dim=2048 + 64), "dim must be a multiple of 128"),
        (dict(vocab=32001), "vocab must be a multiple of 8"),
    ],
)
def test_refused_with_the_reason(change: dict[str, int], reason: str) -> None:
    size = CASES["tinyllama"] | change
    args = abstract("bf16", 1, size.pop("queries", 1), size.pop("max_len", 1024), **size)
    with jax.sharding.use_abstract_mesh(H200), pytest.raises(Unsupported, match=reason):
        check(*args, eps=EPS)


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


# Compiled


GPU_CASES = {
    "small": (dict(dim=512, hidden=1024, heads=8, kv_heads=2, head_dim=64, vocab=1000, layers=3), (5, 0, 300), 2),
    "7b-layers": (CASES["7b"] | dict(layers=2), (700,), 1),
    "7b-eight": (CASES["7b"] | dict(layers=2), (700, 1, 0, 64, 63, 65, 900, 127), 1),
    "70b-layers": (CASES["70b"] | dict(layers=1), (700,), 8),
    "tinyllama": (CASES["tinyllama"] | dict(layers=2), (1020, 9), 4),
}


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("name", GPU_CASES)
def test_step_on_gpu(name: str, fmt: str) -> None:
    size, start, queries = GPU_CASES[name]
    args = jax.jit(lambda: arguments(fmt, start, queries, 1024, **size))()
    step = jax.jit(functools.partial(decode_step, eps=EPS, backend="pallas"))
    out = step(*args)
    compare(out, args)
    for _ in range(20):
        jax.tree.map(np.testing.assert_array_equal, step(*args), out)


@pytest.mark.gpu
def test_many_steps_on_gpu() -> None:
    """A donated scan of steps, each with fresh inputs, that finds its own keys again: after every step the logits are
    those of the reference on the same cache."""
    size = dict(dim=512, hidden=1024, heads=8, kv_heads=2, head_dim=64, vocab=1000, layers=3)
    steps, D = 500, size["head_dim"]
    args = arguments("bf16", (0, 7), 1, 512, **size)
    weights, k, v, start = args[1:5]
    xs = jax.random.normal(jax.random.key(1), (steps, 2, 1, size["dim"]), jnp.bfloat16)

    def run(backend: str, k: jax.Array, v: jax.Array) -> tuple:
        def one(carry: tuple, x: jax.Array) -> tuple:
            k, v, start = carry
            logits, k, v = decode_step(x, weights, k, v, start, *rotations(start, 1, D), eps=EPS, backend=backend)
            return (k, v, start + 1), logits

        return jax.lax.scan(one, (k, v, start), xs)

    both = {b: jax.jit(functools.partial(run, b))(k, v) for b in ("xla", "pallas")}
    for mine, wanted in zip(both["pallas"][1], both["xla"][1], strict=True):
        assert error(mine, wanted) < 2e-2
    again = jax.jit(functools.partial(run, "pallas"), donate_argnums=(0, 1))(k, v)
    jax.tree.map(np.testing.assert_array_equal, again, both["pallas"])


def by_phase(args: tuple, done: dict[str, jax.Array]) -> dict[str, tuple[jax.Array, jax.Array]]:
    """What each phase of a step of one layer and one token a row left, and what the reference makes of that which the
    phase before left."""
    x, w, k, v, start, cos, sin = args
    B, D, kv_heads = x.shape[0], k.shape[4], k.shape[2]
    rows = {name: a[:B] for name, a in done.items() if name in ("qkv", "x_mid", "hidden", "x", "logits")}
    layer = jax.tree.map(lambda a: a[0], (w.attn_norm, w.wqkv, w.wo, w.ffn_norm, w.w_gate_up, w.w_down))
    attn_norm, wqkv, wo, ffn_norm, w_gate_up, w_down = layer
    dim, inner = w_down.shape
    x_mid, hidden, x_out = rows["x_mid"][:, :dim], rows["hidden"][:, :inner], rows["x"][:, :dim]

    qkv = rows["qkv"].reshape(B, 1, -1, D)
    q, k_new, v_new = jnp.split(qkv, [qkv.shape[2] - 2 * kv_heads, qkv.shape[2] - kv_heads], axis=2)
    here = jnp.arange(B), slice(None), start
    keys = k[0].at[here].set(rotate_reference(k_new, cos, sin)[:, 0])
    values = v[0].at[here].set(v_new[:, 0])
    attended = attention_reference(rotate_reference(q, cos, sin), keys, values, start).reshape(B, -1)
    weights = jax.nn.softmax(done["logs"][:, :B] * np.log(2), axis=0)  # of 8 columns each
    parts = done["parts"][:, :B].reshape(*weights.shape, 8)
    joined = (parts * weights[..., None]).sum(0).reshape(B, -1)[:, : wo.shape[1]].astype(jnp.bfloat16)

    norm = functools.partial(rms_norm_reference, eps=EPS)
    wide = functools.partial(matmul_reference, out_dtype=jnp.float32)
    return {
        "qkv": (rows["qkv"], wide(norm(x[:, 0], attn_norm), wqkv)),
        "attend": (joined, attended),
        "cache": (done["k"][0][here], rotate_reference(k_new, cos, sin)[:, 0]),
        "o": (x_mid, x[:, 0] + wide(joined, wo)),
        "gate_up": (hidden, swiglu(wide(norm(x_mid, ffn_norm), w_gate_up))),
        "down": (x_out, x_mid + wide(hidden, w_down)),
        "head": (rows["logits"], wide(norm(x_out, w.norm), w.head)),
    }


def worst(mine: jax.Array, wanted: jax.Array) -> jax.Array:
    """The largest difference, as a share of the number and of the size of all: what one block read too early would
    show, and rounding of a number far above the others does not."""
    mine, wanted = mine.astype(jnp.float32), wanted.astype(jnp.float32)
    return (jnp.abs(mine - wanted) / (jnp.abs(wanted) + jnp.sqrt((wanted * wanted).mean()))).max()


def test_phases_are_compared_as_they_should() -> None:
    """`by_phase` on an interpreted step: the stress test on a GPU compares with the right thing, and would notice."""
    case = Case((5, 9), 64, fmt="int8", blocks=2)
    args = case.arguments()
    done = phases(*args, eps=EPS, tiles=Tiles(depth=4, chunk=1024), blocks=2, interpret=plgpu.InterpretGPUParams())
    errors = {name: float(worst(*both)) for name, both in by_phase(args, done).items()}
    assert max(errors.values()) < 0.03, errors
    done["hidden"] = done["hidden"].at[0, 7].add(1)
    assert worst(*by_phase(args, done)["gate_up"]) > 0.1


@pytest.mark.gpu
@pytest.mark.timeout(300)
@pytest.mark.parametrize("fmt", FORMATS)
def test_every_phase_of_10000_steps_on_gpu(fmt: str) -> None:
    """Fresh inputs at every step, so that whatever a block reads before it is there is from another step, and wrong."""
    size = dict(dim=1024, hidden=2048, heads=16, kv_heads=8, head_dim=64, vocab=2048, layers=1)
    _, weights, k, v, *_ = arguments(fmt, (0, 0, 0), 1, 512, **size)

    def one(state: tuple, key: jax.Array) -> tuple:
        k, v, errors = state
        x = jax.random.normal(key, (3, 1, size["dim"]), jnp.bfloat16)
        start = jax.random.randint(key, (3,), 0, 500)
        args = (x, weights, k, v, start, *rotations(start, 1, size["head_dim"]))
        done = phases(*args, eps=EPS)
        new = jnp.stack([worst(*both) for both in by_phase(args, done).values()])
        return (done["k"], done["v"], jnp.maximum(errors, new)), None

    keys = jax.random.split(jax.random.key(2), 10_000)
    errors = jax.jit(lambda k, v: jax.lax.scan(one, (k, v, jnp.zeros(7)), keys)[0][2])(k, v)
    assert errors.max() < 0.03, errors


@pytest.mark.gpu
def test_a_stalled_step_says_where_on_gpu(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    """With one block missing, a step with patience ends, and names the first phase that nobody could enter."""
    args = arguments("bf16", (3,), 1, 64, **(SMALL | dict(dim=1024, hidden=1024)))
    whole = persistent_launch._kernel
    monkeypatch.setattr(
        persistent_launch, "_kernel", lambda plan, *a: whole(dataclasses.replace(plan, blocks=plan.blocks - 1), *a)
    )
    jax.block_until_ready(jax.jit(functools.partial(phases, eps=EPS, patience=10_000))(*args))
    assert "waited in vain for attend of layer 0" in capfd.readouterr().out

"""Every reference op against float64 numpy, with a tolerance from the dtype and the length of the sums."""

import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jllama.cache import init_cache
from jllama.config import LlamaConfig, RopeScaling
from jllama.model import forward
from jllama.params import init
from jllama.rope import inverse_frequencies, rotations
from pallas_kernels import (
    OPS,
    Choice,
    Op,
    Unsupported,
    attention,
    dequantize,
    dispatch,
    ffn,
    matmul,
    quantize,
    record,
    rms_norm,
)
from pallas_kernels.arch import Target, arch_of
from pallas_kernels.dispatch import Kernel
from pallas_kernels.matmul import float_product
from pallas_kernels.qkv import rotate, split_heads, write

DTYPES = ("float32", "bfloat16", "float16")
EPS = 1e-5


def random(shape: tuple[int, ...], dtype: str = "float32", seed: int = 0, scale: float = 1.0) -> jax.Array:
    return jnp.asarray(np.random.RandomState(seed).standard_normal(shape) * scale, dtype)


def f64(x: jax.Array) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32), np.float64)


def assert_close(found: jax.Array, expected: np.ndarray, dtype: str, reduction: int) -> None:
    """Within a few roundings to ``dtype`` and the random walk of a float32 sum, relative to the largest value."""
    assert str(found.dtype) == dtype
    assert found.shape == expected.shape
    tolerance = 4 * float(jnp.finfo(dtype).eps) + 2 * np.finfo(np.float32).eps * reduction**0.5
    error = np.abs(f64(found) - expected).max() / np.abs(expected).max()
    assert error < tolerance, f"relative error {error:.2e}, expected below {tolerance:.2e}"


def np_norm(x: np.ndarray, weight: np.ndarray, eps: float = EPS) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def np_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, start: list[int]) -> np.ndarray:
    """A loop over rows, heads and queries. Every query takes a slice of the keys, so no mask is needed."""
    out = np.zeros_like(q)
    group = q.shape[2] // k.shape[1]
    for b, t, h in np.ndindex(q.shape[:3]):
        n = start[b] + t + 1
        scores = k[b, h // group, :n] @ q[b, t, h] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, t, h] = weights / weights.sum() @ v[b, h // group, :n]
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (2, 3, 48), (1, 1, 4096)])
def test_rms_norm(shape: tuple[int, ...], dtype: str) -> None:
    x, weight = random(shape, dtype, scale=3.0), random(shape[-1:], dtype, seed=1)
    assert_close(rms_norm(x, weight, eps=EPS, backend="xla"), np_norm(f64(x), f64(weight)), dtype, shape[-1])


def test_rms_norm_keeps_its_statistics_in_float32() -> None:
    x = jnp.full((1, 64), 300.0, jnp.float16)  # the square overflows float16
    out = rms_norm(x, jnp.ones(64, jnp.float16), eps=EPS, backend="xla")
    np.testing.assert_allclose(f64(out), 1.0, rtol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [(1,), (5,), (2, 3)])
def test_matmul(rows: tuple[int, ...], dtype: str) -> None:
    x, w = random((*rows, 96), dtype), random((40, 96), dtype, seed=1)
    assert_close(matmul(x, w, backend="xla"), f64(x) @ f64(w).T, dtype, 96)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group"), [(8, None), (8, 64), (4, None), (4, 32), (4, 128)])
def test_matmul_with_integers_is_the_product_with_what_they_stand_for(bits: int, group: int | None, dtype: str) -> None:
    x, w = random((3, 256), dtype), quantize(random((40, 256), seed=1), f"int{bits}", group=group)
    meant = f64(w.data) * np.repeat(f64(w.scale), w.group, axis=-1)
    # The specification. `test_cpu` bounds the limbs that take its place on a CPU.
    assert_close(float_product(x, w).astype(dtype), f64(x) @ meant.T, dtype, 256)


@pytest.mark.parametrize("dtype", DTYPES)
def test_matmul_adds_the_residual(dtype: str) -> None:
    x, w, residual = random((2, 3, 96), dtype), random((40, 96), dtype, seed=1), random((2, 3, 40), dtype, seed=2)
    expected = f64(residual) + f64(x) @ f64(w).T
    assert_close(matmul(x, w, residual=residual, backend="xla"), expected, dtype, 96)


def test_matmul_rounds_once_to_the_dtype_asked_for() -> None:
    x, w = random((3, 96), "bfloat16"), random((40, 96), "bfloat16", seed=1)
    assert_close(matmul(x, w, out_dtype=jnp.float32, backend="xla"), f64(x) @ f64(w).T, "float32", 96)


@pytest.mark.parametrize(("bits", "group"), [(8, None), (8, 32), (4, None), (4, 64)])
def test_quantize_rounds_to_the_nearest_step_and_keeps_zero(bits: int, group: int | None) -> None:
    w = random((16, 128)).at[3].set(0.0)
    q = quantize(w, f"int{bits}", group=group)
    limit = 2 ** (bits - 1) - 1
    step = np.repeat(f64(q.scale), q.group, axis=-1)
    assert (q.shape, q.bits, q.group) == (w.shape, bits, group or 128)
    assert np.abs(f64(q.data)).max() == limit
    # Half a step, plus the float16 rounding of the scale times the largest value. Clipped values may be further off.
    slack = step * (0.5 + limit * float(jnp.finfo(q.scale.dtype).eps))
    clipped = (np.abs(f64(q.data)) == limit) & (np.abs(f64(w)) > limit * step)
    assert ((np.abs(f64(dequantize(q)) - f64(w)) <= slack) | clipped).all()
    assert (f64(dequantize(q))[3] == 0).all()
    assert q.nbytes == 16 * 128 * bits // 8 + q.scale.nbytes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "queries", "slots", "start"),
    [
        (4, 4, 6, 6, [0, 0, 0]),
        (8, 2, 6, 6, [0, 0, 0]),
        (4, 1, 1, 16, [15, 0, 7]),
        (8, 2, 5, 16, [0, 3, 11]),
    ],
    ids=["multi-head", "grouped", "decode-ragged", "continued-ragged"],
)
def test_attention(heads: int, kv_heads: int, queries: int, slots: int, start: list[int], dtype: str) -> None:
    q = random((3, queries, heads, 8), dtype)
    k, v = (random((3, kv_heads, slots, 8), dtype, seed=s, scale=2.0) for s in (1, 2))
    out = attention(q, k, v, jnp.asarray(start), backend="xla")
    assert_close(out, np_attention(f64(q), f64(k), f64(v), start), dtype, slots)


def test_attention_sees_nothing_behind_a_rows_position() -> None:
    q, k, v = random((2, 2, 4, 8)), random((2, 2, 12, 8), seed=1), random((2, 2, 12, 8), seed=2)
    start = jnp.asarray([0, 5])
    kept = attention(q, k, v, start, backend="xla")
    for row, end in enumerate((2, 7)):
        k, v = k.at[row, :, end:].set(1e4), v.at[row, :, end:].set(-1e4)
    np.testing.assert_array_equal(attention(q, k, v, start, backend="xla"), kept)
    changed = attention(q, k.at[1, :, 6].set(0.0), v, start, backend="xla")
    assert not np.array_equal(changed[1], kept[1])  # position 6 is row 1's last


@pytest.mark.parametrize("dtype", DTYPES)
def test_ffn_has_its_norm_and_residual(dtype: str) -> None:
    dim, hidden = 48, 80
    x, norm = random((2, 3, dim), dtype), random((dim,), dtype, seed=1)
    gate_up, down = random((2 * hidden, dim), dtype, 2, dim**-0.5), random((dim, hidden), dtype, 3, hidden**-0.5)
    gate, up = np.split(np_norm(f64(x), f64(norm)) @ f64(gate_up).T, 2, axis=-1)
    expected = f64(x) + (gate / (1 + np.exp(-gate)) * up) @ f64(down).T
    assert_close(ffn(x, norm, gate_up, down, eps=EPS, backend="xla"), expected, dtype, hidden)


SCALINGS = {
    "none": None,
    "linear": RopeScaling("linear", 4.0),
    "llama3": RopeScaling("llama3", 8.0, 1.0, 4.0, 64),
}


def np_frequencies(config: LlamaConfig) -> list[float]:
    """As in Llama 3's reference code: one pair at a time, by wavelength."""
    freqs = []
    for i in range(0, config.head_dim, 2):
        freq = config.rope_theta ** (-i / config.head_dim)
        scaling = config.rope_scaling
        if scaling is not None and scaling.kind == "linear":
            freq /= scaling.factor
        elif scaling is not None:
            wave = 2 * np.pi / freq
            long, short = (
                scaling.original_max_seq_len / f for f in (scaling.low_freq_factor, scaling.high_freq_factor)
            )
            smooth = (scaling.original_max_seq_len / wave - scaling.low_freq_factor) / (
                scaling.high_freq_factor - scaling.low_freq_factor
            )
            between = (1 - smooth) * freq / scaling.factor + smooth * freq
            freq = freq / scaling.factor if wave > long else freq if wave < short else between
        freqs.append(freq)
    return freqs


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("theta", [100.0, 10000.0, 500000.0])
def test_rope_turns_pairs_by_position(name: str, theta: float) -> None:
    config = tiny.CONFIG.replace(head_dim=16, rope_theta=theta, rope_scaling=SCALINGS[name])
    freqs = np_frequencies(config)
    np.testing.assert_allclose(inverse_frequencies(config), freqs, rtol=1e-12)
    positions = np.array([[0, 1, 2, 63], [500, 501, 502, 4095]])
    x = random((2, 4, 3, 16))
    pairs = f64(x)[..., :8] + 1j * f64(x)[..., 8:]
    turned = pairs * np.exp(1j * positions[..., None, None] * np.array(freqs))
    out = rotate(x, *rotations(jnp.asarray(positions), config))
    # Angles are float32, so at position p the error is up to p roundings.
    error = np.abs(f64(out) - np.concatenate([turned.real, turned.imag], -1)).max(axis=(2, 3))
    assert (error <= 8 * (positions + 4) * 2.0**-24).all()


def test_llama3_scaling_has_all_three_ranges_in_the_case_above() -> None:
    config = tiny.CONFIG.replace(head_dim=16)
    scaled, plain = (inverse_frequencies(config.replace(rope_scaling=s)) for s in (SCALINGS["llama3"], None))
    ratio = scaled / plain
    assert (ratio[0], ratio[-1]) == (1, 1 / 8)
    assert ((ratio > 1 / 8) & (ratio < 1)).any()


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_norm_and_head_alone_make_logits(tied: bool) -> None:
    params = tiny.model(config=tiny.CONFIG.replace(n_layers=0, tie_embeddings=tied))
    params = params.replace(norm=random((32,), seed=5))
    tokens = jnp.asarray([[0, 95, 7], [7, 7, 1]])
    logits, cache = forward(params, tokens, backend="xla")
    x = np_norm(f64(params.embed)[np.asarray(tokens)], f64(params.norm))
    assert cache is None
    assert_close(logits, x @ f64(params.embed if tied else params.lm_head).T, "float32", 32)


def test_blocks_that_write_nothing_leave_the_residual_stream_as_it_is() -> None:
    params, tokens = tiny.model(), jnp.asarray([[5, 6, 7]])
    silent = params.replace(
        layers=tuple(x.replace(wo=jnp.zeros_like(x.wo), w_down=jnp.zeros_like(x.w_down)) for x in params.layers)
    )
    bare = params.replace(layers=(), config=params.config.replace(n_layers=0))
    expected, _ = forward(bare, tokens)
    np.testing.assert_array_equal(forward(silent, tokens)[0], expected)
    assert not np.allclose(forward(params, tokens)[0], expected)


@pytest.mark.parametrize("shards", [1, 2])
def test_split_heads_counts_from_the_array(shards: int) -> None:
    heads, kv_heads = 8 // shards, 4 // shards
    y = jnp.arange(heads + 2 * kv_heads).repeat(8) * jnp.ones((1, 2, 1))
    q, k, v = split_heads(y, 2, 8)
    assert [a.shape[2] for a in (q, k, v)] == [heads, kv_heads, kv_heads]
    np.testing.assert_array_equal(jnp.concatenate([q, k, v], axis=2)[0, 0, :, 0], np.arange(heads + 2 * kv_heads))


def test_cache_write_goes_behind_each_rows_length_and_drops_what_does_not_fit() -> None:
    layers, new, start = jnp.zeros((2, 3, 2, 8, 8)), random((3, 3, 2, 8)), jnp.asarray([0, 6, 8])
    expected = np.zeros((2, 3, 2, 8, 8), np.float32)
    expected[1, 0, :, 0:3] = np.asarray(new)[0].swapaxes(0, 1)
    expected[1, 1, :, 6:8] = np.asarray(new)[1, :2].swapaxes(0, 1)
    np.testing.assert_array_equal(write(layers, new, start, 1), expected)
    np.testing.assert_array_equal(write(layers[1], new, start), expected[1])


def fake_op(check: Any = None) -> Op:
    return Op("double", lambda x: 2 * x, {"hopper": Kernel(lambda x: 2 * x + 0.5, check)})


def pretend(monkeypatch: pytest.MonkeyPatch, platform: str, capability: str = "", kind: str = "some chip") -> None:
    device = types.SimpleNamespace(platform=platform, compute_capability=capability, device_kind=kind)
    monkeypatch.setattr(dispatch, "target", lambda *_: Target(arch_of(device)))


def test_dispatch_runs_the_kernel_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "gpu", "9.0")
    op = fake_op()
    assert [op(1.0, backend=b) for b in ("xla", "auto", "pallas")] == [2.0, 2.5, 2.5]
    assert op.choose("auto", 1.0).impl == "pallas"


@pytest.mark.parametrize(
    ("platform", "capability", "reason"),
    [
        ("cpu", "", "needs an NVIDIA Hopper GPU, found platform 'cpu'"),
        ("gpu", "8.0", "Hopper.*found some chip with compute capability 8.0"),
    ],
)
def test_dispatch_falls_back_only_when_not_asked(
    monkeypatch: pytest.MonkeyPatch, platform: str, capability: str, reason: str
) -> None:
    pretend(monkeypatch, platform, capability)
    op = fake_op()
    with record() as choices:
        assert op(1.0) == 2.0
    assert choices["double"].impl == "xla"
    with pytest.raises(Unsupported, match=f"double: .*{reason}"):
        op(1.0, backend="pallas")


def test_dispatch_asks_the_kernels_own_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(x: float) -> None:
        if x > 1:
            raise Unsupported(f"expected at most 1, found {x}")

    pretend(monkeypatch, "gpu", "9.0")
    op = fake_op(check)
    assert (op(1.0), op(2.0)) == (2.5, 4.0)
    assert op.choose("auto", 2.0) == Choice("xla", "expected at most 1, found 2.0")
    with pytest.raises(Unsupported, match="double: expected at most 1, found 2"):
        op(2.0, backend="pallas")


def test_dispatch_refuses_a_backend_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="backend: expected one of auto, xla, pallas, found 'cuda'"):
        fake_op()(1.0, backend="cuda")


def test_record_tells_what_every_op_of_a_forward_got_and_nothing_afterwards() -> None:
    params, tokens = init(tiny.CONFIG, jax.random.key(0)), jnp.ones((1, 2), jnp.int32)
    with record() as choices:
        forward(params, tokens, init_cache(tiny.CONFIG, 1, 4, jnp.float32), backend="xla")
        forward(params, tokens.repeat(5, 1), init_cache(tiny.CONFIG, 1, 16, jnp.float32), backend="xla")
    # For these, smaller ops run.
    several = ("decode_step", "project_and_attend", "attend_and_write", "qkv", "finish_layer")
    forwards = set(OPS) - {"draw", "paged_attention"}
    assert choices == {n: Choice("ops" if n in several else "xla", "asked for") for n in forwards}
    choices.clear()
    forward(params, tokens, backend="xla")
    assert choices == {}

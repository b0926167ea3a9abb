"""Stacked layers: the same model as a tuple of layers, and a decode step in one launch."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from greedy_text import worst_choice
from h200 import H200
from jax.experimental.pallas import mosaic_gpu as plgpu

from jllama.backends import backends
from jllama.cache import KVCache, cache_bytes, grow, init_cache
from jllama.config import LlamaConfig, preset
from jllama.decode import DecodeState, decode_chunk, generate, prefill, sample_first
from jllama.demo_model import DEMO
from jllama.errors import InputError
from jllama.formats.checkpoint import load, save
from jllama.model import forward
from jllama.params import Params, init, stack, unstack
from jllama.sampling import History, make_sampling
from jllama.step import runs_whole, whole_step
from jllama.stream import Session
from pallas_kernels import Choice, LayerView, materialize, record, write
from pallas_kernels.arch import HOPPER, pinned
from pallas_kernels.attention import attention_reference
from pallas_kernels.hopper.attention import decode as flash_decode
from pallas_kernels.hopper.attention import prefill as flash_attention
from pallas_kernels.hopper.decode_step.plan import StepTiles

# The smallest that the kernel takes.
SMALL = LlamaConfig(
    dim=128, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=64, hidden_dim=256, vocab_size=128, max_seq_len=64
)


def assert_same(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


# Both forms are one model


@pytest.mark.parametrize("quant", ["none", "int8"])
def test_forms_give_the_same_logits_and_caches(quant: str) -> None:
    params = init(tiny.CONFIG, jax.random.key(0), quant=quant)
    tokens, lengths = jnp.asarray([tiny.prompt(8), tiny.prompt(8, 1)]), jnp.asarray([8, 3])
    step = jax.jit(functools.partial(forward, backend="xla"))
    found = []
    for form in (unstack(params), stack(params)):
        cache = init_cache(tiny.CONFIG, 2, 24, jnp.float32, stacked=form.stacked)
        _, cache = step(form, tokens, cache, lengths=lengths)
        logits, cache = step(form, tokens[:, :1], cache)
        assert cache is not None
        k, v = ([materialize(cache.layer(i)[j]) for i in range(tiny.CONFIG.n_layers)] for j in (0, 1))
        found.append((logits, k, v, cache.lengths))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), *found)


def test_forms_give_the_same_text() -> None:
    params = load(DEMO)
    prompt = [1, 300, 12, 13, 14]
    ids = [run(form, prompt, 40) for form in (params, stack(params))]
    assert ids[0] == ids[1]
    inside = jax.jit(functools.partial(generate, max_new_tokens=40, stop_ids=()))
    assert inside(stack(params), jnp.asarray([prompt])).tokens[0].tolist() == ids[0]


def test_a_layer_is_not_cut_out() -> None:
    params = stack(init(tiny.CONFIG, jax.random.key(0), quant="int8"))
    layer = params.layer(1)
    assert isinstance(layer.wqkv, LayerView)
    assert layer.wqkv.stacked is params.layers.wqkv  # type: ignore[union-attr]
    assert layer.wqkv.shape == params.layer(0).wqkv.shape == unstack(params).layer(1).wqkv.shape
    assert layer.attn_norm.shape == (tiny.CONFIG.dim,)
    assert_same(stack(unstack(params)), params)
    assert_same(unstack(params).layer(1), materialize(layer))


@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
def test_made_and_loaded_in_that_form(tmp_path: Path, quant: str) -> None:
    params = init(tiny.CONFIG, jax.random.key(0), quant=quant)
    assert_same(init(tiny.CONFIG, jax.random.key(0), quant=quant, stacked=True), stack(params))
    save(stack(params), tmp_path / "model")
    assert_same(load(tmp_path / "model"), params)
    assert_same(load(tmp_path / "model", stacked=True), stack(params))
    assert not load(tmp_path / "model", stacked=None).stacked  # not on a CPU
    if quant == "none":
        assert_same(load(tmp_path / "model", quant="int4", stacked=True), stack(load(tmp_path / "model", quant="int4")))


def test_layers_in_several_formats_stay_apart(tmp_path: Path) -> None:
    params = init(tiny.CONFIG, jax.random.key(0), quant="int8")
    first = unstack(params).layer(0)
    other = first.replace(wo=init(tiny.CONFIG, jax.random.key(1)).layer(0).wo)
    save(params.replace(layers=(first, other)), tmp_path / "model")
    assert load(tmp_path / "model", stacked=None).layer(1).wo.dtype == jnp.float32
    for refused in (lambda: load(tmp_path / "model", stacked=True), lambda: stack(load(tmp_path / "model"))):
        with pytest.raises(InputError, match="expected every layer in the format of the first"):
            refused()


# The cache


def test_a_cache_grows() -> None:
    k, v = (jax.random.normal(jax.random.key(i), (2, 3, 2, 8, 8)) for i in (0, 1))
    caches = [KVCache(*arrays, jnp.zeros(3, jnp.int32)) for arrays in ((tuple(k), tuple(v)), (k, v))]
    for cache in (caches, [grow(cache, 20) for cache in caches]):
        apart, joined = cache
        assert (joined.stacked, joined.max_len, joined.k.shape) == (True, apart.max_len, (2, *apart.k[0].shape))
        assert_same((jnp.stack(apart.k), jnp.stack(apart.v)), (joined.k, joined.v))
    assert grow(caches[1], 20).max_len == 24


def state_of(params: Params, batch: int, max_len: int, **sampling: Any) -> DecodeState:
    """The shapes of a state. Nothing is allocated."""

    def make() -> DecodeState:
        config = params.config
        cache = init_cache(config, batch, max_len, params.dtype, stacked=True)
        logits, stops = jnp.zeros((batch, config.vocab_size)), jnp.zeros((batch, 4), jnp.int32)
        return sample_first(logits, cache, make_sampling(batch, **sampling), jnp.full(batch, 99), stops, History())[0]

    return jax.eval_shape(make)


def test_a_piece_of_a_prompt_is_written_in_place() -> None:
    config = tiny.CONFIG.replace(n_layers=8, n_heads=4, n_kv_heads=4, head_dim=32, max_seq_len=65536)
    params = jax.eval_shape(lambda: init(config, jax.random.key(0), stacked=True))
    cache = state_of(params, 1, config.max_seq_len).cache

    def written(cache: KVCache, new: jax.Array) -> KVCache:
        for i in range(config.n_layers):
            *arrays, layer = cache.arrays(i)
            cache = cache.with_arrays(i, *(write(a, new + i, cache.lengths, layer) for a in arrays))
        return cache

    new = jax.ShapeDtypeStruct((1, 16, 4, 32), jnp.float32)
    memory = jax.jit(written, donate_argnums=0).lower(cache, new).compile().memory_analysis()
    whole = cache_bytes(config, 1, config.max_seq_len, jnp.float32)
    assert memory.alias_size_in_bytes >= whole
    assert memory.temp_size_in_bytes < whole // 64


# Kernels read a layer in place


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kernel", [flash_attention.flash_attention, flash_decode.flash_decode])
def test_attention_reads_a_layer_in_place(kernel: Any) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (1, 4, 2, 64), jnp.bfloat16)
    k, v = (jax.random.normal(key, (1, 1, 72, 64), jnp.bfloat16) for key in keys[1:])
    start = jnp.asarray([66])
    stacked = [LayerView(jnp.stack([a * jnp.nan, a, a * jnp.nan]), 1) for a in (k, v)]
    tiles = (
        flash_attention.PrefillTiles(keys=64)
        if kernel is flash_attention.flash_attention
        else flash_decode.DecodeTiles(keys=64)
    )
    found = kernel(q, *stacked, start, tiles=tiles, interpret=plgpu.InterpretGPUParams())
    wanted = attention_reference(q, k, v, start)
    np.testing.assert_allclose(np.asarray(found, np.float32), np.asarray(wanted, np.float32), atol=2e-2)


# The step in one launch


def test_why_a_step_goes_op_by_op() -> None:
    params = init(SMALL, jax.random.key(0), dtype=jnp.bfloat16, stacked=True)

    def choice(params: Params, **sizes: Any) -> Choice:
        return backends(params, prompt=16, max_len=64, **sizes)["decode"]["decode_step"]

    assert choice(params) == Choice("ops", "needs an NVIDIA Hopper GPU, found platform 'cpu'")
    assert choice(params, backend="xla") == Choice("ops", "asked for")
    assert "decode_step" not in backends(params, prompt=16)["prefill"]
    assert not runs_whole(SMALL, "bfloat16")
    with jax.sharding.use_abstract_mesh(H200):
        assert choice(params) == Choice("pallas", "kernel runs here")
        assert choice(params, batch=9) == Choice("ops", "9 rows: the one launch of a step takes up to 8 rows")
        for backend in ("auto", "pallas"):  # the smaller ops are kernels, too, as requested
            apart = choice(unstack(params), backend=backend)
            assert apart == Choice("ops", "weights are held layer by layer: jllama.stack joins them")
        tied = init(
            SMALL.replace(tie_embeddings=True), jax.random.key(0), dtype=jnp.bfloat16, quant="int4", stacked=True
        )
        assert "all weights must have one format" in choice(tied).why
        assert runs_whole(SMALL, "bfloat16")
        assert runs_whole(preset("7b"), "bfloat16", "int8")
        assert not runs_whole(SMALL, "float32")
        with record() as choices:
            jax.eval_shape(lambda p, t, c: forward(p, t, c), params, jnp.zeros((1, 3), jnp.int32),
                           init_cache(SMALL, 1, 64, jnp.bfloat16))  # fmt: skip
        assert "init_cache(..., stacked=True)" in choices["decode_step"].why
        # Stacking would not help, so the error gives the other reason.
        half = init(SMALL, jax.random.key(0), dtype=jnp.float16)
        assert choice(half) == Choice("ops", "x must be bfloat16, found float16")
        mixed = half.replace(layers=(half.layer(0), init(SMALL, jax.random.key(0), dtype=jnp.float32).layer(0)))
        assert choice(mixed) == Choice("ops", "stack: expected every layer in the format of the first, found another")


@pytest.mark.timeout(120)
def test_steps_through_the_interpreted_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The draws are the same as op by op. A finished row, whose cache is written after its length, changes nothing."""
    params = tiny.model("bfloat16", SMALL)
    cache = init_cache(SMALL, 2, 64, jnp.bfloat16)
    prompt = jnp.asarray([tiny.prompt(12), tiny.prompt(12, 1)]) % SMALL.vocab_size
    logits, cache = prefill(params, prompt, jnp.asarray([12, 5]), jnp.zeros((2, 128)), cache, backend="xla")
    stops = jnp.full((2, 4), -1, jnp.int32)
    limits = jnp.asarray([3, 2])  # the second row ends first
    state, _ = sample_first(logits, cache, make_sampling(2), limits, stops, History())
    stacked = state.replace(cache=cache.replace(k=jnp.stack(cache.k), v=jnp.stack(cache.v)))
    wanted, drawn = decode_chunk(params, state, steps=3, backend="xla")

    options = dict(blocks=1, tiles=StepTiles(depth=4, consumers=2), interpret=plgpu.InterpretGPUParams())
    kernel = whole_step.kernels["hopper"]
    interpreted = dataclasses.replace(kernel, run=functools.partial(kernel.run, **options))
    monkeypatch.setattr("jllama.model.whole_step", dataclasses.replace(whole_step, kernels={"hopper": interpreted}))
    with record() as choices, pinned(HOPPER):
        found, again = decode_chunk(stack(params), stacked, steps=3)
    assert choices["decode_step"] == Choice("pallas", "kernel runs here")
    assert choices.keys() == {"decode_step", "draw"}
    assert_same((found.done, found.drawn, again.tokens, found.cache.lengths),
                (wanted.done, wanted.drawn, drawn.tokens, wanted.cache.lengths))  # fmt: skip
    np.testing.assert_allclose(again.logprobs, drawn.logprobs, atol=0.1)  # bfloat16


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("quant", "sampling", "launches"), [("none", {}, 1), ("int4", dict(temperature=0.8), 2)])
def test_a_chunk_lowers_to_one_launch_a_step_and_one_a_draw(
    quant: str, sampling: dict[str, Any], launches: int
) -> None:
    params = jax.eval_shape(
        lambda: init(preset("7b"), jax.random.key(0), dtype=jnp.bfloat16, quant=quant, stacked=True)
    )
    state = state_of(params, 1, 2048, **sampling)
    chunk = jax.jit(functools.partial(decode_chunk, steps=16), donate_argnums=1)
    with jax.sharding.use_abstract_mesh(H200):
        text = chunk.trace(params, state).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == launches
    entry = text[text.index("@main") :].splitlines()[0]
    assert entry.count("tf.aliasing_output") == len(jax.tree.leaves(state))
    cache = "tensor<32x1x32x2048x128xbf16>"
    whole = [line for line in text.splitlines() if cache in line and "func" not in line]
    assert whole
    assert not any(word in line for line in whole for word in ("slice", "scatter", "copy", "pad"))


# On a GPU


def run(params: Params, prompt: list[int], new: int, backend: str = "auto") -> list[int]:
    session = Session(params, len(prompt) + new, backend=backend)
    return [token for tokens in session.run(prompt, new) for token in tokens.ids]


GPU_MODELS = {
    "small": (LlamaConfig(dim=512, n_layers=3, n_heads=8, n_kv_heads=2, hidden_dim=1024, vocab_size=1024), 200),
    "7b": (preset("7b"), 256),
}


@pytest.mark.gpu
@pytest.mark.timeout(240)
@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
@pytest.mark.parametrize("name", GPU_MODELS)
def test_greedy_text_on_gpu(name: str, quant: str) -> None:
    config, new = GPU_MODELS[name]
    params = init(config, jax.random.key(0), dtype=jnp.bfloat16, quant=quant, stacked=True)
    assert runs_whole(config, "bfloat16", quant)
    warm = backends(params, sampling=make_sampling(1, temperature=1.0))["decode"]
    assert warm == dict.fromkeys(("decode_step", "draw"), Choice("pallas", "kernel runs here"))
    assert backends(params)["decode"]["draw"].impl == "xla"
    prompt = np.random.RandomState(0).randint(3, config.vocab_size, 100).tolist()
    ids = run(params, prompt, new)
    assert len(ids) == new
    assert ids == run(params, prompt, new)
    assert worst_choice(params, prompt, ids) < 0.5

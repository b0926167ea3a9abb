"""Biases of the projections: through every form that can hold them, in both forms of the layers, and what runs.

That the numbers are right, `test_hf_parity.py` shows with the cases ``biases`` and ``attention-bias``.
"""

import dataclasses
from pathlib import Path
from typing import Any

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from h200 import H200

from jllama.backends import backends
from jllama.cache import init_cache
from jllama.config import LlamaConfig
from jllama.errors import InputError
from jllama.formats import open_source
from jllama.formats.checkpoint import load, save
from jllama.formats.layout import expected_shapes, hf_names
from jllama.formats.memory import memory_of
from jllama.kernels import NO_BIAS, Choice
from jllama.model import forward
from jllama.params import Layer, Params, init, stack, unstack
from jllama.step import runs_whole

CONFIG = checkpoints.CONFIG.replace(attention_bias=True, mlp_bias=True)
BIG = LlamaConfig(
    dim=512, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=1024, vocab_size=512, max_seq_len=512, tie_embeddings=True
)
TOKENS = jnp.arange(14).reshape(2, 7) + 5
jit_forward = jax.jit(forward)


def random_params(config: LlamaConfig, *, stacked: bool = False) -> Params:
    params = init(config, jax.random.key(0), stacked=stacked)
    leaves, tree = jax.tree.flatten(params)
    noise = [0.3 * jax.random.normal(jax.random.key(i), leaf.shape, leaf.dtype) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(tree, [leaf + n for leaf, n in zip(leaves, noise, strict=True)])


@pytest.mark.parametrize("form", ["hf", "sharded", "bin", "native-int8", "gguf"])
@pytest.mark.parametrize("flags", [dict(attention_bias=True), dict(mlp_bias=True), dict(CONFIG.__dict__)])
def test_they_come_back_from_every_form_that_has_them(form: str, flags: dict[str, Any], tmp_path: Path) -> None:
    config = checkpoints.CONFIG.replace(**{k: flags.get(k, False) for k in ("attention_bias", "mlp_bias")})
    source = checkpoints.source(config)
    opened = open_source(checkpoints.make(form, source, tmp_path / "model"))
    assert opened.config == config
    if form.startswith("native"):
        for name in (n for n in expected_shapes(config) if ".b" in n):
            np.testing.assert_array_equal(opened.tensors[name].read(), source.tensors[name].read())
    else:
        checkpoints.assert_same_tensors(opened, source)


@pytest.mark.parametrize("flag", ["attention_bias", "mlp_bias"])
def test_llama2c_has_no_place_for_them(flag: str, tmp_path: Path) -> None:
    source = checkpoints.source(checkpoints.CONFIG.replace(**{flag: True}))
    with pytest.raises(InputError, match=rf"{flag}: llama2\.c knows only False, found True"):
        checkpoints.make("llama2c-0", source, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_gguf_file_with_some_of_them_or_with_others_is_refused(tmp_path: Path) -> None:
    path = checkpoints.make("gguf", checkpoints.source(CONFIG), tmp_path / "model")
    raw = path.read_bytes()
    for old, new, message in (
        (b"blk.0.attn_output.bias", b"other.attn_output.bias", "tensor layers.0.bo: missing (attention_bias is true)"),
        (b"blk.1.ffn_down.bias", b"blk.9.ffn_down.bias", "blk.9.ffn_down.bias: expected biases of projections only"),
    ):
        assert raw.count(old) == 1
        new = new[-len(old) :] if len(new) > len(old) else new
        path.write_bytes(raw.replace(old, new))
        checkpoints.refused(path, str(path), message)


def test_what_has_none_has_no_arrays_and_init_makes_zeros() -> None:
    assert len(jax.tree.leaves(init(checkpoints.CONFIG, jax.random.key(0)).layer(0))) == 6
    params = init(CONFIG, jax.random.key(0), quant="int8")
    layer = params.layer(0)
    q, kv = CONFIG.n_heads * CONFIG.head_dim, CONFIG.n_kv_heads * CONFIG.head_dim
    for name, size in (("bqkv", q + 2 * kv), ("bo", 32), ("b_gate_up", 128), ("b_down", 32)):
        np.testing.assert_array_equal(getattr(layer, name), np.zeros(size, np.float32))
    assert jnp.all(layer.attn_norm == 1)
    floats = init(CONFIG, jax.random.key(0))
    assert CONFIG.n_params == sum(leaf.size for leaf in jax.tree.leaves(floats))
    weights = memory_of(CONFIG, "float32", "none", None, 1, 8).weights
    assert weights == sum(leaf.nbytes for leaf in jax.tree.leaves(floats))


def test_stacked_and_apart_are_the_same_model(tmp_path: Path) -> None:
    params = random_params(CONFIG)
    joined = stack(params)
    assert isinstance(joined.layers, Layer)
    assert joined.layers.bqkv is not None
    assert joined.layers.bqkv.shape == (2, 64)
    jax.tree.map(np.testing.assert_array_equal, unstack(joined), params)
    save(params, tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "model", stacked=True), joined)


@pytest.mark.parametrize("field", ["bqkv", "bo", "b_gate_up", "b_down"])
@pytest.mark.parametrize("cached", [False, True])
def test_each_of_them_counts_with_and_without_a_cache(field: str, cached: bool) -> None:
    params = random_params(CONFIG)
    last = dataclasses.replace(params.layers[1], **{field: jnp.zeros_like(getattr(params.layers[1], field))})
    without = dataclasses.replace(params, layers=(params.layers[0], last))

    def logits(params: Params) -> np.ndarray:
        cache = init_cache(CONFIG, 2, 16, params.dtype) if cached else None
        return np.asarray(jit_forward(params, TOKENS, cache)[0])

    np.testing.assert_allclose(logits(params), jit_forward(params, TOKENS)[0], rtol=1e-5, atol=1e-5)
    assert np.abs(logits(params) - logits(without)).max() > 1e-2


def test_the_fused_kernels_are_not_tried_and_one_reason_says_why() -> None:
    biased = BIG.replace(attention_bias=True, mlp_bias=True)
    for stacked in (False, True):
        params = jax.eval_shape(lambda s=stacked: init(biased, jax.random.key(0), dtype="bfloat16", stacked=s))
        with jax.sharding.use_abstract_mesh(H200):
            phases = backends(params)
            assert not runs_whole(biased, "bfloat16")
        for phase in phases.values():
            found = {op: phase[op] for op in ("qkv", "ffn", "decode_step") if op in phase}
            assert {choice.why for choice in found.values()} == {NO_BIAS}
            assert {choice.impl for choice in found.values()} == {"ops"}
            assert phase["matmul"].impl == "pallas"
    assert "decode_step" in phases["decode"]


def test_without_biases_nothing_else_runs_than_before() -> None:
    params = jax.eval_shape(lambda: init(BIG, jax.random.key(0), dtype="bfloat16", stacked=True))
    with jax.sharding.use_abstract_mesh(H200):
        phases = backends(params)
    assert phases["decode"]["decode_step"] == Choice("pallas", "kernel runs here")
    assert NO_BIAS not in {choice.why for phase in phases.values() for choice in phase.values()}


def test_names_in_files_are_those_of_the_weights() -> None:
    names = hf_names(CONFIG)
    assert names["layers.1.bo"] == "model.layers.1.self_attn.o_proj.bias"
    assert names["layers.0.b_gate"] == "model.layers.0.mlp.gate_proj.bias"
    assert not any(name.endswith(".bias") for name in hf_names(checkpoints.CONFIG).values())

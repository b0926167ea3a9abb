"""Checkpoints are loaded and saved bit for bit, within the device's memory; an invalid one gives a one-line error."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jllama.formats.checkpoint as checkpoint
import jllama.formats.memory as memory
from jllama.cache import cache_bytes
from jllama.config import LlamaConfig, RopeScaling, from_hf, preset, to_hf
from jllama.errors import InputError
from jllama.formats.checkpoint import load, save
from jllama.formats.memory import check_memory, model_bytes
from jllama.formats.source import Quantization, Source, Tensor
from jllama.model import forward
from jllama.params import init, weight_bytes
from pallas_kernels import QuantizedTensor, dequantize

CONFIG = LlamaConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=96, vocab_size=80, max_seq_len=128)
CONFIGS = {
    "grouped": CONFIG,
    "tied": CONFIG.replace(tie_embeddings=True, rope_scaling=RopeScaling("linear", 4.0), eos_ids=(2, 5)),
    "llama3": CONFIG.replace(
        head_dim=24, rope_theta=5e5, norm_eps=1e-6, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
    ),
}


def assert_bits_equal(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)  # the config and what is quantised included
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def one_line(error: pytest.ExceptionInfo[InputError], *parts: str) -> None:
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_floats_come_back_bit_for_bit(config: str, dtype: str, tmp_path: Path) -> None:
    params = init(CONFIGS[config], jax.random.key(1), dtype=jnp.dtype(dtype))
    save(params, tmp_path / "model")
    assert_bits_equal(load(tmp_path / "model", dtype=dtype), params)


@pytest.mark.parametrize(("quant", "group"), [("int8", None), ("int8", 32), ("int4", None), ("int4", 32)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_integers_and_scales_come_back_bit_for_bit(quant: str, group: int | None, dtype: str, tmp_path: Path) -> None:
    params = init(CONFIG, jax.random.key(1), dtype=jnp.dtype(dtype), quant=quant, group=group)
    assert isinstance(params.lm_head, QuantizedTensor)
    save(params, tmp_path / "model")
    assert_bits_equal(load(tmp_path / "model", dtype=dtype), params)
    with pytest.raises(InputError) as error:
        load(tmp_path / "model", quant="int8")
    one_line(error, "quant: expected 'none'", f"are {quant} already")


@pytest.mark.parametrize(("quant", "group"), [("none", None), ("int8", None), ("int4", None), ("int4", 32)])
@pytest.mark.parametrize("tied", [False, True])
def test_quantising_while_loading_equals_quantising_what_was_loaded(
    quant: str, group: int | None, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CONFIG.replace(tie_embeddings=tied)
    expected = init(config, jax.random.key(1), quant=quant, group=group)
    save(init(config, jax.random.key(1)), tmp_path / "model")
    loaded = load(tmp_path / "model", quant=quant, group=group)
    assert_bits_equal(loaded, expected)
    assert weight_bytes(loaded) == model_bytes(config, "float32", quant, group)
    assert isinstance(loaded.embed, QuantizedTensor) == (tied and quant != "none")
    save(loaded, tmp_path / "again")
    assert_bits_equal(load(tmp_path / "again"), expected)
    monkeypatch.setattr("jllama.formats.checkpoint.BLOCK_BYTES", 1000)  # matrices by blocks of rows
    assert_bits_equal(load(tmp_path / "model", quant=quant, group=group), expected)


def test_a_quantised_embedding_gives_the_rows_and_logits_of_its_floats() -> None:
    params = init(CONFIG.replace(tie_embeddings=True, n_layers=1), jax.random.key(1), quant="int4", group=32)
    assert isinstance(params.embed, QuantizedTensor)
    floats = dataclasses.replace(params, embed=dequantize(params.embed))
    tokens = jnp.asarray([[1, 5, 2, 63]])
    np.testing.assert_array_equal(params.embedded(tokens), floats.embedded(tokens))
    expected = forward(floats, tokens)[0]
    np.testing.assert_allclose(forward(params, tokens)[0], expected, atol=2e-4 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize(
    ("quant", "group", "message"),
    [
        ("int8", 128, "group: expected one of 64, 32 (rows of 64 and 192 inputs), found 128"),
        ("int4", 48, "group: expected one of 64, 32 (rows of 64 and 192 inputs), found 48"),
        ("none", 32, "group: expected quant='int8' or 'int4' with it, found quant='none' and group=32"),
    ],
)
def test_a_group_that_does_not_divide_every_row_is_refused(
    quant: str, group: int, message: str, tmp_path: Path
) -> None:
    config = CONFIG.replace(dim=64, n_heads=4, n_kv_heads=2, head_dim=16, hidden_dim=192, n_layers=1)
    save(init(config, jax.random.key(1)), tmp_path / "model")
    with pytest.raises(InputError, match=re.escape(message)):
        load(tmp_path / "model", quant=quant, group=group)


def test_16_bit_weights_become_float32_on_a_cpu_unless_asked(tmp_path: Path) -> None:
    params = init(CONFIG, jax.random.key(1), dtype=jnp.bfloat16)
    save(params, tmp_path / "model")
    expected = "float32" if jax.devices()[0].platform == "cpu" else "bfloat16"
    assert load(tmp_path / "model").dtype == expected
    assert_bits_equal(load(tmp_path / "model", dtype="float32"), jax.tree.map(lambda w: w.astype("float32"), params))


def test_shards_load_as_one_and_progress_shows_every_tensor(tmp_path: Path) -> None:
    params = init(CONFIG, jax.random.key(1))
    save(params, tmp_path / "model")
    arrays, shown = load_file(tmp_path / "model" / "model.safetensors"), []
    (tmp_path / "model" / "model.safetensors").unlink()
    weight_map = {name: f"part-{i % 3}.safetensors" for i, name in enumerate(arrays)}
    for shard in set(weight_map.values()):
        save_file({n: a for n, a in arrays.items() if weight_map[n] == shard}, tmp_path / "model" / shard)
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    loaded = load(tmp_path / "model", progress=lambda names, total: shown.append((list(names), total)) or shown[0][0])
    assert_bits_equal(loaded, params)
    assert len(shown[0][0]) == shown[0][1] == len(jax.tree.leaves(params))


def test_save_does_not_overwrite(tmp_path: Path) -> None:
    params = init(CONFIG, jax.random.key(1))
    save(params, tmp_path / "model")
    with pytest.raises(InputError, match="model: exists already"):
        save(params, tmp_path / "model")


def test_a_config_survives_its_json() -> None:
    for config in (*CONFIGS.values(), preset("70b"), preset("llama3.2-1b"), preset("stories15m")):
        assert from_hf(json.loads(json.dumps(to_hf(config, "float32")))) == config


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save(init(CONFIG, jax.random.key(1)), tmp_path / "model")
    return tmp_path / "model"


# Memory.


def budget(monkeypatch: pytest.MonkeyPatch, free: int | None) -> None:
    monkeypatch.setattr(memory, "free_on", lambda mesh: free)


def test_what_does_not_fit_is_refused_before_anything_is_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, cache = model_bytes(CONFIG, "float32", "none"), cache_bytes(CONFIG, 3, 64, jnp.float32)
    budget(monkeypatch, weights + cache)  # no room for anything else
    monkeypatch.setattr(checkpoint, "_assemble", lambda *_: pytest.fail("it loads"))
    with pytest.raises(InputError) as error:
        load(model, batch=3, max_len=64)
    one_line(error, f"{model}: needs ")


SEVEN = preset("7b")  # 13.48 GB in bfloat16, 6.74 in int8; a position of the cache is 0.5 MB


@pytest.mark.parametrize(
    ("free", "max_len", "advice"),
    [
        (16.5e9, 4096, "would fit: --quant int8 or --max-seq-len 2048"),
        (12e9, 4096, "would fit: --quant int8"),
        (7e9, 2048, "would fit: --quant int4"),
        (15e9, 65536, "would fit: --max-seq-len 1024"),
        (1e9, 4096, "no setting would fit"),
    ],
)
def test_the_refusal_has_the_figures_and_what_would_fit(
    free: float, max_len: int, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source(Path("big"), "hf", SEVEN, {"layers.0.wq": Tensor((), "bfloat16", "", lambda *_: None)}, None)
    budget(monkeypatch, int(free))
    with pytest.raises(InputError) as error:
        check_memory(source, "bfloat16", "none", None, 1, max_len)
    cache = cache_bytes(SEVEN, 1, max_len, jnp.bfloat16) / 1e9
    figures = f"(weights 13.48 GB, cache {cache:.2f} GB, rest workspace), the device has {free / 1e9:.2f} GB free"
    one_line(error, "big: needs ", figures)
    assert str(error.value).endswith(advice)
    # What is advised does fit, each by itself.
    for flag in advice.removeprefix("would fit: ").split(" or ") if "--" in advice else []:
        name, value = flag.split()
        quant, length = (value, max_len) if name == "--quant" else ("none", int(value))
        check_memory(source, "bfloat16", quant, None, 1, length)


@pytest.mark.parametrize(("quant", "group"), [("int8", None), ("int8", 32), ("int4", 128), ("int4", 32)])
def test_stored_integers_are_sized_as_they_are_and_no_other_format_is_advised(
    quant: str, group: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    wq = Tensor((), "float16", "", lambda *_: None, Quantization(quant, group))
    source = Source(Path("big"), "native", SEVEN, {"layers.0.wq": wq}, None)
    weights = model_bytes(SEVEN, "bfloat16", quant, group)
    budget(monkeypatch, int(2.5e9))
    with pytest.raises(InputError) as error:
        check_memory(source, "bfloat16", "none", None, 1, 4096)
    one_line(error, f"(weights {weights / 1e9:.2f} GB, ", "; no setting would fit")
    budget(monkeypatch, weights + int(1.3e9))
    with pytest.raises(InputError) as error:
        check_memory(source, "bfloat16", "none", None, 1, 4096)
    advice = str(error.value).partition("would fit: ")[2]
    assert advice.startswith("--max-seq-len ")
    assert "--quant" not in advice
    check_memory(source, "bfloat16", "none", None, 1, int(advice.split()[1]))


def test_memory_that_is_enough_or_unknown_refuses_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for free in (10**9, None):
        budget(monkeypatch, free)
        assert load(model).config == CONFIG

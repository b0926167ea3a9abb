"""Invalid checkpoints: each gives one line that names the file, what was found and what was expected."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jllama.config import LlamaConfig, to_hf
from jllama.errors import InputError
from jllama.formats.checkpoint import load, save
from jllama.params import init
from jllama.stream import Session
from jllama.text.tokenizer import load_tokenizer

CONFIG = LlamaConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=96, vocab_size=80, max_seq_len=128)


def one_line(error: pytest.ExceptionInfo[InputError], *parts: str) -> None:
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save(init(CONFIG, jax.random.key(1)), tmp_path / "model")
    return tmp_path / "model"


def edit(model: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    arrays = load_file(model / "model.safetensors")
    change(arrays)
    save_file(arrays, model / "model.safetensors")


def configure(model: Path, **changes: Any) -> None:
    values = json.loads((model / "config.json").read_text()) | changes
    (model / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


WK = "model.layers.1.self_attn.k_proj.weight"


def test_a_missing_tensor(model: Path) -> None:
    edit(model, lambda arrays: arrays.pop(WK))
    with pytest.raises(InputError) as error:
        load(model)
    one_line(error, str(model), "layers.1.wk: missing")


def test_a_tensor_of_another_shape(model: Path) -> None:
    edit(model, lambda arrays: arrays.update({WK: np.zeros((64, 64), np.float32)}))
    with pytest.raises(InputError) as error:
        load(model)
    one_line(error, "model.safetensors", WK, "expected [32, 64], found [64, 64]")


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.uint8, np.bool_, ml_dtypes.float8_e4m3fn])
def test_a_tensor_of_another_dtype(model: Path, dtype: Any) -> None:
    edit(model, lambda arrays: arrays.update({WK: np.zeros((32, 64), dtype)}))
    with pytest.raises(InputError) as error:
        load(model)
    one_line(error, "model.safetensors", WK, "dtype: expected ", ", found ")


@pytest.mark.parametrize(("name", "value"), [("dtype", "float8"), ("dtype", "int8"), ("quant", "int3")])
def test_a_dtype_that_nobody_knows(model: Path, name: str, value: str) -> None:
    with pytest.raises(InputError, match=f"{name}: expected one of .*, found '{value}'"):
        load(model, **{name: value})


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 2000, -1])
def test_a_file_that_was_cut_off(model: Path, keep: int) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError) as error:
        load(model)
    one_line(error, str(path))


def test_a_file_of_something_else(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"<html>" + b"x" * 5000)
    with pytest.raises(InputError) as error:
        load(model)
    one_line(error, "model.safetensors", "header")


BAD_FIELDS = [
    (dict(hidden_size=...), "hidden_size: missing"),
    (dict(hidden_size="64"), "hidden_size: expected an integer from 1 to 1048576, found '64'"),
    (dict(hidden_size=64.0), "hidden_size: expected an integer"),
    (dict(num_hidden_layers=0), "num_hidden_layers: expected an integer from 1"),
    (dict(num_hidden_layers=10**9), "num_hidden_layers: expected an integer from 1 to 4096"),
    (dict(num_attention_heads=True), "num_attention_heads: expected an integer"),
    (dict(num_key_value_heads=3), "n_heads 4 is not a multiple of n_kv_heads 3"),
    (dict(num_attention_heads=3, num_key_value_heads=3, head_dim=...), "dim 64 is not a multiple of n_heads 3"),
    (dict(head_dim=15), "head_dim: expected an even number"),
    (dict(vocab_size=-1), "vocab_size: expected an integer"),
    (dict(rms_norm_eps=0), "rms_norm_eps: expected a number above 0"),
    (dict(rms_norm_eps=float("nan")), "rms_norm_eps: expected a number"),
    (dict(rope_theta="big"), "rope_theta: expected a number"),
    (dict(rope_scaling=[1]), "rope_scaling: expected an object"),
    *(
        (dict(rope_scaling={key: kind, "factor": 2}), f"expected type 'default', 'linear' or 'llama3', found '{kind}'")
        for key, kind in (("rope_type", "yarn"), ("type", "dynamic"), ("rope_type", "longrope"))
    ),
    (dict(partial_rotary_factor=0.5), "partial_rotary_factor: expected 1, found 0.5"),
    (dict(rope_scaling={"rope_type": "linear"}), "rope_scaling: factor: missing"),
    (dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "low_freq_factor: missing"),
    (dict(tie_word_embeddings="no"), "tie_word_embeddings: expected true or false"),
    (dict(eos_token_id=80), "eos_token_id: expected token ids below 80"),
    (dict(eos_token_id="</s>"), "eos_token_id: expected token ids"),
    (dict(attention_bias="yes"), "attention_bias: expected true or false, found 'yes'"),
    (dict(mlp_bias=1), "mlp_bias: expected true or false, found 1"),
    (dict(hidden_act="gelu"), "hidden_act: expected 'silu', found 'gelu'"),
    (dict(model_type="mixtral"), "model_type: expected 'llama' or 'mistral', found 'mixtral'"),
    (dict(model_type=...), "model_type: expected 'llama' or 'mistral', found None"),
    (
        dict(model_type="mistral", sliding_window=100),
        "sliding_window: expected null or at least max_position_embeddings 128, found 100",
    ),
    (
        dict(model_type="mistral", max_position_embeddings=8192),  # the default window is 4096
        "sliding_window: expected null or at least max_position_embeddings 8192, found 4096",
    ),
    (dict(bias=True), "bias: expected false"),
    (dict(quantization_config={"quant_method": "gptq"}), "expected quant_method 'jllama'"),
    (dict(quantization_config={"quant_method": "jllama", "bits": 3}), "bits: expected 4 or 8, found '3'"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_FIELDS, ids=[m.split(":")[0] for _, m in BAD_FIELDS])
def test_a_config_field_that_is_wrong(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(to_hf(CONFIG, "float32")))
    configure(tmp_path, **changes)
    with pytest.raises(InputError) as error:
        load(tmp_path)
    one_line(error, f"{tmp_path / 'config.json'}: ", message)


@pytest.mark.parametrize("window", [None, 128, 4096])
def test_a_mistral_whose_window_holds_its_context_is_a_llama(model: Path, window: int | None) -> None:
    configure(model, model_type="mistral", sliding_window=window)
    assert load(model).config == CONFIG


@pytest.mark.parametrize(("flag", "first"), [("attention_bias", "layers.0.bq"), ("mlp_bias", "layers.0.b_gate")])
def test_a_bias_that_the_config_has_and_the_weights_have_not(model: Path, flag: str, first: str) -> None:
    configure(model, **{flag: True})
    with pytest.raises(InputError) as error:
        load(model)
    one_line(error, str(model), f"{first}: missing ({flag} is true)")


def test_a_bias_that_the_weights_have_and_the_config_has_not(model: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.bias"
    edit(model, lambda arrays: arrays.update({name: np.zeros(64, np.float32)}))
    with pytest.raises(InputError) as error:
        load(model)
    one_line(error, "model.safetensors", name, "expected no such bias", "attention_bias false", "config.json")


def test_the_ends_of_turns_are_in_the_generation_config(model: Path) -> None:
    (model / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
    assert load(model).config.eos_ids == (2, 7)
    (model / "generation_config.json").write_text('{"eos_token_id": 80}')
    with pytest.raises(InputError, match=r"generation_config\.json: eos_token_id: expected token ids below 80"):
        load(model)


def test_a_config_that_disagrees_with_the_weights(model: Path) -> None:
    configure(model, intermediate_size=100)
    with pytest.raises(InputError) as error:
        load(model)
    one_line(error, "mlp.gate_proj.weight", "expected [100, 64], found [96, 64]")


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000])
def test_a_config_that_is_no_json_object(model: Path, text: str) -> None:
    (model / "config.json").write_text(text)
    with pytest.raises(InputError) as error:
        load(model)
    one_line(error, "config.json: ")


def test_paths_that_hold_no_checkpoint(tmp_path: Path, model: Path) -> None:
    with pytest.raises(InputError, match="nowhere: no such file or directory"):
        load(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"expected .*, found n"):
        load(tmp_path)
    (model / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"expected model.safetensors .*, found neither"):
        load(model)


def test_nan_in_a_file_is_found_when_it_reaches_the_logits(model: Path) -> None:
    edit(model, lambda arrays: arrays[WK].__setitem__((3, 3), np.nan))
    session = Session(load(model), max_len=64)
    with pytest.raises(InputError) as error:
        list(session.run([5, 6, 7], 4))
    one_line(error, "model: logits are NaN: the weights hold NaN or Inf")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import sentencepiece

    path = tmp_path_factory.mktemp("tokenizer") / "tok"
    text = iter(["once upon a time there was a little cat", "the cat sat on the mat and saw a dog"] * 20)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=text, model_prefix=str(path), vocab_size=40, hard_vocab_limit=False, minloglevel=2
    )
    return path.with_suffix(".model")


def test_a_tokenizer_goes_with_its_vocabulary_padded_or_not(tokenizer: Path) -> None:
    n = load_tokenizer(tokenizer).n_ids
    for vocab_size in (n, n + 24):
        assert load_tokenizer(tokenizer, vocab_size).decode([vocab_size - 1, vocab_size]) is not None
    for vocab_size in (n - 1, 32000):
        with pytest.raises(InputError) as error:
            load_tokenizer(tokenizer, vocab_size)
        one_line(error, str(tokenizer), f"vocab_size {vocab_size}", f"found {n} pieces")


def test_a_tokenizer_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such tokenizer file"):
        load_tokenizer(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(InputError) as error:
        load_tokenizer(tmp_path / "tokenizer.model")
    one_line(error, "expected a sentencepiece model, found something else")

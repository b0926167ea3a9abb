"""Every input format gives the same weights, and the logits of the original model."""

import json
from pathlib import Path

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.to_llama2c import llama2c
from jllama.decode import generate
from jllama.formats import open_source
from jllama.formats.checkpoint import load
from jllama.formats.files import MappedFile
from jllama.formats.layout import expected_shapes
from jllama.formats.llama2c import plan, read_header
from jllama.formats.native import save
from jllama.formats.source import DTYPES, Integers, Quantization
from jllama.formats.vocabulary import from_model
from jllama.model import forward
from jllama.text.tokenizer import load_tokenizer, tokenizer_for

FIXTURES = Path(__file__).parents[1] / "data"
# Compiled once for all formats, because the parameters have the same shapes.
greedy = jax.jit(generate, static_argnames=("max_new_tokens", "stop_ids"))
EXACT = ("hf", "sharded", "bin", "meta", "llama2c-0", "llama2c-1", "gguf")


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        *(("meta", f"meta-{shards}") for shards in (1, 2, 8)),
        *(("hf", name) for name in ("hf-sharded", "hf-bin", "hf-bin-sharded")),
    ],
)
def test_logits_equal_those_of_the_model_that_wrote_the_file(reference: str, name: str) -> None:
    with np.load(FIXTURES / f"{reference}.npz") as golden:
        logits, _ = forward(load(FIXTURES / name, dtype="float32"), jnp.asarray(golden["tokens"]))
        error = np.abs(np.asarray(logits) - golden["logits"]).max() / np.abs(golden["logits"]).max()
    assert error < 1e-5


def test_shards_of_meta_give_the_same_bits_however_many_there_are() -> None:
    one = open_source(FIXTURES / "meta-1")
    assert (one.form, one.dtype, one.config.n_kv_heads, one.config.vocab_size) == ("meta", "bfloat16", 8, 48)
    for shards in (2, 8):
        checkpoints.assert_same_tensors(open_source(FIXTURES / f"meta-{shards}"), one)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("form", EXACT)
def test_a_form_gives_back_what_was_written(form: str, tied: bool, tmp_path: Path) -> None:
    source = checkpoints.source(checkpoints.CONFIG.replace(tie_embeddings=tied))
    opened = open_source(checkpoints.make(form, source, tmp_path / "model"))
    checkpoints.assert_same_tensors(opened, source)
    for name in ("n_heads", "n_kv_heads", "tie_embeddings", "norm_eps", "rope_theta", "eos_ids"):
        assert getattr(opened.config, name) == getattr(source.config, name)


@pytest.mark.parametrize("form", checkpoints.FORMS)
def test_rows_read_in_blocks_are_those_read_at_once(form: str, tmp_path: Path) -> None:
    opened = open_source(checkpoints.make(form, checkpoints.source(), tmp_path / "model"))
    for tensor in opened.tensors.values():
        whole = tensor.floats(0, tensor.shape[0])
        parts = [tensor.floats(begin, end) for begin, end in tensor.blocks(nbytes=700)]
        assert len(parts) > 1 or tensor.shape[0] * tensor.shape[-1] < 200 or len(tensor.shape) == 1
        np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["hf", "bin", "meta", "gguf"])
def test_16_bit_weights_stay_as_they_are(form: str, dtype: str, tmp_path: Path) -> None:
    source = checkpoints.source(checkpoints.UNTIED, dtype)
    opened = open_source(checkpoints.make(form, source, tmp_path / "model"))
    assert (opened.dtype, opened.tensors["embed"].dtype) == (dtype, dtype)
    checkpoints.assert_same_tensors(opened, source)


@pytest.fixture(scope="module")
def stories(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same trained model in every format, all made here from the one that llama2.c published."""
    original = data / "weights" / "stories260K.bin"
    source, folder = open_source(original), tmp_path_factory.mktemp("stories")
    forms = {form: checkpoints.make(form, source, folder / form) for form in EXACT}
    # With one scale per weight, int8 is exact except for the last bit, so the text must be the same.
    save(llama2c(source, int8=True, group=1), folder / "version-2.bin")
    return {**forms, "published": original, "hf-published": data / "weights" / "stories260K_hf"} | {
        "llama2c-2": folder / "version-2.bin"
    }


@pytest.mark.parametrize("form", ["published", "hf-published", "llama2c-2", *EXACT])
def test_greedy_text_of_a_trained_model(form: str, stories: dict[str, Path], data: Path) -> None:
    cases = json.loads((data / "golden" / "stories260K_greedy.json").read_text())
    params = load(stories[form])
    for case in cases[:2]:
        prompt, ids = case["prompt_ids"], case["ids"]
        out = greedy(params, jnp.asarray([prompt]), max_new_tokens=len(ids) - len(prompt), stop_ids=())
        assert out.tokens[0].tolist() == ids[len(prompt) :]


def test_version_2_keeps_its_integers(data: Path) -> None:
    source = open_source(data / "weights" / "stories260K_q80_gs4.bin")
    assert source.quant == Quantization("int8", 4)
    floats = open_source(data / "weights" / "stories260K.bin")
    for name, shape in expected_shapes(source.config).items():
        tensor = source.tensors[name]
        difference = np.abs(tensor.floats(0, shape[0]) - floats.tensors[name].read())
        if len(shape) == 1:
            assert difference.max() == 0
            continue
        rows = tensor.read()
        assert isinstance(rows, Integers)
        assert (difference <= 0.5001 * np.repeat(rows.scale, 4, axis=1)).all()
    assert load(source).embed.dtype == jnp.float32


def test_groups_that_run_over_the_ends_of_rows_are_read_as_floats(tmp_path: Path) -> None:
    config = checkpoints.CONFIG.replace(hidden_dim=48)  # 48 is no multiple of 32
    source = checkpoints.source(config)
    save(llama2c(source, int8=True, group=16), tmp_path / "good.bin")
    raw = bytearray((tmp_path / "good.bin").read_bytes())
    raw[37:41] = (32).to_bytes(4, "little")
    (tmp_path / "wide.bin").write_bytes(raw)
    header = read_header(MappedFile(tmp_path / "wide.bin"))
    places = list(plan(header))
    body = bytearray(places[-1].begin + places[-1].nbytes)
    body[:256] = raw[:256]
    place = next(p for p in places if p.name == "layers.0.w_down")
    size = place.shape[0] * place.shape[1]
    values = np.arange(size).astype(np.int8)
    scales = np.arange(size // 32, dtype=np.float32)
    body[place.begin : place.begin + place.nbytes] = values.tobytes() + scales.tobytes()
    (tmp_path / "wide.bin").write_bytes(body)
    tensor = open_source(tmp_path / "wide.bin").tensors["layers.0.w_down"]
    expected = (values.astype(np.float32) * np.repeat(scales, 32)).reshape(place.shape)
    assert tensor.quant is None
    np.testing.assert_array_equal(tensor.floats(3, 7), expected[3:7])


def test_the_tiny_gguf_and_its_vocabulary(data: Path) -> None:
    source = open_source(data / "gguf" / "llama-2-tiny-random.gguf")
    assert (source.config.dim, source.config.n_layers, source.config.vocab_size) == (8, 1, 32000)
    logits, _ = forward(load(source), jnp.asarray([[1, 5, 9]]))
    assert np.isfinite(logits).all()
    model = data / "tokenizer" / "tokenizer.model"
    stored, own = from_model(model), source.tokenizer
    assert (own.pieces, own.scores, own.types) == (stored.pieces, stored.scores, stored.types)
    text = (data / "text" / "tinyshakespeare.txt").read_text()[:20000] + "\u00e9\u6f22 \U0001f600\n\t  x"
    assert tokenizer_for(source).encode(text) == load_tokenizer(model).encode(text)


@pytest.mark.parametrize("name", ["tokenizer", "tok512"])
def test_llama2cs_tokenizer_gives_the_ids_of_the_model_it_came_from(name: str, data: Path) -> None:
    model, bin_ = (load_tokenizer(data / "tokenizer" / f"{name}{suffix}") for suffix in (".model", ".bin"))
    text = (data / "text" / "tinystories_valid_excerpt_30KB.txt").read_text() + " \u00e9\u6f22\U0001f600"
    assert bin_.encode(text) == model.encode(text)
    assert bin_.decode(model.encode(text)) == model.decode(model.encode(text))
    assert (bin_.n_ids, bin_.bos_id, bin_.eos_id) == (model.n_ids, model.bos_id, model.eos_id)


def test_a_tokenizer_json(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<s>": 0, "</s>": 1, "once": 2, "upon": 3, "a": 4, "time": 5, "?": 6}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens(["<s>", "</s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json", 8)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.n_ids) == (0, 1, 7)
    assert tokenizer.encode("once upon a time") == [2, 3, 4, 5]
    assert tokenizer.decode([0, 2, 3, 1]) == "once upon"
    # Whether a text begins with bos, the file says, or the config beside it.
    begin = [("<s>", 0)]
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=begin)
    made.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path / "tokenizer.json", 8).encode("once upon a time") == [0, 2, 3, 4, 5]
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert load_tokenizer(tmp_path).encode("once upon a time") == [2, 3, 4, 5]

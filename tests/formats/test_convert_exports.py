"""Every export format: equal to the original byte for byte where there is one, and read by the program it is for."""

import json
import os
import subprocess
from pathlib import Path

import checkpoints
import jax.numpy as jnp
import numpy as np
import pytest

from convert.to_gguf import gguf
from convert.to_llama2c import llama2c
from jllama.errors import InputError
from jllama.formats import open_source
from jllama.formats.checkpoint import load
from jllama.formats.native import directory, hf_directory, save
from jllama.formats.source import Integers
from jllama.formats.vocabulary import from_llama2c, from_model, padded, to_llama2c
from jllama.model import forward
from jllama.text.tokenizer import load_tokenizer, tokenizer_for

ROOT = Path(__file__).parents[2]
PEERS = Path(os.environ.get("JLLAMA_PEERS_PYTHON", ROOT / ".venv-peers" / "bin" / "python"))


def test_version_0_equals_the_original_but_for_its_rotary_tables(data: Path, tmp_path: Path) -> None:
    original = (data / "weights" / "stories260K.bin").read_bytes()
    save(llama2c(open_source(data / "weights" / "stories260K_hf")), tmp_path / "model.bin")
    written = (tmp_path / "model.bin").read_bytes()
    tables = 2 * 4 * 512 * 4  # cosines and sines of 512 positions, 4 pairs a head; nothing comes after them
    assert len(written) == len(original)
    assert written[:-tables] == original[:-tables]
    ours, theirs = (np.frombuffer(raw[-tables:], np.float32) for raw in (written, original))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


def test_version_2_equals_the_original(data: Path, tmp_path: Path) -> None:
    original = data / "weights" / "stories260K_q80_gs4.bin"
    save(llama2c(open_source(data / "weights" / "stories260K.bin"), int8=True, group=4), tmp_path / "rounded.bin")
    assert (tmp_path / "rounded.bin").read_bytes() == original.read_bytes()
    save(directory(open_source(original)), tmp_path / "native")
    save(llama2c(open_source(tmp_path / "native"), int8=True), tmp_path / "kept.bin")
    assert (tmp_path / "kept.bin").read_bytes() == original.read_bytes()


@pytest.mark.parametrize("name", ["tokenizer", "tok512"])
def test_tokenizer_bin_equals_the_original(name: str, data: Path) -> None:
    model, original = (data / "tokenizer" / f"{name}{suffix}" for suffix in (".model", ".bin"))
    assert to_llama2c(from_model(model)) == original.read_bytes()
    assert to_llama2c(from_llama2c(original)) == original.read_bytes()


ROUND_TRIPS = [("hf", "gguf", "hf"), ("hf", "llama2c-0", "gguf", "hf"), ("meta", "hf", "bin"), ("llama2c-1", "sharded")]


@pytest.mark.parametrize("forms", ROUND_TRIPS, ids="-".join)
def test_round_trips_lose_nothing(forms: tuple[str, ...], tmp_path: Path) -> None:
    original = source = checkpoints.source(checkpoints.UNTIED)
    for i, form in enumerate(forms):
        source = open_source(checkpoints.make(form, source, tmp_path / f"{i}-{form}"))
    checkpoints.assert_same_tensors(source, original)


def test_a_directory_written_twice_is_the_same_bytes(tmp_path: Path) -> None:
    save(hf_directory(checkpoints.source()), tmp_path / "a")
    save(gguf(open_source(tmp_path / "a")), tmp_path / "b.gguf")
    save(hf_directory(open_source(tmp_path / "b.gguf")), tmp_path / "c")
    for name in ("model.safetensors", "tokenizer.model"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()


def test_a_llama2c_directory_carries_its_tokenizer(tmp_path: Path) -> None:
    source = checkpoints.source(checkpoints.CONFIG.replace(vocab_size=99), tokenizer=checkpoints.vocabulary(96))
    save(llama2c(source, directory=True), tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["model.bin", "tokenizer.bin"]
    opened = open_source(tmp_path / "model")
    assert opened.tokenizer == tmp_path / "model" / "tokenizer.bin"
    # llama2.c reads as many pieces as the embedding has rows.
    assert len(from_llama2c(opened.tokenizer).pieces) == 99
    assert tokenizer_for(opened).encode("the hat.") == tokenizer_for(source).encode("the hat.")
    with pytest.raises(InputError, match="expected at most vocab_size 50 pieces, found 96"):
        padded(checkpoints.vocabulary(96), 50)


@pytest.mark.parametrize(
    ("change", "field"),
    [(dict(rope_theta=5e5), "rope_theta"), (dict(norm_eps=1e-6), "norm_eps"), (dict(head_dim=16), "head_dim")],
)
def test_what_llama2c_has_no_field_for_is_refused(change: dict[str, float], field: str) -> None:
    with pytest.raises(InputError, match=f"{field}: llama2.c knows only"):
        llama2c(checkpoints.source(checkpoints.CONFIG.replace(**change)))


def test_int8_with_longer_groups_keeps_its_integers_in_version_2(tmp_path: Path) -> None:
    native = open_source(checkpoints.make("native-int8", checkpoints.source(), tmp_path / "native"))
    save(llama2c(native, int8=True, group=16), tmp_path / "model.bin")
    opened = open_source(tmp_path / "model.bin")
    rows, kept = (source.tensors["layers.1.w_up"].read() for source in (native, opened))
    assert isinstance(rows, Integers)
    np.testing.assert_array_equal(rows.data, kept.data)
    np.testing.assert_array_equal(np.repeat(rows.scale, 2, axis=1), kept.scale)


def test_quantised_weights_leave_as_floats(tmp_path: Path) -> None:
    native = open_source(checkpoints.make("native-int4", checkpoints.source(), tmp_path / "native"))
    save(hf_directory(native), tmp_path / "hf")
    opened = open_source(tmp_path / "hf")
    assert (opened.form, opened.quant, opened.dtype) == ("hf", None, "float32")
    checkpoints.assert_same_tensors(opened, native)
    assert "quantization_config" not in json.loads((tmp_path / "hf" / "config.json").read_text())


def test_a_tokenizer_goes_along_into_a_directory(tmp_path: Path) -> None:
    source = checkpoints.source()
    save(llama2c(source, directory=True), tmp_path / "c")
    for name, origin in (("memory", source), ("bin", open_source(tmp_path / "c"))):
        save(hf_directory(origin), tmp_path / name)
        again = load_tokenizer(tmp_path / name / "tokenizer.model")
        assert again.encode("the cat, a rat") == tokenizer_for(source).encode("the cat, a rat")
    save(hf_directory(open_source(tmp_path / "memory")), tmp_path / "copy")
    first, second = ((tmp_path / name / "tokenizer.model").read_bytes() for name in ("memory", "copy"))
    assert first == second


SCRIPT = """
import sys, numpy as np, torch, transformers
model = transformers.LlamaForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
with torch.no_grad():
    np.save(sys.argv[3], model(torch.from_numpy(np.load(sys.argv[2]))).logits.numpy())
"""


@pytest.mark.peers
@pytest.mark.skipif(not PEERS.exists(), reason="needs torch and transformers (make peers)")
@pytest.mark.parametrize("form", ["hf", "sharded"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_loads_the_export_with_equal_logits(form: str, dtype: str, tmp_path: Path) -> None:
    path = checkpoints.make(form, checkpoints.source(checkpoints.UNTIED, dtype), tmp_path / "model")
    tokens = np.random.RandomState(0).randint(3, 96, (2, 20))
    np.save(tmp_path / "tokens.npy", tokens)
    command = [str(PEERS), "-c", SCRIPT, str(path), str(tmp_path / "tokens.npy"), str(tmp_path / "logits.npy")]
    subprocess.run(command, check=True, capture_output=True)
    theirs = np.load(tmp_path / "logits.npy")
    ours, _ = forward(load(path, dtype="float32"), jnp.asarray(tokens))
    assert np.abs(np.asarray(ours) - theirs).max() < 1e-5 * np.abs(theirs).max()

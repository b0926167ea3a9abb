"""GGUF files of all types that the gguf package writes, and our files as the gguf package reads them."""

import struct
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest

from convert.to_gguf import gguf as to_gguf
from jllama.config import LlamaConfig, RopeScaling
from jllama.errors import InputError
from jllama.formats import open_source
from jllama.formats.checkpoint import load
from jllama.formats.gguf import names_of, rope_factors
from jllama.formats.gguf_file import BLOCKS, read_gguf
from jllama.formats.native import save
from jllama.formats.source import Integers, Quantization
from jllama.text.tokenizer import tokenizer_for

gguf = pytest.importorskip("gguf")

# One layer. Its rows hold whole blocks of every type.
CONFIG = LlamaConfig(
    dim=256, n_layers=1, n_heads=4, n_kv_heads=2, hidden_dim=256, vocab_size=16, max_seq_len=32, tie_embeddings=True
)
QUANTS = [kind for kind, elements, _ in BLOCKS.values() if elements > 1]


def raw_blocks(kind: str, shape: tuple[int, int], seed: int) -> np.ndarray:
    """Rows of random blocks. Any two bytes may be a float16 scale, so none has all exponent bits set."""
    elements, size = next((e, s) for name, e, s in BLOCKS.values() if name == kind)
    raw = np.random.RandomState(seed).randint(0, 256, (shape[0], shape[1] // elements * size)).astype(np.uint8)
    return raw & 0xBB


def write(path: Path, kind: str, **fields: Any) -> dict[str, np.ndarray]:
    """A model whose matrices have that type; its stored bytes under our names."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in (
        ("block_count", 1),
        ("context_length", 32),
        ("embedding_length", 256),
        ("feed_forward_length", 256),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
    ):
        writer.add_uint32(f"llama.{name}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    for name, value in fields.items():
        writer.add_string(name, value)
    stored = {}
    for i, (ours, theirs) in enumerate(names_of(CONFIG).items()):
        shape = checkpoints.expected_shapes(CONFIG)[ours]
        if len(shape) == 1:
            stored[ours] = np.linspace(0.5, 1.5, 256, dtype=np.float32)
            writer.add_tensor(theirs, stored[ours])
        else:
            stored[ours] = raw_blocks(kind, shape, i)
            writer.add_tensor(theirs, stored[ours], raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def rotary_order(array: np.ndarray, heads: int) -> np.ndarray:
    """Move neighbouring pairs apart, as the inverse of transformers' permutation for GGUF."""
    return array.reshape(heads, -1, 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)


@pytest.mark.parametrize("kind", QUANTS)
def test_every_type_reads_as_the_gguf_package_reads_it(kind: str, tmp_path: Path) -> None:
    stored = write(tmp_path / "model.gguf", kind)
    source = open_source(tmp_path / "model.gguf")
    for name, heads in (("embed", 0), ("layers.0.wq", 4), ("layers.0.wk", 2), ("layers.0.w_down", 0)):
        expected = gguf.quants.dequantize(stored[name], gguf.GGMLQuantizationType[kind])
        expected = rotary_order(expected, heads) if heads else expected
        tensor = source.tensors[name]
        np.testing.assert_array_equal(tensor.floats(0, tensor.shape[0]), expected)
        np.testing.assert_array_equal(tensor.floats(3, 9), expected[3:9])
    assert (source.quant is not None) == (kind in ("Q8_0", "Q4_0"))


@pytest.mark.parametrize(("kind", "bits"), [("Q8_0", 8), ("Q4_0", 4)])
def test_integers_of_our_own_kind_are_kept(kind: str, bits: int, tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", kind)
    source = open_source(tmp_path / "model.gguf")
    assert source.quant == Quantization(f"int{bits}", 32)
    rows = source.tensors["layers.0.wo"].read()
    assert isinstance(rows, Integers)
    assert rows.scale.dtype == np.float16
    # -8 is outside the range of our own quantiser, but it is kept.
    assert rows.data.min() == (-8 if bits == 4 else rows.data.min())
    checkpoints.save(checkpoints.directory(source), tmp_path / "native")
    again = open_source(tmp_path / "native")
    for name, tensor in source.tensors.items():
        one, other = tensor.read(), again.tensors[name].read()
        for field in ("data", "scale") if tensor.quant else ():
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field))
    for path in (tmp_path / "model.gguf", tmp_path / "native"):
        weight = load(path).layer(0).wo
        assert (weight.bits, weight.group) == (bits, 32)
        np.testing.assert_array_equal(np.asarray(weight.data.astype(np.int8)), rows.data)
        np.testing.assert_array_equal(weight.scale, rows.scale)


def test_weights_of_different_types_that_are_held_as_one_become_floats(tmp_path: Path) -> None:
    import dataclasses

    a, b = (tmp_path / f"{kind}.gguf" for kind in ("Q8_0", "Q4_0"))
    write(a, "Q8_0")
    write(b, "Q4_0")
    one, other = open_source(a), open_source(b)
    mixed = dataclasses.replace(one, tensors={**one.tensors, "layers.0.wv": other.tensors["layers.0.wv"]})
    params = load(mixed, dtype="float32")
    parts = [mixed.tensors[f"layers.0.{n}"] for n in ("wq", "wk", "wv")]
    expected = np.concatenate([part.floats(0, part.shape[0]) for part in parts])
    np.testing.assert_array_equal(params.layer(0).wqkv, expected)
    assert params.layer(0).wo.bits == 8


def test_version_2_reads_as_version_3(tmp_path: Path) -> None:
    path = checkpoints.make("gguf", checkpoints.source(), tmp_path / "three")
    raw = path.read_bytes()
    (tmp_path / "two.gguf").write_bytes(raw[:4] + struct.pack("<I", 2) + raw[8:])
    checkpoints.assert_same_tensors(open_source(tmp_path / "two.gguf"), open_source(path))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_gguf_package_reads_what_we_write(dtype: str, tmp_path: Path) -> None:
    source = checkpoints.source(checkpoints.UNTIED, dtype)
    path = checkpoints.make("gguf", source, tmp_path / "model")
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert set(tensors) == set(names_of(source.config).values())
    for ours, theirs in names_of(source.config).items():
        tensor, array = tensors[theirs], source.tensors[ours].read()
        stored = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        heads = {"wq": 4, "wk": 2}.get(ours.rpartition(".")[2])
        if heads:  # as llama.cpp's converter permutes
            width = array.shape[1]
            array = array.reshape(heads, 2, -1, width).swapaxes(1, 2).reshape(array.shape)
        np.testing.assert_array_equal(np.float32(stored.reshape(array.shape)), np.float32(array))
    field = reader.fields
    assert field["general.architecture"].contents() == "llama"
    assert field["llama.attention.head_count_kv"].contents() == 2
    assert field["tokenizer.ggml.tokens"].contents() == list(checkpoints.vocabulary().pieces)


def test_vocabulary_and_config_come_back(tmp_path: Path) -> None:
    config = checkpoints.UNTIED.replace(rope_theta=5e5, norm_eps=1e-6, head_dim=12)
    source = checkpoints.source(config)
    opened = open_source(checkpoints.make("gguf", source, tmp_path / "model"))
    assert opened.config == config
    for field in ("pieces", "scores", "types", "bos_id", "eos_id", "add_dummy_prefix", "remove_extra_whitespaces"):
        assert getattr(opened.tokenizer, field) == getattr(source.tokenizer, field)
    assert tokenizer_for(opened).encode("the hat") == tokenizer_for(source).encode("the hat")


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3s_frequencies_come_back(factor: float, tmp_path: Path) -> None:
    scaling = RopeScaling("llama3", factor)
    config = checkpoints.CONFIG.replace(rope_scaling=scaling, rope_theta=5e5, head_dim=64)
    source = checkpoints.source(config)
    save(to_gguf(source), tmp_path / "model.gguf")
    assert open_source(tmp_path / "model.gguf").config == config
    odd = config.replace(rope_scaling=RopeScaling("llama3", 11.0))
    save(to_gguf(checkpoints.source(odd)), tmp_path / "odd.gguf")
    with pytest.raises(InputError, match=r"odd.gguf: rope_freqs.weight: expected the factors of Llama 3.1 or 3.2"):
        open_source(tmp_path / "odd.gguf")
    assert rope_factors(config).max() == pytest.approx(factor)


def test_the_types_are_those_that_the_gguf_package_dequantises() -> None:
    known = {kind.name for kind in gguf.quants._type_traits} | {"F32", "F16"}
    assert {kind for kind, _, _ in BLOCKS.values()} == known
    for number, (kind, elements, size) in BLOCKS.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]] == (elements, size)
        assert gguf.GGMLQuantizationType[kind] == number


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", "Q8_0")
    raw = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(raw.replace(b"llama", b"other", 2))
    with pytest.raises(InputError, match=r"general.architecture: expected 'llama', found 'other'"):
        open_source(tmp_path / "model.gguf")
    assert read_gguf(tmp_path / "model.gguf").fields["general.architecture"] == "other"

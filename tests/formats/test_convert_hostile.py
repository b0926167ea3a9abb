"""Malicious files: each is refused with one line that names file and field, and none executes code."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from checkpoints import refused

from jllama.formats import open_source
from jllama.formats.gguf_file import MAGIC
from jllama.formats.vocabulary import from_llama2c, from_model
from jllama.text.tokenizer import load_tokenizer, tokenizer_for

# Safetensors


def header(entries: Any, data: bytes = bytes(64)) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: Any = (4, 4), offsets: Any = (0, 64), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


SAFETENSORS = {
    "nothing": (b"", "found 0 bytes (cut off?)"),
    "too short": (b"1234567", "found 7 bytes (cut off?)"),
    "length that lies": (struct.pack("<Q", 1 << 62) + b"{}", "header length: expected at most 2 bytes"),
    "not JSON": (header(b"{" * 100), "header: expected JSON"),
    "deep JSON": (header(b"[" * 1_000_000), "header: expected JSON"),
    "a list": (header([]), "header: expected a JSON object, found list"),
    "entry that is none": (header({"a": 3}), "a: expected an object"),
    "unknown dtype": (header({"a": entry(dtype="F31")}), "a: dtype: expected one of"),
    "dtype of another type": (header({"a": entry(dtype=["F32"])}), "a: dtype: expected one of"),
    "negative shape": (header({"a": entry(shape=[-4, -4])}), "a: shape: expected up to 8 positive integers"),
    "zero dimension": (header({"a": entry(shape=[0, 4], offsets=[0, 0])}), "a: shape: expected up to 8 positive"),
    "shape of floats": (header({"a": entry(shape=[4.0, 4])}), "a: shape: expected up to 8 positive integers"),
    "many dimensions": (header({"a": entry(shape=[1] * 9)}), "a: shape: expected up to 8 positive integers"),
    "overflowing shape": (header({"a": entry(shape=[1 << 40, 1 << 40])}), "a: data_offsets: expected 4835703278458516"),
    "offsets past the end": (header({"a": entry(offsets=[0, 1 << 40])}), "a: data_offsets: expected two within"),
    "offsets backwards": (header({"a": entry(offsets=[64, 0])}), "a: data_offsets: expected two within"),
    "offsets missing": (header({"a": {"dtype": "F32", "shape": [1]}}), "a: data_offsets: expected two within"),
    "overlap": (header({"a": entry(), "b": entry([1], [60, 64])}), "b: data_offsets overlap those of a"),
    "a name with a line feed": (header({"a\nb": entry(offsets=[9, 1])}), r"'a\nb': data_offsets"),
    "many entries": (header({f"{i}": entry([1], [0, 4]) for i in range(100_000)}), "expected at most 50000 tensors"),
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_safetensors(name: str, tmp_path: Path) -> None:
    path = checkpoints.make("hf", checkpoints.source(), tmp_path / "model")
    content, message = SAFETENSORS[name]
    (path / "model.safetensors").write_bytes(content)
    refused(path, "model.safetensors: ", message)


# Directories


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "..", "", "a/b", "a\\b", "x\0y", "n" * 300])
@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_shard_names_that_climb_out(name: str, index: str, tmp_path: Path) -> None:
    path = checkpoints.make("hf", checkpoints.source(), tmp_path / "model")
    (path / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (path / index).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    refused(path, f"{index}: file name: expected one inside the directory")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": 3}, "weight_map: expected an object of file names"),
        (["model.safetensors"], "weight_map: expected an object of file names"),
        ({str(i): f"{i}.safetensors" for i in range(5000)}, "weight_map: expected at most 4096 files, found 5000"),
        ({"a": "none.safetensors"}, "none.safetensors: cannot be read: No such file"),
    ],
)
def test_an_index_that_is_wrong(weight_map: Any, message: str, tmp_path: Path) -> None:
    path = checkpoints.make("hf", checkpoints.source(), tmp_path / "model")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(path, message)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.model"])
def test_links_out_of_the_directory(name: str, tmp_path: Path) -> None:
    path = checkpoints.make("hf", checkpoints.source(), tmp_path / "model")
    (path / name).rename(tmp_path / "elsewhere")
    (path / name).symlink_to(tmp_path / "elsewhere")
    refused(path, f"{name}: link: expected one inside the directory, found ")


def test_links_that_stay_and_those_of_the_download_cache_are_followed(tmp_path: Path) -> None:
    root = tmp_path / "models--a--b"
    (root / "blobs").mkdir(parents=True)
    (root / "snapshots").mkdir()
    path = checkpoints.make("hf", checkpoints.source(), root / "snapshots" / "0123")
    (path / "model.safetensors").rename(root / "blobs" / "aa")
    (path / "model.safetensors").symlink_to("../../blobs/aa")
    (path / "tokenizer.model").rename(path / "other.model")
    (path / "tokenizer.model").symlink_to("other.model")
    checkpoints.assert_same_tensors(open_source(path), checkpoints.source())
    (tmp_path / "link").symlink_to(path)  # the user's own link
    assert tokenizer_for(open_source(tmp_path / "link")).n_ids == 96


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    path = checkpoints.make("hf", checkpoints.source(), tmp_path / "model")
    for name in ("model.safetensors", "config.json"):
        (path / name).unlink()
        os.mkfifo(path / name)
        refused(path, f"{name}: expected a file, found something else")


# llama2.c


@pytest.mark.parametrize(
    ("form", "at", "values", "message"),
    [
        ("llama2c-0", 0, [0], "dim: expected an integer from 1 to 1048576, found 0"),
        ("llama2c-0", 0, [-32], "dim: expected an integer"),
        ("llama2c-0", 0, [33], "dim 33 is not a multiple of n_heads 4"),
        ("llama2c-0", 8, [1 << 30], "n_layers: expected an integer from 1 to 4096"),
        ("llama2c-0", 12, [0], "n_heads: expected an integer"),
        ("llama2c-0", 16, [3], "n_heads 4 is not a multiple of n_kv_heads 3"),
        ("llama2c-0", 20, [0x7FFFFFFF], "vocab_size: expected an integer from 1 to 16777216"),
        ("llama2c-0", 20, [-(1 << 31)], "vocab_size: expected an integer from 1 to 16777216"),
        ("llama2c-0", 4, [1 << 24], "expected "),
        ("llama2c-0", 20, [-96], "bytes for version 0, found "),
        ("llama2c-1", 4, [7], "version: expected 1 or 2, found 7"),
        ("llama2c-1", 8, [1 << 20, 1 << 24, 4096, 1, 1, 1 << 24, 1 << 24], "bytes for version 1, found "),
        ("llama2c-2", 37, [0], "group size: expected a divisor of every weight's size, found 0"),
        ("llama2c-2", 37, [-16], "group size: expected a divisor"),
        ("llama2c-2", 37, [17], "group size: expected a divisor"),
    ],
)
def test_llama2c_headers(form: str, at: int, values: list[int], message: str, tmp_path: Path) -> None:
    path = checkpoints.make(form, checkpoints.source(), tmp_path / "model")
    raw = bytearray(path.read_bytes())
    raw[at : at + 4 * len(values)] = struct.pack(f"<{len(values)}i", *values)
    path.write_bytes(raw)
    refused(path, "model.bin: ", message)


@pytest.mark.parametrize("keep", [0, 10, 300, -1])
def test_llama2c_cut_off(keep: int, tmp_path: Path) -> None:
    path = checkpoints.make("llama2c-0", checkpoints.source(), tmp_path / "model")
    path.write_bytes(path.read_bytes()[:keep])
    refused(path, "model.bin: expected ")


# GGUF


def gguf_string(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def gguf_head(tensors: int, fields: int, version: int = 3) -> bytes:
    return MAGIC + struct.pack("<IQQ", version, tensors, fields)


def gguf_info(shape: tuple[int, ...], kind: int = 0, offset: int = 0, name: str = "a") -> bytes:
    return gguf_string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


ALIGN_0 = gguf_string("general.alignment") + struct.pack("<II", 4, 0)
GGUF = {
    "nothing": (b"", "found 0 bytes"),
    "something else": (b"GGML" + bytes(50), "expected a GGUF file"),
    "version 1": (gguf_head(0, 0, 1), "version: expected 2 or 3, found 1"),
    "big-endian": (gguf_head(0, 0, 3 << 24), "version: expected 2 or 3, found one for big-endian machines"),
    "cut off": (gguf_head(0, 0)[:20], "header: expected 8 more bytes, found 4 (cut off?)"),
    "many tensors": (gguf_head(1 << 60, 0), "header: expected at most 50000 tensors"),
    "many fields": (gguf_head(0, 1 << 60), "header: expected at most 10000 fields"),
    "long name": (gguf_head(0, 1) + struct.pack("<Q", 1 << 62), "field 0: expected at most 1048576 bytes of text"),
    "name that lies": (gguf_head(0, 1) + struct.pack("<Q", 1 << 19) + b"ab", "field 0: expected 524288 more bytes"),
    "name of bytes": (gguf_head(0, 1) + gguf_string(b"\xff\xfe"), "field 0: expected UTF-8 text"),
    "unknown type": (gguf_head(0, 1) + gguf_string("k") + struct.pack("<I", 99), "k: expected a type from 0 to 12"),
    "long array": (
        gguf_head(0, 1) + gguf_string("k") + struct.pack("<IIQ", 9, 4, 1 << 62),
        "k: expected at most 4194304 elements",
    ),
    "array that lies": (
        gguf_head(0, 1) + gguf_string("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 1 << 22),
        "tokenizer.ggml.tokens: expected 8 more bytes",
    ),
    "array of arrays": (
        gguf_head(0, 1) + gguf_string("k") + struct.pack("<IIQ", 9, 9, 1),
        "k: expected an array of numbers or texts",
    ),
    "twice": (gguf_head(0, 2) + 2 * (gguf_string("k") + struct.pack("<II", 4, 1)), "k: expected it once"),
    "no alignment": (gguf_head(0, 1) + ALIGN_0, "general.alignment: expected a power of two"),
    "many dimensions": (gguf_head(1, 0) + gguf_info((1,) * 5) + bytes(99), "a: expected 1 to 4 dimensions"),
    "zero dimension": (gguf_head(1, 0) + gguf_info((0, 4)) + bytes(99), "a: expected shape: positive"),
    "overflow": (gguf_head(1, 0) + gguf_info((1 << 62, 1 << 62)) + bytes(99), "a: shape ["),
    "past the end": (gguf_head(1, 0) + gguf_info((4,), offset=1 << 62) + bytes(99), "a: shape [4]: expected "),
    "unknown tensor type": (gguf_head(1, 0) + gguf_info((4,), kind=4) + bytes(99), "a: expected type: one of F32"),
    "half a block": (gguf_head(1, 0) + gguf_info((33,), kind=2) + bytes(99), "rows of whole blocks of 32"),
    "overlap": (
        gguf_head(2, 0) + gguf_info((8,)) + gguf_info((8,), offset=4, name="b") + bytes(128),
        "b: offset 4: overlaps a",
    ),
    "same name": (gguf_head(2, 0) + gguf_info((2,)) + gguf_info((2,), offset=32) + bytes(128), "a: expected it once"),
    "no config": (gguf_head(0, 0), "general.architecture: expected 'llama'"),
}


@pytest.mark.parametrize("name", GGUF)
def test_gguf(name: str, tmp_path: Path) -> None:
    content, message = GGUF[name]
    (tmp_path / "model.gguf").write_bytes(content)
    refused(tmp_path / "model.gguf", "model.gguf: ", message)


def field_offset(raw: bytes, name: str) -> int:
    return raw.find(gguf_string(name)) + 8 + len(name)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("llama.block_count", 3, "tensor layers.2.attn_norm: missing"),
        ("llama.block_count", 1 << 31, "llama.block_count: expected an integer from 1 to 4096"),
        ("llama.attention.head_count", 0, "llama.attention.head_count: expected an integer from 1"),
        ("llama.attention.head_count_kv", 3, "n_heads 4 is not a multiple of n_kv_heads 3"),
        ("llama.embedding_length", 64, "shape: expected "),
        ("llama.rope.dimension_count", 4, "llama.rope.dimension_count: expected 8"),
        ("llama.vocab_size", 95, "expected 95 as the embedding, found 96"),
        ("tokenizer.ggml.bos_token_id", 96, "tokenizer.ggml.bos_token_id: expected token ids below 96"),
        ("tokenizer.ggml.unknown_token_id", 96, "tokenizer.ggml.unknown_token_id: expected an integer from 0 to 95"),
    ],
)
def test_ggufs_config(name: str, value: int, message: str, tmp_path: Path) -> None:
    path = checkpoints.make("gguf", checkpoints.source(), tmp_path / "model")
    raw = bytearray(path.read_bytes())
    at = field_offset(raw, name) + 4
    raw[at : at + 4] = struct.pack("<I", value)
    path.write_bytes(raw)
    refused(path, "model.gguf: ", message)


# Tokenizers


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "found 0 bytes"),
        (b"1234", "found 0"),
        (b"1234" + struct.pack("<fI", 0.0, 1 << 31) + b"a", "piece 0: length: expected at most 1 bytes"),
        (b"1234" + struct.pack("<fI", 0.0, 1) + b"\xff", "piece 0: expected UTF-8 text"),
        (b"1234" + struct.pack("<fI", 0.0, 1) + b"ab", "piece 1: expected 8 bytes of score and length, found 1"),
    ],
)
def test_llama2c_tokenizers(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.bin").write_bytes(content)
    refused(tmp_path / "tokenizer.bin", "tokenizer.bin: ", message, opened=from_llama2c)
    refused(tmp_path / "tokenizer.bin", "tokenizer.bin: ", message, opened=load_tokenizer)


@pytest.mark.parametrize("content", [b"x", b"\x0a\xff\xff\xff\xff\x7f", b"\x0a\x02\x15\x00", b"\x12\x00", b"\x80" * 30])
def test_sentencepiece_models(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    refused(tmp_path / "tokenizer.model", "tokenizer.model: ", "expected ", opened=from_model)
    refused(tmp_path / "tokenizer.model", "tokenizer.model: ", "expected ", opened=load_tokenizer)


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b'{"model": {"type": "BPE"}}', b"\xff" * 9, b"[" * 100_000])
def test_json_tokenizers(content: bytes, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_bytes(content)
    refused(tmp_path / "tokenizer.json", "tokenizer.json: ", "expected ", opened=load_tokenizer)
    refused(
        tmp_path / "tokenizer.json",
        "tokenizer.json: ",
        "expected a tokenizer of the tokenizers library",
        opened=lambda path: load_tokenizer(path, bos_id=1, eos_id=2),
    )


def test_a_tokenizer_too_large_to_be_one(tmp_path: Path) -> None:
    with open(tmp_path / "tokenizer.model", "wb") as file:
        file.truncate(1 << 40)
    refused(tmp_path / "tokenizer.model", "expected a tokenizer of at most", opened=load_tokenizer)

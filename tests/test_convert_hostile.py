"""Files that a stranger made to do harm: each refused in one line that names file and field, nothing executed."""

import json
import os
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest

from convert import open_source
from convert.gguf_file import MAGIC
from convert.vocabulary import from_llama2c, from_model
from jllama.errors import InputError
from jllama.tokenizer import load_tokenizer, tokenizer_for


def refused(path: Path, *parts: str, opened: Callable[[Path], Any] = open_source) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(InputError) as error:
            opened(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20
    message = str(error.value)
    assert "\n" not in message
    assert message.isprintable()
    assert len(message) < 600
    for part in parts:
        assert part in message


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
    (path / "model.safetensors").unlink()
    os.mkfifo(path / "model.safetensors")
    refused(path, "model.safetensors: expected a file, found something else")


# Torch


class Evil:
    """What a pickle can do: call a function of its choice when it is read."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


def pickles(marker: Path) -> dict[str, tuple[bytes, str]]:
    import builtins
    import pickle
    import subprocess

    good = checkpoints.pickled_tensor("0", "float32", (4, 4), 16)
    start = b"\x80\x02}(" + checkpoints.text("a")

    def tensor(**changes: Any) -> bytes:
        values: dict[str, Any] = dict(key="0", dtype="float32", shape=(4, 4), size=16)
        return start + checkpoints.pickled_tensor(**values | changes) + b"u."

    return {
        "os.system": (pickle.dumps(Evil(os.system, f"touch {marker}"), 2), "expected a name that weights need"),
        "eval": (pickle.dumps(Evil(builtins.eval, "1"), 4), "expected a name that weights need, found builtins.eval"),
        "Popen": (pickle.dumps({"a": Evil(subprocess.Popen, "ls")}, 2), "expected a name that weights need"),
        "old protocol": (pickle.dumps({"a": Evil(os.system, "ls")}, 0), "expected "),
        "instance": (b"(i__main__\nEvil\n.", "expected an instruction that weights need"),
        "object": (b"\x80\x02ctorch\nFloatStorage\n)\x81.", "expected an instruction that weights need"),
        "another global of torch": (start + b"ctorch\nload\n.", "found torch.load"),
        "a memo index of gigabytes": (b"\x80\x02}r\xff\xff\xff\x7f0.", "expected an instruction"),
        "text that lies about its length": (b"\x80\x02X\xff\xff\xff\xffa.", "expected 4294967295 more bytes"),
        "nothing on the stack": (b"\x80\x02.", "expected another value on the stack, found nothing"),
        "no mark": (b"\x80\x02}u.", "expected a mark on the stack"),
        "no end": (b"\x80\x02}", "expected 1 more bytes, found 0"),
        "no such memory": (b"\x80\x02h\x07.", "expected a remembered value, found index 7"),
        "a key that is none": (b"\x80\x02}" + good + b"Ns.", "expected a string as key"),
        "odd items": (b"\x80\x02}(Nu.", "expected pairs of key and value"),
        "deep": (b"\x80\x02" + b"N" + b"\x85" * 400_000 + b".", "expected a dictionary of tensors, found tuple"),
        "endless": (b"\x80\x02" + b"}" * 600_000, "expected at most 500000 instructions"),
        "a list": (b"\x80\x02].", "expected a dictionary of tensors, found list"),
        "other storage": (tensor(key="7"), "a: storage 7: missing in the zip"),
        "storage that lies": (tensor(size=17), "a: storage 0: expected 68 bytes, found 64"),
        "overflowing shape": (tensor(shape=(1 << 40, 1 << 40), strides=(1, 1)), "expected at most 16 elements"),
        "zero dimension": (tensor(shape=(0, 4)), "a: shape: expected positive integers"),
        "offset past the end": (tensor(offset=1), "a: shape: expected at most 15 elements"),
        "negative offset": (tensor(offset=-1), "expected the arguments of _rebuild_tensor_v2"),
        "negative shape": (tensor(shape=(-4, -4)), "expected the arguments of _rebuild_tensor_v2"),
        "strides": (tensor(strides=(1, 4)), "a: strides: expected [4, 1], found [1, 4]"),
        "stride of nothing": (tensor(shape=(4, 4), strides=(0, 1)), "a: strides: expected [4, 1], found [0, 1]"),
    }


@pytest.mark.parametrize("name", pickles(Path("marker")))
def test_pickles(name: str, tmp_path: Path) -> None:
    pickle, message = pickles(tmp_path / "marker")[name]
    path = checkpoints.make("bin", checkpoints.source(), tmp_path / "model")
    checkpoints.write_pth(path / "pytorch_model.bin", {"a": np.zeros((4, 4), np.float32)}, pickle)
    refused(path, "pytorch_model.bin: ", message)
    assert not (tmp_path / "marker").exists()


def zips() -> dict[str, tuple[Callable[[Path], None], str]]:
    def change(edit: Callable[[bytearray], Any]) -> Callable[[Path], None]:
        def apply(path: Path) -> None:
            raw = bytearray(path.read_bytes())
            path.write_bytes(edit(raw) or raw)

        return apply

    def compressed(path: Path) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", b"\x80\x02}." * 100)

    def crowd(path: Path) -> None:
        end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0, 0, 0)
        end64 = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, 1 << 60, 1 << 60, 0, 0)
        path.write_bytes(end64 + struct.pack("<4sIQI", b"PK\x06\x07", 0, 0, 1) + end)

    def put(marker: bytes, at: int, value: bytes, last: bool = False) -> Callable[[Path], None]:
        def edit(raw: bytearray) -> None:
            begin = (raw.rfind(marker) if last else raw.find(marker)) + at
            raw[begin : begin + len(value)] = value

        return change(edit)

    return {
        "older format": (change(lambda raw: b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19." * 20), "no zip directory"),
        "cut off": (change(lambda raw: raw[: len(raw) // 2]), "no zip directory (cut off, or older?)"),
        "two of them": (
            change(lambda raw: raw.replace(b"archive/version", b"archiv/data.pkl")),
            "expected one data.pkl",
        ),
        "twice": (change(lambda raw: raw.replace(b"archive/data/1P", b"archive/data/0P")), "found it twice"),
        "compressed": (compressed, "expected a stored file, found a compressed"),
        "a crowd": (crowd, "zip directory: expected at most 100000 files, found 1152921504606846976"),
        "directory that lies": (put(b"PK\x05\x06", 16, b"\xfe\xff\xff\x7f"), "zip directory: expected within"),
        "count that lies": (put(b"PK\x05\x06", 10, b"\x70\x00"), "zip directory: expected an entry at byte"),
        "size that lies": (put(b"PK\x01\x02", 20, b"\xff\xff\xff\x7f\xff\xff\xff\x7f"), "(cut off?)"),
        "offset that lies": (put(b"PK\x01\x02", 42, b"\xff\xff\xff\x7f"), "expected a file header at byte"),
        "overlap": (put(b"PK\x01\x02", 42, bytes(4), last=True), "overlaps "),
        "big-endian": (change(lambda raw: raw.replace(b"little", b"bigbig")), "byteorder: expected little"),
    }


@pytest.mark.parametrize("name", zips())
def test_zips(name: str, tmp_path: Path) -> None:
    path = checkpoints.make("bin", checkpoints.source(), tmp_path / "model")
    edit, message = zips()[name]
    edit(path / "pytorch_model.bin")
    refused(path, "pytorch_model.bin: ", message)


# Meta


def test_metas_shards_that_do_not_belong_together(tmp_path: Path) -> None:
    source = checkpoints.source(checkpoints.UNTIED)
    checkpoints.write_meta(tmp_path / "model", source, 2)
    path = tmp_path / "model"
    (path / "consolidated.01.pth").rename(path / "consolidated.02.pth")
    refused(path, "consolidated.01.pth: missing, but consolidated.02.pth is there")
    (path / "consolidated.02.pth").unlink()
    refused(path, "tok_embeddings.weight", "shape: expected [96, 32], found [96, 16]")
    (path / "consolidated.00.pth").unlink()
    refused(path, "expected 1 to 64 files consolidated.NN.pth, found 0")
    checkpoints.write_meta(tmp_path / "other", checkpoints.source(checkpoints.UNTIED.replace(dim=64, head_dim=8)), 2)
    for i in (0, 1):
        (tmp_path / ("other", "model")[0] / f"consolidated.0{i}.pth").rename(path / f"consolidated.0{i}.pth")
    refused(path, ".pth: ", "expected ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(dim=0), "dim: expected an integer from 1"),
        (dict(n_layers=10**9), "n_layers: expected an integer from 1 to 4096"),
        (dict(n_kv_heads=3), "n_heads 4 is not a multiple of n_kv_heads 3"),
        (dict(norm_eps="x"), "norm_eps: expected a number"),
        (dict(vocab_size=95), "vocab_size: expected 96 as in consolidated.00.pth, found 95"),
        (dict(n_layers=3), "tensor layers.2.attn_norm: missing"),
    ],
)
def test_metas_params(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = checkpoints.make("meta", checkpoints.source(), tmp_path / "model")
    values = json.loads((path / "params.json").read_text()) | change
    (path / "params.json").write_text(json.dumps(values))
    refused(path, message)


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

"""Malicious torch files and Meta releases: each is refused with one line, and none executes code."""

import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
from checkpoints import refused

# Torch


class Evil:
    """A pickle that calls a function of its choice when it is read."""

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

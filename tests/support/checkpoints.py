"""Small checkpoints in every form, made without torch, for the tests of `convert`."""

import struct
import tracemalloc
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.to_gguf import gguf
from convert.to_llama2c import llama2c
from jllama.config import LlamaConfig
from jllama.errors import InputError
from jllama.formats import open_source
from jllama.formats.layout import expected_shapes
from jllama.formats.llama2c import HEADER_BYTES, MAGIC, Header, plan
from jllama.formats.meta import BY_COLUMNS, LAYER, MODEL
from jllama.formats.native import directory, hf_directory, save
from jllama.formats.source import DTYPES, Source, Tensor
from jllama.formats.transform import to_interleaved
from jllama.formats.vocabulary import CONTROL, NORMAL, UNKNOWN, Vocabulary

CONFIG = LlamaConfig(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=64, vocab_size=96, max_seq_len=64, tie_embeddings=True
)
UNTIED = CONFIG.replace(tie_embeddings=False)
FORMS = ("hf", "sharded", "native-int8", "native-int4", "bin", "meta", "llama2c-0", "llama2c-1", "llama2c-2", "gguf")
STORAGES = {"float32": "FloatStorage", "bfloat16": "BFloat16Storage", "float16": "HalfStorage"}


def vocabulary(size: int = CONFIG.vocab_size) -> Vocabulary:
    """A vocabulary of letters and pairs of letters. Earlier pairs are merged first."""
    letters = ["\u2581", *"abcdefghijklmnopqrstuvwxyz.,"]
    pairs = [a + b for a in "\u2581theo" for b in "etaonishrdlucm"]
    pieces = ["<unk>", "<s>", "</s>", *dict.fromkeys([*pairs, *letters])]
    assert len(pieces) >= size
    pieces = [*pieces[:3], *letters, *(p for p in pieces[3:] if p not in letters)][:size]
    types = [UNKNOWN, CONTROL, CONTROL, *[NORMAL] * (size - 3)]
    return Vocabulary("made up", tuple(pieces), tuple(-float(i) for i in range(size)), tuple(types))


def in_memory(config: LlamaConfig, arrays: Mapping[str, np.ndarray], tokenizer: Any = None) -> Source:
    """A source of arrays."""

    def tensor(name: str, array: np.ndarray) -> Tensor:
        return Tensor(array.shape, str(array.dtype), name, lambda begin, end: array[begin:end])

    tensors = {name: tensor(name, array) for name, array in arrays.items()}
    return Source(Path("memory"), "hf", config, tensors, tokenizer)


def source(config: LlamaConfig = CONFIG, dtype: str = "float32", seed: int = 0, tokenizer: Any = None) -> Source:
    """Random weights."""
    random = np.random.RandomState(seed)
    arrays = {}
    for name, shape in expected_shapes(config).items():
        noise = random.randn(*shape)
        arrays[name] = (1 + 0.1 * noise if len(shape) == 1 else 0.2 * noise).astype(np.float32).astype(DTYPES[dtype])
    return in_memory(config, arrays, vocabulary(config.vocab_size) if tokenizer is None else tokenizer)


def make(form: str, source: Source, path: Path) -> Path:
    """Write ``source`` in one of `FORMS`. Returns the path to open."""
    if form in ("hf", "sharded"):
        save(hf_directory(source, max_shard_bytes=20_000 if form == "sharded" else 1 << 40), path)
    elif form.startswith("native"):
        from convert.quantize import quantised

        save(directory(quantised(source, form.removeprefix("native-"), 32)), path)
    elif form == "bin":
        save(hf_directory(source), path)
        (path / "model.safetensors").unlink()
        write_pth(path / "pytorch_model.bin", hf_arrays(source))
    elif form == "meta":
        write_meta(path, source, 1)
    elif form == "llama2c-1":
        path = path.with_suffix(".bin")
        write_version_1(path, source)
    elif form.startswith("llama2c"):
        path = path.with_suffix(".bin")
        save(llama2c(source, int8=form.endswith("2"), group=16), path)
    else:
        path = path.with_suffix(".gguf")
        save(gguf(source), path)
    return path


def hf_arrays(source: Source) -> dict[str, np.ndarray]:
    """All tensors under Hugging Face's names."""
    from jllama.formats.layout import hf_names

    return {theirs: source.tensors[ours].read() for ours, theirs in hf_names(source.config).items()}


def write_version_1(path: Path, source: Source) -> None:
    """Write llama2.c's version 1, which only tests need."""
    c = source.config
    numbers = (c.dim, c.hidden_dim, c.n_layers, c.n_heads, c.n_kv_heads, c.vocab_size, c.max_seq_len)
    head = struct.pack("<Ii7iB", MAGIC, 1, *numbers, c.tie_embeddings).ljust(HEADER_BYTES, b"\0")
    with open(path, "wb") as file:
        file.write(head)
        for place in plan(Header(1, c)):
            assert place.name is not None
            assert place.begin == file.tell()
            file.write(to_interleaved(source.tensors[place.name], c, place.name).read().astype(np.float32).tobytes())


def write_meta(path: Path, source: Source, shards: int) -> None:
    """Meta's release of a model."""
    path.mkdir()
    config = source.config
    for i in range(shards):
        part = {}
        for ours in expected_shapes(config):
            prefix, _, field = ours.rpartition(".")
            name = f"{prefix}.{LAYER[field]}.weight" if prefix else f"{MODEL[field]}.weight"
            array = to_interleaved(source.tensors[ours], config, ours).read()
            axis = None if array.ndim == 1 else 1 if field in (*BY_COLUMNS, "embed") else 0
            part[name] = array if axis is None else np.split(array, shards, axis)[i]
        write_pth(path / f"consolidated.{i:02}.pth", part)
    values = dict(dim=config.dim, n_heads=config.n_heads, n_kv_heads=config.n_kv_heads, n_layers=config.n_layers)
    text = ", ".join(f'"{k}": {v}' for k, v in (values | {"norm_eps": config.norm_eps, "vocab_size": -1}).items())
    (path / "params.json").write_text(f"{{{text}}}")


def text(value: str) -> bytes:
    """A pickled string."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def integer(value: int) -> bytes:
    """A pickled integer."""
    return b"J" + struct.pack("<i", value) if value < 1 << 31 else b"\x8a\x08" + struct.pack("<q", value)


def pickled_tensor(
    key: str, dtype: str, shape: tuple[int, ...], size: int, offset: int = 0, strides: Any = None
) -> bytes:
    """A tensor as torch pickles it."""
    if strides is None:
        strides = [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
    storage = text("storage") + f"ctorch\n{STORAGES[dtype]}\n".encode() + text(key) + text("cpu") + integer(size)
    numbers = [b"(" + b"".join(integer(n) for n in values) + b"t" for values in (shape, strides)]
    hooks = b"ccollections\nOrderedDict\n)R"
    arguments = b"(" + storage + b"tQ" + integer(offset) + b"".join(numbers) + b"\x89" + hooks
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


def write_pth(path: Path, arrays: Mapping[str, np.ndarray], pickle: bytes | None = None) -> None:
    """A file as torch.save writes it. ``pickle`` replaces its pickle."""
    items = [
        text(name) + pickled_tensor(str(i), str(array.dtype), array.shape, array.size)
        for i, (name, array) in enumerate(arrays.items())
    ]
    own = b"\x80\x02}q\x00(" + b"".join(items) + b"u."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", own if pickle is None else pickle)
        archive.writestr("archive/byteorder", "little")
        for i, array in enumerate(arrays.values()):
            archive.writestr(f"archive/data/{i}", np.ascontiguousarray(array).tobytes())
        archive.writestr("archive/version", "3\n")


def assert_same_tensors(a: Source, b: Source) -> None:
    """Whether two sources are equal, bit for bit as floats."""
    assert expected_shapes(a.config) == expected_shapes(b.config)
    for name in expected_shapes(a.config):
        one, other = (s.tensors[name].floats(0, s.tensors[name].shape[0]) for s in (a, b))
        np.testing.assert_array_equal(np.float32(one), np.float32(other), err_msg=name)


def refused(path: Path, *parts: str, opened: Callable[[Path], Any] = open_source) -> None:
    """Whether opening ``path`` ends in one line with these parts, and took little memory."""
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

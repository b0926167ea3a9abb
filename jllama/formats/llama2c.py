"""llama2.c's ``.bin`` files. Version 0 is seven integers and then floats. Version 1 has a header with a magic number.
Version 2 has int8 weights with scales.

``plan`` gives the order and offsets of the tensors, for reading and for writing.
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jllama.config import Fields, LlamaConfig
from jllama.errors import InputError
from jllama.formats.files import MappedFile, first_of, inside
from jllama.formats.layout import expected_shapes
from jllama.formats.source import Integers, Quantization, Source, Tensor, config_at
from jllama.formats.transform import from_interleaved

MAGIC = 0x616B3432
HEADER_BYTES = 256  # of versions 1 and 2
FIELDS = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "seq_len")
MODEL_NAME = "model.bin"  # in a directory of this format
_MATRICES = ("wq", "wk", "wv", "wo", "w_gate", "w_down", "w_up")
_FLOAT = np.dtype(np.float32)


@dataclass(frozen=True)
class Header:
    """The header of a file."""

    version: int
    config: LlamaConfig
    group: int = 0  # version 2: number of values that share a scale


@dataclass(frozen=True)
class Place:
    """The position of a tensor in the file. ``name`` is None for data that readers skip. If ``group`` is not 0, the
    tensor is quantised, and its scales follow its integers."""

    name: str | None
    shape: tuple[int, ...]
    begin: int
    group: int = 0

    @property
    def nbytes(self) -> int:
        """Size in bytes, including the scales."""
        size = math.prod(self.shape)
        return size + 4 * (size // self.group) if self.group else 4 * size


def recognise(path: Path) -> bool:
    """Whether ``path`` is such a file, or a directory with one named ``model.bin``."""
    return (path / MODEL_NAME).exists() if path.is_dir() else path.suffix == ".bin"


def plan(header: Header) -> Iterator[Place]:
    """All tensors of a file with this header, in file order."""
    config, at = header.config, HEADER_BYTES if header.version else 4 * len(FIELDS)
    shapes: dict[str | None, tuple[int, ...]] = {**expected_shapes(config)}
    shapes[None] = (config.max_seq_len, config.head_dim // 2)
    for name in _order(header.version, config):
        matrix = name is not None and not name.endswith("norm")
        place = Place(name, shapes[name], at, header.group if matrix else 0)
        yield place
        at += place.nbytes


def _order(version: int, config: LlamaConfig) -> list[str | None]:
    def all_layers(*fields: str) -> list[str | None]:
        return [f"layers.{i}.{field}" for field in fields for i in range(config.n_layers)]

    head: list[str | None] = [] if config.tie_embeddings else ["lm_head"]
    if version == 0:  # the two None are the rotary tables
        attention = all_layers("attn_norm", "wq", "wk", "wv", "wo")
        return ["embed", *attention, *all_layers("ffn_norm", "w_gate", "w_down", "w_up"), "norm", None, None, *head]
    return [*all_layers("attn_norm", "ffn_norm"), "norm", "embed", *all_layers(*_MATRICES), *head]


def open_llama2c(path: Path, *, links: bool = False) -> Source:
    """Open a ``.bin`` file. Its tokenizer is ``tokenizer.bin`` or ``tokenizer.model`` in the same directory."""
    directory = path if path.is_dir() else path.parent
    file = MappedFile(inside(path, MODEL_NAME, path, links=links) if path.is_dir() else path)
    header = read_header(file)
    places = list(plan(header))
    size = places[-1].begin + places[-1].nbytes
    if size != file.size:
        raise InputError(f"{file.path}: expected {size} bytes for version {header.version}, found {file.size}")
    tensors = {
        place.name: from_interleaved(_tensor(file, place), header.config, place.name) for place in places if place.name
    }
    tokenizer = first_of(directory, ("tokenizer.bin", "tokenizer.model"), links=links)
    return Source(path, "llama2c", header.config, tensors, tokenizer, links=links)


def read_header(file: MappedFile) -> Header:
    """Read and check the header of any version."""
    if file.size < HEADER_BYTES:
        raise InputError(f"{file.path}: expected a llama2.c model, found {file.size} bytes (cut off?)")
    start = file.bytes(0, HEADER_BYTES)
    magic, version = struct.unpack_from("<Ii", start)
    if magic != MAGIC:
        numbers = struct.unpack_from("<7i", start)
        # In version 0, a positive vocab_size means that the head is tied to the embedding.
        return Header(0, _config(file, (*numbers[:5], abs(numbers[5]), numbers[6]), tied=numbers[5] > 0))
    if version not in (1, 2):
        raise InputError(f"{file.path}: version: expected 1 or 2, found {version}")
    *numbers, tied, group = struct.unpack_from("<7iBi", start, 8)
    if tied not in (0, 1):
        raise InputError(f"{file.path}: shared classifier: expected 0 or 1, found {tied}")
    config = _config(file, tuple(numbers), tied=tied == 1)
    if version == 1:
        return Header(1, config)
    sizes = [math.prod(shape) for shape in expected_shapes(config).values() if len(shape) == 2]
    if group < 1 or any(size % group for size in sizes):
        raise InputError(f"{file.path}: group size: expected a divisor of every weight's size, found {group}")
    return Header(2, config, group)


def _config(file: MappedFile, numbers: tuple[int, ...], tied: bool) -> LlamaConfig:
    fields = Fields(str(file.path), dict(zip(FIELDS, numbers, strict=True)))
    return config_at(
        str(file.path),
        dim=fields.integer("dim", high=1 << 20),
        hidden_dim=fields.integer("hidden_dim"),
        n_layers=fields.integer("n_layers", high=4096),
        n_heads=fields.integer("n_heads", high=4096),
        n_kv_heads=fields.integer("n_kv_heads", high=4096),
        vocab_size=fields.integer("vocab_size"),
        max_seq_len=fields.integer("seq_len"),
        tie_embeddings=tied,
    )


def _tensor(file: MappedFile, place: Place) -> Tensor:
    where = f"{file.path}: {place.name}"
    if not place.group:
        return Tensor(place.shape, "float32", where, lambda b, e: file.view(_FLOAT, place.shape, place.begin)[b:e])
    size, width = math.prod(place.shape), place.shape[1]
    data = file.view(np.dtype(np.int8), place.shape, place.begin)
    scale = file.view(_FLOAT, (size // place.group,), place.begin + size)

    if width % place.group:  # `Integers` has no groups that cross the end of a row, so these are read as floats

        def floats(begin: int, end: int) -> np.ndarray:
            scales = scale[np.arange(begin * width, end * width) // place.group]
            with np.errstate(all="ignore"):  # a damaged scale may overflow; writers count values that are not finite
                return (data[begin:end].reshape(-1) * scales).reshape(end - begin, width)

        return Tensor(place.shape, "float32", where, floats)

    def rows(begin: int, end: int) -> Any:
        return Integers(data[begin:end], scale.reshape(place.shape[0], -1)[begin:end])

    group = None if width == place.group else place.group
    return Tensor(place.shape, "float32", where, rows, Quantization("int8", group))

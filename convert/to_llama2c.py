"""Writes llama2.c's formats version 0 (float32) and version 2 (int8), as llama2.c's export.py does."""

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jllama.config import LlamaConfig
from jllama.errors import InputError
from jllama.formats.layout import expected_shapes
from jllama.formats.llama2c import FIELDS, HEADER_BYTES, MAGIC, MODEL_NAME, Header, Place, plan
from jllama.formats.native import Export
from jllama.formats.output import OutputFile, Watch
from jllama.formats.replaceable import LLAMA2C, LLAMA2C_DIRECTORY
from jllama.formats.source import Integers, Source, Tensor
from jllama.formats.transform import as_dtype, to_interleaved
from jllama.formats.vocabulary import padded, to_llama2c, vocabulary_of

DEFAULT_GROUP = 64


def llama2c(source: Source, *, int8: bool = False, group: int | None = None, directory: bool = False) -> Export:
    """An export to a ``.bin`` file, or with ``directory`` to a directory with ``model.bin`` and ``tokenizer.bin``.

    ``int8`` selects version 2, with one scale per ``group`` values. int8 weights of the source are kept if their groups
    can be represented. All other weights are rounded as by llama2.c's export.py.
    """
    _check(source)
    header = Header(2, source.config, _group(source, group)) if int8 else Header(0, source.config)
    places = list(plan(header))
    vocabulary = vocabulary_of(source.tokenizer) if directory else None

    def write(path: Path, watch: Watch) -> None:
        if directory:
            path.mkdir()
        with OutputFile(path / MODEL_NAME if directory else path, watch) as file:
            file.put(0, _header_bytes(header))
            rotary = _rotary_tables(source.config)
            for place in places:
                _put(file, place, source, rotary, watch)
        if vocabulary is not None:
            with OutputFile(path / "tokenizer.bin", Watch()) as file:
                file.put(0, to_llama2c(padded(vocabulary, source.config.vocab_size)))

    form = LLAMA2C_DIRECTORY if directory else LLAMA2C
    return Export(places[-1].begin + places[-1].nbytes, write, form)


def _check(source: Source) -> None:
    """Raise `InputError` if a setting that the format cannot store differs from the value that llama2.c assumes."""
    config = source.config
    fixed: dict[str, tuple[Any, Any]] = {
        "rope_theta": (config.rope_theta, 10000.0),
        "rope_scaling": (config.rope_scaling, None),
        "norm_eps": (config.norm_eps, 1e-5),
        "attention_bias": (config.attention_bias, False),
        "mlp_bias": (config.mlp_bias, False),
        "head_dim": (config.head_dim * config.n_heads, config.dim),
    }
    for name, (found, expected) in fixed.items():
        if found != expected:
            raise InputError(f"{source.path}: {name}: llama2.c knows only {expected}, found {found}")


def _group(source: Source, wanted: int | None) -> int:
    config, quant = source.config, source.quant
    if wanted is None and quant is not None and quant.format == "int8" and quant.group is not None:
        wanted = quant.group
    group = wanted or DEFAULT_GROUP
    # llama2.c's runq processes whole groups of every row, so the group size must divide all widths.
    while any(shape[-1] % group for shape in expected_shapes(config).values()):
        group //= 2
    return group


def _header_bytes(header: Header) -> bytes:
    config = header.config
    values = dict(
        dim=config.dim,
        hidden_dim=config.hidden_dim,
        n_layers=config.n_layers,
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        vocab_size=config.vocab_size,
        seq_len=config.max_seq_len,
    )
    if header.version == 0:
        values["vocab_size"] *= 1 if config.tie_embeddings else -1
        return struct.pack("<7i", *(values[name] for name in FIELDS))
    numbers = struct.pack("<7i", *(values[name] for name in FIELDS))
    start = struct.pack("<Ii", MAGIC, 2) + numbers + struct.pack("<Bi", config.tie_embeddings, header.group)
    return start.ljust(HEADER_BYTES, b"\0")


def _put(file: OutputFile, place: Place, source: Source, rotary: Iterator[np.ndarray], watch: Watch) -> None:
    if place.name is None:
        file.put(place.begin, next(rotary))
        return
    tensor = to_interleaved(source.tensors[place.name], source.config, place.name)
    if not place.group:
        file.put_floats(place.begin, as_dtype(tensor, "float32"))
        return
    width, size = place.shape[1], math.prod(place.shape)
    for begin, end in tensor.blocks():
        rows = _integers(tensor, begin, end, place.group)
        watch.look(tensor.where, rows.scale)
        file.put(place.begin + begin * width, rows.data)
        file.put(place.begin + size + 4 * (begin * width // place.group), rows.scale)


def _integers(tensor: Tensor, begin: int, end: int, group: int) -> Integers:
    """Rows as integers with one float32 scale per group. The tensor's own integers are used if possible; otherwise the
    floats are rounded again."""
    if tensor.quant is not None and tensor.quant.format == "int8":
        rows = tensor.rows(begin, end)
        own = rows.data.shape[1] // rows.scale.shape[1]
        if own % group == 0:  # the scale of a longer group is repeated
            return Integers(rows.data, np.repeat(rows.scale.astype(np.float32), own // group, axis=1))
    floats = tensor.floats(begin, end).astype(np.float32)
    return round_to_int8(floats, group)


def round_to_int8(rows: np.ndarray, group: int) -> Integers:
    """The rounding of llama2.c's export.py: the value with the largest magnitude in a group becomes ±127."""
    blocks = rows.reshape(rows.shape[0], -1, group)
    scale = np.abs(blocks).max(axis=-1) / np.float32(127)
    with np.errstate(all="ignore"):  # NaN weights make the scale NaN; writers count it
        data = np.round(blocks / np.where(scale == 0, np.float32(1), scale)[..., None])
        return Integers(data.astype(np.int8).reshape(rows.shape), scale)


def _rotary_tables(config: LlamaConfig) -> Iterator[np.ndarray]:
    """The cosines and sines that version 0 contains and readers skip."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = (1.0 / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    angles = np.outer(np.arange(config.max_seq_len, dtype=np.float32), frequencies)
    yield np.cos(angles)
    yield np.sin(angles)

"""Writes directories in the Hugging Face layout, including native ones, in shards and tensor by tensor."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jllama.config import to_hf
from jllama.errors import InputError
from jllama.formats.bpe import BpeVocabulary
from jllama.formats.files import MappedFile
from jllama.formats.hf import BITS, pack_int4
from jllama.formats.layout import hf_names
from jllama.formats.output import OutputFile, Watch
from jllama.formats.replaceable import HF, WRITER, Form
from jllama.formats.safetensors_file import Entry, layout
from jllama.formats.source import DTYPES, Source, Tensor
from jllama.formats.staging import staged
from jllama.formats.transform import as_floats
from jllama.formats.vocabulary import Vocabulary, from_llama2c

MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Export:
    """An output that was checked and can be written: its size, the function that writes it, and its form."""

    nbytes: int
    write: Callable[[Path, Watch], None]
    form: Form


def save(
    export: Export, dst: Path, *, reads: Sequence[Path] = (), force: bool = False, watch: Watch | None = None
) -> None:
    """Write an export to ``dst``, completely or not at all. ``reads`` are the paths of the checkpoint that is read."""
    watch = watch or Watch()
    with staged(dst, export.nbytes, export.form, reads=reads, force=force) as path:
        export.write(path, watch)


@dataclass(frozen=True)
class _Shard:
    name: str
    head: bytes
    entries: dict[str, Entry]
    tensors: list[str]  # our names

    @property
    def nbytes(self) -> int:
        return len(self.head) + sum(entry.nbytes for entry in self.entries.values())


def directory(source: Source, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> Export:
    """A native directory: the Hugging Face layout, with quantised weights as integers and scales."""
    names = hf_names(source.config)
    shards = _shards(source, names, max_shard_bytes)
    return Export(sum(s.nbytes for s in shards), lambda path, watch: _write(source, names, shards, path, watch), HF)


def hf_directory(source: Source, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> Export:
    """A directory that transformers can read. Quantised weights become floats."""
    return directory(as_floats(source), max_shard_bytes=max_shard_bytes)


def _stored(tensor: Tensor, name: str) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """The arrays of a tensor in the file (name -> dtype and shape): one array, or integers and scales."""
    if tensor.quant is None:
        return {name: (DTYPES[tensor.dtype], tensor.shape)}
    out, width = tensor.shape
    groups = width // (tensor.quant.group or width)
    four = tensor.quant.format == "int4"
    if four and width % 2:
        raise InputError(f"{tensor.where}: shape: expected an even width for 4-bit values, found {width}")
    data = (np.dtype(np.uint8), (out, width // 2)) if four else (np.dtype(np.int8), (out, width))
    return {name: data, f"{name}_scale": (DTYPES[tensor.dtype], (out, groups))}


def _shards(source: Source, names: dict[str, str], limit: int) -> list[_Shard]:
    groups: list[tuple[list[str], dict[str, Any]]] = [([], {})]
    room = limit
    for ours, theirs in names.items():
        arrays = _stored(source.tensors[ours], theirs)
        size = sum(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize for dtype, shape in arrays.values())
        if size > room and groups[-1][0]:
            groups.append(([], {}))
            room = limit
        room -= size
        groups[-1][0].append(ours)
        groups[-1][1].update(arrays)
    total = len(groups)
    file = "model.safetensors" if total == 1 else "model-{:05}-of-{:05}.safetensors"
    return [_Shard(file.format(i, total), *layout(arrays), tensors) for i, (tensors, arrays) in enumerate(groups, 1)]


def _write(source: Source, names: dict[str, str], shards: list[_Shard], path: Path, watch: Watch) -> None:
    path.mkdir()
    for shard in shards:
        with OutputFile(path / shard.name, watch) as file:
            file.put(0, shard.head)
            for ours in shard.tensors:
                _put(file, shard.entries, names[ours], source.tensors[ours], watch)
    if len(shards) > 1:
        weight_map = {name: shard.name for shard in shards for name in shard.entries}
        index = {"metadata": {"total_size": sum(s.nbytes - len(s.head) for s in shards)}, "weight_map": weight_map}
        _put_json(path / "model.safetensors.index.json", index)
    for name, content in _small_files(source):
        with OutputFile(path / name, Watch()) as file:
            file.put(0, content)
    # config.json is written last, because its presence makes the directory a checkpoint.
    _put_json(path / "config.json", _config(source))


def _put(file: OutputFile, entries: dict[str, Entry], name: str, tensor: Tensor, watch: Watch) -> None:
    entry = entries[name]
    if tensor.quant is None:
        file.put_floats(entry.begin, tensor)
        return
    scales = entries[f"{name}_scale"]
    for begin, end in tensor.blocks():
        rows = tensor.rows(begin, end)
        watch.look(tensor.where, rows.scale)
        data = rows.data if tensor.quant.format == "int8" else pack_int4(rows.data)
        file.put(entry.begin + begin * entry.nbytes // entry.shape[0], data)
        file.put(scales.begin + begin * scales.nbytes // scales.shape[0], rows.scale)


def _config(source: Source) -> dict[str, Any]:
    values = to_hf(source.config, source.dtype if source.quant is None else "float32") | dict([WRITER])
    quants = [tensor.quant for tensor in source.tensors.values() if tensor.quant]
    if quants:
        quant = source.quant or quants[0]
        bits = BITS[quant.format]
        values["quantization_config"] = {"quant_method": "jllama", "bits": bits, "group_size": quant.group}
    return values


def _put_json(path: Path, values: dict[str, Any]) -> None:
    with OutputFile(path, Watch()) as file:
        file.put(0, (json.dumps(values, indent=2) + "\n").encode())


def _small_files(source: Source) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the tokenizer and of the other small files."""
    tokenizer = source.tokenizer
    extras = {path.name: path for path in source.extras}
    if isinstance(tokenizer, Path) and tokenizer.suffix == ".bin":
        tokenizer = from_llama2c(tokenizer)
    if isinstance(tokenizer, Vocabulary):
        yield "tokenizer.model", tokenizer.model_bytes()
    elif isinstance(tokenizer, BpeVocabulary):
        yield "tokenizer.json", tokenizer.tokenizer_json()
    elif tokenizer is not None:
        # If another tokenizer replaces the source's own, no file of the old one may remain beside it.
        if tokenizer.parent != source.path:
            extras = (
                {"generation_config.json": extras["generation_config.json"]}
                if "generation_config.json" in extras
                else {}
            )
        extras["tokenizer.json" if tokenizer.suffix == ".json" else "tokenizer.model"] = tokenizer
    if isinstance(template := source.metadata.get("tokenizer.chat_template"), str):
        yield "chat_template.jinja", template.encode()
    for name, path in extras.items():
        file = MappedFile(path)
        yield name, file.bytes(0, file.size)

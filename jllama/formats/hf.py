"""Hugging Face directories and native directories.

A native directory has the layout of a Hugging Face directory. If its weights are quantised, its ``config.json`` has the
entry ``quantization_config: {"quant_method": "jllama", "bits": 8 | 4, "group_size": n | null}``. A quantised weight is
I8, or U8 with two 4-bit values per byte, the first in the low nibble. Its scales are ``NAME.weight_scale`` beside
``NAME.weight``. A single tensor may have other bits and groups than the entry: the dtype of the tensor and the shape of
its scales decide.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jllama.config import Fields, LlamaConfig, Quant, from_hf, read_json
from jllama.errors import InputError
from jllama.formats.files import first_of, inside, label
from jllama.formats.layout import hf_names
from jllama.formats.pth import PthFile
from jllama.formats.safetensors_file import SafetensorsFile
from jllama.formats.source import DTYPES, Integers, Quantization, Source, Tensor, scales_of

TOKENIZERS = ("tokenizer.model", "tokenizer.json", "tokenizer.bin")
EXTRAS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
BIAS = "_proj.bias"
MAX_SHARDS = 4096
BITS: dict[Quant, int] = {"int8": 8, "int4": 4}  # how ``quantization_config`` names the formats
_FORMATS: dict[str, Quant] = {"int8": "int8", "uint8": "int4"}  # of a quantised tensor, by its dtype in the file


class TensorFile(Protocol):
    """What safetensors and torch files have in common."""

    path: Path

    @property
    def entries(self) -> Mapping[str, Any]:
        """Name -> something with dtype and shape."""
        ...

    def array(self, name: str) -> np.ndarray:
        """The tensor as a view of the file."""
        ...


def recognise(path: Path) -> bool:
    """Whether ``path`` is a directory in this layout."""
    return path.is_dir() and (path / "config.json").exists()


def open_hf(path: Path, *, links: bool = False) -> Source:
    """Open ``path``, a directory with config.json and weights, in one file or in shards with an index."""
    file = functools.partial(inside, path, links=links)
    where = file("config.json", path)
    values = read_json(where)
    config = _with_eos_ids(from_hf(values, str(where)), first_of(path, ("generation_config.json",), links=links))
    quant = _quantization(values.get("quantization_config"), str(where))
    files = _files(path, file)
    names = hf_names(config)
    known = set(names.values())
    if bias := next((name for name in files if name.endswith(BIAS) and name not in known), None):
        flags = f"attention_bias {config.attention_bias} and mlp_bias {config.mlp_bias}".lower()
        raise InputError(f"{files[bias].path}: {label(bias)}: expected no such bias ({flags} in {where}), found one")
    tensors = {}
    for ours, theirs in names.items():
        if theirs in files:
            tensors[ours] = _tensor(files, theirs, quant)
    extras = tuple(file(name, path) for name in EXTRAS if (path / name).is_file())
    # If tokens were added after the training of the tokenizer, only tokenizer.json contains them.
    added = (path / "added_tokens.json").exists()
    tokenizer = first_of(path, ("tokenizer.json", *TOKENIZERS) if added else TOKENIZERS, links=links)
    return Source(path, "native" if quant else "hf", config, tensors, tokenizer, extras, links=links)


def _with_eos_ids(config: LlamaConfig, file: Path | None) -> LlamaConfig:
    """The config with the end-of-sequence ids of ``generation_config.json`` added. For a chat model, they include the
    token that ends a turn."""
    if file is None:
        return config
    ends = Fields(str(file), read_json(file)).ids("eos_token_id", config.eos_ids, config.vocab_size)
    return config.replace(eos_ids=tuple(dict.fromkeys([*config.eos_ids, *ends])))


def _files(path: Path, file: Callable[[str, Path], Path]) -> dict[str, TensorFile]:
    """Tensor name -> the mapped file that holds it."""
    kinds = (("model.safetensors", SafetensorsFile), ("pytorch_model.bin", PthFile))
    for name, kind in kinds:
        index = path / f"{name}.index.json"
        if index.exists():
            return _merged([kind(file(shard, index)) for shard in _shards(file(index.name, path))])
        if (path / name).exists():
            return _merged([kind(file(name, path))])
    names = " or ".join(name for name, _ in kinds)
    raise InputError(f"{path}: expected {names}, or an index of shards, found neither")


def _merged(files: list[Any]) -> dict[str, TensorFile]:
    merged: dict[str, TensorFile] = {}
    for file in files:
        for tensor in file.entries:
            if tensor in merged:
                raise InputError(f"{file.path}: {tensor}: is also in {merged[tensor].path.name}")
            merged[tensor] = file
    return merged


def _shards(index: Path) -> list[str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index}: weight_map: expected an object of file names, found {type(weight_map).__name__}")
    names = sorted(set(weight_map.values()))
    if len(names) > MAX_SHARDS:
        raise InputError(f"{index}: weight_map: expected at most {MAX_SHARDS} files, found {len(names)}")
    return names


def _quantization(value: Any, where: str) -> Quantization | None:
    if value is None:
        return None
    field = f"{where}: quantization_config"
    if not isinstance(value, dict) or value.get("quant_method") != "jllama":
        method = value.get("quant_method") if isinstance(value, dict) else value
        raise InputError(
            f"{field}: expected quant_method 'jllama' (or unquantised weights), found {str(method)[:60]!r}"
        )
    bits, group = value.get("bits"), value.get("group_size")
    formats: dict[int, Quant] = {bits: form for form, bits in BITS.items()}
    if type(bits) is not int or bits not in formats:
        raise InputError(f"{field}: bits: expected 4 or 8, found {str(bits)[:60]!r}")
    if group is not None and (type(group) is not int or not 1 <= group <= 1 << 20):
        raise InputError(f"{field}: group_size: expected null or a positive integer, found {str(group)[:60]!r}")
    return Quantization(formats[bits], group)


def _tensor(files: dict[str, TensorFile], name: str, quant: Quantization | None) -> Tensor:
    file = files[name]
    entry = file.entries[name]
    where, dtype = f"{file.path}: {name}", str(entry.dtype)
    if dtype in DTYPES:
        return Tensor(entry.shape, dtype, where, lambda begin, end: file.array(name)[begin:end])
    form = _FORMATS.get(dtype)
    if quant is None or form is None:
        raise InputError(f"{where}: dtype: expected one of {', '.join(DTYPES)}, found {dtype}")
    return _quantized(files, name, where, form)


def _quantized(files: dict[str, TensorFile], name: str, where: str, form: Quant) -> Tensor:
    file, scale_name = files[name], f"{name}_scale"
    if scale_name not in files:
        raise InputError(f"{where}: quantised, but {scale_name} is missing")
    scales = files[scale_name]
    stored, scale = file.entries[name].shape, scales.entries[scale_name]
    if len(stored) != 2:
        raise InputError(f"{where}: shape: expected two dimensions, found {list(stored)}")
    shape = stored if form == "int8" else (stored[0], 2 * stored[1])
    # A group size that does not divide the row was reduced when the file was written. So it is computed from the number
    # of scales per row.
    if len(scale.shape) != 2 or scale.shape[0] != shape[0] or shape[1] % scale.shape[1]:
        found = list(scale.shape)
        raise InputError(f"{scales.path}: {scale_name}: shape: expected [{shape[0]}, groups], found {found}")
    if str(scale.dtype) not in ("float32", "float16"):
        raise InputError(f"{scales.path}: {scale_name}: dtype: expected float32 or float16, found {scale.dtype}")

    def rows(begin: int, end: int) -> Integers:
        data = file.array(name)[begin:end]
        return Integers(data if form == "int8" else unpack_int4(data), scales.array(scale_name)[begin:end])

    def columns(begin: int, end: int, left: int, right: int) -> Integers:
        scale = scales.array(scale_name)[begin:end]
        data = file.array(name)[begin:end, left // 2 : (right + 1) // 2]
        data = unpack_int4(data)[:, left % 2 : left % 2 + right - left]
        return Integers(data, scale[:, scales_of(scale.shape[1], shape[1], left, right)])

    group = None if scale.shape[1] == 1 else shape[1] // scale.shape[1]
    quant = Quantization(form, group)
    return Tensor(shape, str(scale.dtype), where, rows, quant, None if form == "int8" else columns)


def unpack_int4(packed: np.ndarray) -> np.ndarray:
    """Unpack bytes [out, in / 2] to int8 [out, in]. The low nibble of a byte is the first value."""
    out = np.empty((packed.shape[0], 2 * packed.shape[1]), np.int8)
    out[:, ::2] = (packed << 4).view(np.int8) >> 4
    out[:, 1::2] = packed.view(np.int8) >> 4
    return out


def pack_int4(data: np.ndarray) -> np.ndarray:
    """The reverse of `unpack_int4`."""
    nibbles = data.view(np.uint8) & 0xF
    return nibbles[:, ::2] | (nibbles[:, 1::2] << 4)

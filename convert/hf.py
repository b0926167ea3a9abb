"""Hugging Face directories, and our native ones: the same layout, to which quantised weights add scales.

A native directory *is* a Hugging Face directory. Quantised, its ``config.json`` says ``quantization_config:
{"quant_method": "jllama", "bits": 8 | 4, "group_size": n | null}``, a weight is I8 (or U8 with two 4-bit values a
byte, the first in the low half), and beside ``NAME.weight`` stands ``NAME.weight_scale``.
"""

from pathlib import Path
from typing import Any

import numpy as np

from convert.layout import hf_names
from convert.safetensors_file import SafetensorsFile
from convert.source import Integers, Quantization, Source, Tensor
from jllama.config import from_hf, read_json
from jllama.errors import InputError

FLOATS = ("float32", "bfloat16", "float16")
TOKENIZERS = ("tokenizer.model", "tokenizer.json")


def recognise(path: Path) -> bool:
    """Whether this is a directory of that layout."""
    return path.is_dir() and (path / "config.json").exists()


def open_hf(path: Path) -> Source:
    """Open ``path``, a directory with config.json and safetensors (one file, or shards with an index)."""
    values = read_json(path / "config.json")
    config = from_hf(values, str(path / "config.json"))
    quant = _quantization(values.get("quantization_config"), str(path / "config.json"))
    files = _files(path)
    tensors = {}
    for ours, theirs in hf_names(config).items():
        if theirs in files:
            tensors[ours] = _tensor(files, theirs, quant)
    tokenizer = next(
        (path / name for name in TOKENIZERS if (path / name).exists()), None
    )
    return Source(path, "native" if quant else "hf", config, tensors, tokenizer)


def _files(path: Path) -> dict[str, SafetensorsFile]:
    """Tensor name -> the mapped file that holds it."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        names = _shards(index)
    elif (path / "model.safetensors").exists():
        names = ["model.safetensors"]
    else:
        raise InputError(
            f"{path}: expected model.safetensors or model.safetensors.index.json, found neither"
        )
    files: dict[str, SafetensorsFile] = {}
    for name in names:
        file = SafetensorsFile(inside(path, name, index))
        for tensor in file.entries:
            if tensor in files:
                raise InputError(
                    f"{file.path}: {tensor}: is also in {files[tensor].path.name}"
                )
            files[tensor] = file
    return files


def _shards(index: Path) -> list[str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) for name in weight_map.values()
    ):
        raise InputError(
            f"{index}: weight_map: expected an object of file names, found {type(weight_map).__name__}"
        )
    names = sorted(set(weight_map.values()))
    if len(names) > 4096:
        raise InputError(
            f"{index}: weight_map: expected at most 4096 files, found {len(names)}"
        )
    return names


def inside(directory: Path, name: str, where: Path) -> Path:
    """The file ``name`` of ``directory``, which a stranger's file mentions: refused if it lies anywhere else."""
    if "/" in name or "\\" in name or "\0" in name or name in ("", ".", ".."):
        raise InputError(
            f"{where}: file name: expected one inside the directory, found {name[:80]!r}"
        )
    return directory / name


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
    if bits not in (4, 8):
        raise InputError(f"{field}: bits: expected 4 or 8, found {str(bits)[:60]!r}")
    if group is not None and (type(group) is not int or not 1 <= group <= 1 << 20):
        raise InputError(
            f"{field}: group_size: expected null or a positive integer, found {str(group)[:60]!r}"
        )
    return Quantization(bits, group)


def _tensor(
    files: dict[str, SafetensorsFile], name: str, quant: Quantization | None
) -> Tensor:
    file = files[name]
    entry = file.entries[name]
    where = f"{file.path}: {name}"
    if str(entry.dtype) in FLOATS:
        return Tensor(entry.shape, str(entry.dtype), where, lambda: file.array(name))
    if quant is None or str(entry.dtype) != {8: "int8", 4: "uint8"}[quant.bits]:
        raise InputError(
            f"{where}: dtype: expected one of {', '.join(FLOATS)}, found {entry.dtype}"
        )
    return _quantized(files, name, where, quant)


def _quantized(
    files: dict[str, SafetensorsFile], name: str, where: str, quant: Quantization
) -> Tensor:
    file, scale_name = files[name], f"{name}_scale"
    if scale_name not in files:
        raise InputError(f"{where}: quantised, but {scale_name} is missing")
    scales = files[scale_name]
    stored, scale = file.entries[name].shape, scales.entries[scale_name]
    if len(stored) != 2:
        raise InputError(
            f"{where}: shape: expected two dimensions, found {list(stored)}"
        )
    shape = stored if quant.bits == 8 else (stored[0], 2 * stored[1])
    # A group that does not divide a row was narrowed when it was written: the scale's width says to what.
    if len(scale.shape) != 2 or scale.shape[0] != shape[0] or shape[1] % scale.shape[1]:
        raise InputError(
            f"{scales.path}: {scale_name}: shape: expected [{shape[0]}, groups], found {list(scale.shape)}"
        )
    if str(scale.dtype) not in ("float32", "float16"):
        raise InputError(
            f"{scales.path}: {scale_name}: dtype: expected float32 or float16, found {scale.dtype}"
        )

    def read() -> Integers:
        data = file.array(name)
        return Integers(
            data if quant.bits == 8 else unpack_int4(data), scales.array(scale_name)
        )

    group = None if scale.shape[1] == 1 else shape[1] // scale.shape[1]
    return Tensor(shape, str(scale.dtype), where, read, Quantization(quant.bits, group))


def unpack_int4(packed: np.ndarray) -> np.ndarray:
    """[out, in / 2] bytes -> [out, in] int8: the low half of a byte comes first."""
    low = (packed << 4).view(np.int8) >> 4
    high = packed.view(np.int8) >> 4
    return np.stack([low, high], axis=-1).reshape(packed.shape[0], -1)


def pack_int4(data: np.ndarray) -> np.ndarray:
    """The reverse of `unpack_int4`."""
    nibbles = data.view(np.uint8) & 0xF
    return nibbles[:, ::2] | (nibbles[:, 1::2] << 4)

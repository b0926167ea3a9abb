"""Lazy transformations of tensors: permuted rows, other dtypes, joined shards. They are computed when a tensor is
read."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jllama.config import LlamaConfig
from jllama.formats.layout import BIASES
from jllama.formats.source import DTYPES, Integers, Source, Tensor


def half_split(config: LlamaConfig, name: str) -> np.ndarray | None:
    """For wq, wk and their biases, where each row of the half-split rotary order lies in the interleaved one; None for
    the rest.

    Meta, llama2.c and GGUF rotate adjacent rows of a head as pairs: (0, 1), (2, 3) and so on. Hugging Face and this
    library rotate row j with row j + head_dim / 2. The weights are the same with their rows permuted.
    """
    field = name.rpartition(".")[2]
    heads = {"wq": config.n_heads, "wk": config.n_kv_heads}.get(BIASES.get(field, field))
    if heads is None:
        return None
    rows = np.arange(heads * config.head_dim).reshape(heads, config.head_dim // 2, 2)
    return rows.swapaxes(1, 2).reshape(-1)


def from_interleaved(tensor: Tensor, config: LlamaConfig, name: str) -> Tensor:
    """Convert a tensor from the interleaved to the half-split order."""
    index = half_split(config, name)
    return tensor if index is None or tensor.shape[0] != len(index) else permuted(tensor, index)


def to_interleaved(tensor: Tensor, config: LlamaConfig, name: str) -> Tensor:
    """The inverse of `from_interleaved`."""
    index = half_split(config, name)
    return tensor if index is None else permuted(tensor, np.argsort(index))


def permuted(tensor: Tensor, index: np.ndarray) -> Tensor:
    """The tensor with its rows permuted: row i of the result is row ``index[i]``. A read covers the range between the
    smallest and the largest index, so it is cheap if rows only move within a head."""

    def rows(begin: int, end: int) -> Any:
        chosen = index[begin:end]
        low = int(chosen.min())
        part = tensor.rows(low, int(chosen.max()) + 1)
        if isinstance(part, Integers):
            return Integers(part.data[chosen - low], part.scale[chosen - low])
        return part[chosen - low]

    return dataclasses.replace(tensor, rows=rows, columns=None)


def joined(tensors: Sequence[Tensor], axis: int) -> Tensor:
    """The shards of a float tensor, concatenated along ``axis`` 0 or 1."""
    first = tensors[0]
    if len(tensors) == 1:
        return first
    shape = list(first.shape)
    shape[axis] = sum(tensor.shape[axis] for tensor in tensors)
    ends = np.cumsum([tensor.shape[axis] for tensor in tensors])
    if axis == 1:

        def columns(begin: int, end: int, left: int, right: int) -> np.ndarray:
            parts = [
                tensor.part(begin, end, max(left - at, 0), min(right - at, tensor.shape[1]))
                for tensor, at in zip(tensors, [0, *ends[:-1]], strict=True)
                if left < at + tensor.shape[1] and right > at
            ]
            return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

        return dataclasses.replace(
            first, shape=tuple(shape), rows=lambda b, e: columns(b, e, 0, shape[1]), columns=columns
        )

    def rows(begin: int, end: int) -> np.ndarray:
        parts = [
            tensor.rows(max(begin - at, 0), min(end - at, tensor.shape[0]))
            for tensor, at in zip(tensors, [0, *ends[:-1]], strict=True)
            if begin < at + tensor.shape[0] and end > at
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    return dataclasses.replace(first, shape=tuple(shape), rows=rows)


def as_dtype(tensor: Tensor, dtype: str) -> Tensor:
    """The tensor as floats of ``dtype``; a quantised tensor is dequantised."""
    if tensor.dtype == dtype and tensor.quant is None:
        return tensor

    def rows(begin: int, end: int) -> np.ndarray:
        with np.errstate(all="ignore"):  # values may overflow to infinity; writers count them
            return tensor.floats(begin, end).astype(DTYPES[dtype], copy=False)

    return Tensor(tensor.shape, dtype, tensor.where, rows)


def as_floats(source: Source, dtype: str | None = None) -> Source:
    """The checkpoint with all tensors as floats. Float tensors keep their dtype unless ``dtype`` is given."""

    def convert(tensor: Tensor) -> Tensor:
        # The product of an integer and its scale needs float32 to be exact.
        own = tensor.dtype if tensor.quant is None else "float32"
        return as_dtype(tensor, dtype or own)

    return dataclasses.replace(source, tensors={name: convert(t) for name, t in source.tensors.items()})


def with_dtype(source: Source, dtype: str | None) -> Source:
    """The checkpoint with float tensors converted to ``dtype``. Quantised tensors are unchanged."""
    if dtype is None:
        return source
    tensors = {name: t if t.quant else as_dtype(t, dtype) for name, t in source.tensors.items()}
    return dataclasses.replace(source, tensors=tensors)

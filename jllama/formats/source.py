"""`Source`, the common form of all checkpoint formats: a config and tensors that are read one at a time.

Tensors are named as in the paper (``layers.0.wq``, see `jllama.formats.layout`). Their rows are in the half-split
rotary order of Hugging Face. Reading is lazy: to open a checkpoint only maps its files and checks their headers.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jllama.config import LlamaConfig, Quant
from jllama.errors import InputError
from jllama.formats.bpe import BpeVocabulary
from jllama.formats.layout import bias_flag, expected_shapes
from jllama.formats.vocabulary import Vocabulary

DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
BLOCK_BYTES = 16 << 20  # size of the block of a tensor that a conversion holds in memory at a time


@dataclass(frozen=True)
class Integers:
    """A quantised weight. Its value is ``data[o, i] * scale[o, i // group]``. 4-bit values are unpacked to int8."""

    data: np.ndarray  # [out, in] int8
    scale: np.ndarray  # [out, in / group] float32 or float16

    def floats(self) -> np.ndarray:
        """The dequantised float32 weight."""
        blocks = self.data.reshape(*self.scale.shape, -1).astype(np.float32)
        with np.errstate(all="ignore"):  # a damaged scale may overflow; writers count values that are not finite
            blocks *= self.scale.astype(np.float32)[..., None]
        return blocks.reshape(self.data.shape)


@dataclass(frozen=True)
class Quantization:
    """The format of a quantised tensor: ``group`` inputs share a scale (None: one scale for the whole row)."""

    format: Quant  # "int8" or "int4": the value of a `WeightFormat`, which is not imported because it needs JAX
    group: int | None


@dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint. ``rows(begin, end)`` reads a range of its first axis. The result is an array (a view of
    the mapped file if possible), or `Integers` if ``quant`` is set."""

    shape: tuple[int, ...]
    dtype: str  # "float32", "bfloat16" or "float16"; for quantised tensors, the dtype of the scales
    where: str  # file and tensor, for error messages
    rows: Callable[[int, int], Any]
    quant: Quantization | None = None
    # ``columns(begin, end, left, right)`` reads a part of some rows, where that is less work than to slice the rows.
    columns: Callable[[int, int, int, int], Any] | None = None

    def read(self) -> Any:
        """The whole tensor."""
        return self.rows(0, self.shape[0])

    def part(self, begin: int, end: int, left: int, right: int) -> Any:
        """Columns ``left`` to ``right`` of a range of rows of a matrix. Groups of a quantised one must not be split."""
        if (left, right) == (0, self.shape[-1]):
            return self.rows(begin, end)
        if self.columns is not None:
            return self.columns(begin, end, left, right)
        rows = self.rows(begin, end)
        if not isinstance(rows, Integers):
            return rows[:, left:right]
        return Integers(
            rows.data[:, left:right], rows.scale[:, scales_of(rows.scale.shape[1], self.shape[-1], left, right)]
        )

    def floats(self, begin: int, end: int) -> np.ndarray:
        """A range of rows as floats; quantised rows are dequantised."""
        rows = self.rows(begin, end)
        return rows.floats() if isinstance(rows, Integers) else rows

    def blocks(self, nbytes: int = BLOCK_BYTES, *, begin: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
        """Row ranges, from ``begin`` to ``end`` (default: all), of blocks that take about ``nbytes`` as float32."""
        width, end = 4 * int(np.prod(self.shape[1:], dtype=np.int64)), self.shape[0] if end is None else end
        step = max(1, nbytes // width)
        return ((at, min(at + step, end)) for at in range(begin, end, step))


def scales_of(groups: int, width: int, left: int, right: int) -> slice:
    """Which of a row's scales belong to a range of its columns."""
    if groups == 1:
        return slice(0, 1)
    group = width // groups
    assert left % group == right % group == 0, (left, right, group)
    return slice(left // group, right // group)


@dataclass(frozen=True)
class Source:
    """An opened checkpoint."""

    path: Path
    form: str  # the format: "hf", "native", "llama2c", "gguf" or "meta"
    config: LlamaConfig
    tensors: Mapping[str, Tensor]
    tokenizer: Path | Vocabulary | BpeVocabulary | None
    extras: tuple[Path, ...] = ()  # small files that are copied to a directory of the same layout
    metadata: Mapping[str, Any] = field(default_factory=dict)  # the metadata of a GGUF file
    links: bool = False  # whether links in the directory may point outside it

    @property
    def dtype(self) -> str:
        """The dtype of the first layer's wq, which stands for the matrices of the layers."""
        return self.tensors["layers.0.wq"].dtype

    @property
    def quant(self) -> Quantization | None:
        """The format of the first layer's wq, which stands for the matrices of the layers; None if not quantised."""
        return self.tensors["layers.0.wq"].quant


def checked(source: Source) -> Source:
    """Return the source, or raise `InputError` if a tensor of its config is missing or has another shape."""
    for name, shape in expected_shapes(source.config).items():
        tensor = source.tensors.get(name)
        if tensor is None:
            flag = bias_flag(name)
            why = f"{source.config.n_layers} layers expected" if flag is None else f"{flag} is true"
            raise InputError(f"{source.path}: tensor {name}: missing ({why})")
        if tensor.shape != shape:
            raise InputError(f"{tensor.where}: shape: expected {list(shape)}, found {list(tensor.shape)}")
    return source


def config_at(where: str, **fields: Any) -> LlamaConfig:
    """Create a config. Its errors are prefixed with ``where``."""
    try:
        return LlamaConfig(**fields)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None

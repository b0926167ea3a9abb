"""What every format is turned into: a config and tensors that are read one at a time.

A `Source` names its tensors as the paper does (``layers.0.wq``, see `jllama.formats.layout`), in the half-split rotary
order of Hugging Face. Reading is lazy: opening a checkpoint maps its files and checks its headers, nothing more.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jllama.config import LlamaConfig
from jllama.errors import InputError
from jllama.formats.bpe import BpeVocabulary
from jllama.formats.layout import bias_flag, expected_shapes
from jllama.formats.vocabulary import Vocabulary

DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
BLOCK_BYTES = 16 << 20  # what a conversion holds of a tensor at a time


@dataclass(frozen=True)
class Integers:
    """A weight kept as integers: ``data[o, i] * scale[o, i // group]``; 4-bit values lie in int8, unpacked."""

    data: np.ndarray  # [out, in] int8
    scale: np.ndarray  # [out, in / group] float32 or float16

    def floats(self) -> np.ndarray:
        """The float32 weight that the integers stand for."""
        blocks = self.data.reshape(*self.scale.shape, -1).astype(np.float32)
        with np.errstate(all="ignore"):  # a damaged scale: what is not finite is counted when it is written
            blocks *= self.scale.astype(np.float32)[..., None]
        return blocks.reshape(self.data.shape)


@dataclass(frozen=True)
class Quantization:
    """How a quantised tensor is stored: ``group`` inputs share a scale (None: the whole row)."""

    bits: int
    group: int | None


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file. ``rows(begin, end)`` gives a part of it along the first axis: an array (a view of the
    mapped file where possible) or, with ``quant``, `Integers`. ``where`` names file and tensor for error messages."""

    shape: tuple[int, ...]
    dtype: str  # of the float values: "float32", "bfloat16" or "float16"; scales' for quantised tensors
    where: str
    rows: Callable[[int, int], Any]
    quant: Quantization | None = None

    def read(self) -> Any:
        """All of it."""
        return self.rows(0, self.shape[0])

    def floats(self, begin: int, end: int) -> np.ndarray:
        """Rows as floats, whatever the tensor is stored as."""
        rows = self.rows(begin, end)
        return rows.floats() if isinstance(rows, Integers) else rows

    def blocks(self, nbytes: int = BLOCK_BYTES) -> Iterator[tuple[int, int]]:
        """Where to cut it into pieces that take about ``nbytes`` as float32."""
        width = 4 * int(np.prod(self.shape[1:], dtype=np.int64))
        step = max(1, nbytes // width)
        return ((begin, min(begin + step, self.shape[0])) for begin in range(0, self.shape[0], step))


@dataclass(frozen=True)
class Source:
    """An opened checkpoint."""

    path: Path
    form: str  # what was recognised: "hf", "native", "llama2c", "gguf", "meta"
    config: LlamaConfig
    tensors: Mapping[str, Tensor]
    tokenizer: Path | Vocabulary | BpeVocabulary | None
    extras: tuple[Path, ...] = ()  # small files that go along into a directory of the same layout
    metadata: Mapping[str, Any] = field(default_factory=dict)  # of a GGUF file
    links: bool = False  # whether the directory's links may lead out of it

    @property
    def dtype(self) -> str:
        """The dtype of most of the weights."""
        return self.tensors["layers.0.wq"].dtype

    @property
    def quant(self) -> Quantization | None:
        """How the layers' weights are quantised, if they are."""
        return self.tensors["layers.0.wq"].quant


def checked(source: Source) -> Source:
    """The source itself, once it is known to hold every tensor of its config in the right shape."""
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
    """A config whose complaints name the file."""
    try:
        return LlamaConfig(**fields)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None

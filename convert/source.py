"""What every format is turned into: a config and tensors that are read one at a time.

A `Source` names its tensors as the paper does (``layers.0.wq``, see `convert.layout`), in the half-split rotary order
of Hugging Face. Reading is lazy: opening a checkpoint maps its files and checks its headers, nothing more.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convert.layout import expected_shapes
from convert.vocabulary import Vocabulary
from jllama.config import LlamaConfig
from jllama.errors import InputError


@dataclass(frozen=True)
class Integers:
    """A weight kept as integers: ``data[o, i] * scale[o, i // group]``; 4-bit values lie in int8, unpacked."""

    data: np.ndarray  # [out, in] int8
    scale: np.ndarray  # [out, in / group] float32 or float16


@dataclass(frozen=True)
class Quantization:
    """How a quantised tensor is stored: ``group`` inputs share a scale (None: the whole row)."""

    bits: int
    group: int | None


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file. ``read`` gives an array (a view of the mapped file where possible) or, with ``quant``,
    `Integers`. ``where`` names the file and the tensor for error messages."""

    shape: tuple[int, ...]
    dtype: str  # of the float values: "float32", "bfloat16" or "float16"; scales' for quantised tensors
    where: str
    read: Callable[[], np.ndarray | Integers]
    quant: Quantization | None = None


@dataclass(frozen=True)
class Source:
    """An opened checkpoint."""

    path: Path
    form: str  # what was recognised: "hf", "native", "llama2c", "gguf", "meta"
    config: LlamaConfig
    tensors: Mapping[str, Tensor]
    tokenizer: "Path | Vocabulary | None"

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
            raise InputError(f"{source.path}: tensor {name}: missing ({source.config.n_layers} layers expected)")
        if tensor.shape != shape:
            raise InputError(f"{tensor.where}: expected shape {list(shape)}, found {list(tensor.shape)}")
    return source

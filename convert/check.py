"""Compares two checkpoints: their tensors, and their logits for a prompt."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from jllama.errors import InputError
from jllama.formats.layout import expected_shapes
from jllama.formats.source import Integers, Source, Tensor

PROMPT = "Once upon a time, there was a little"


@dataclass(frozen=True)
class Difference:
    """The difference between two tensors."""

    name: str
    same: bool  # every value is the same
    relative: float  # root mean squared difference, relative to the values of the first tensor
    largest: float


def tolerance(a: Source, b: Source) -> float:
    """The relative difference to expect: 0 for the same float dtype, 1e-6 for the same quantised formats, and otherwise
    the rounding error of the less precise format."""
    formats = {t.quant.format for s in (a, b) for t in s.tensors.values() if t.quant}
    if formats:
        same = all(a.tensors[name].quant == b.tensors[name].quant for name in a.tensors)
        return 1e-6 if same else 0.25 if "int4" in formats else 0.03
    dtypes = {a.dtype, b.dtype}
    return 0.0 if len(dtypes) == 1 else 2**-8 if "bfloat16" in dtypes else 2**-10


def compare_tensors(a: Source, b: Source) -> Iterator[Difference]:
    """Yield the differences of all tensors."""
    for name in expected_shapes(_common(a, b)):
        yield _compare(name, a.tensors[name], b.tensors[name])


def _common(a: Source, b: Source) -> Any:
    """The common config, or an `InputError` if they differ. The context and special ids are not compared, because not
    all formats store them."""
    names = ("dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim", "vocab_size", "head_dim", "tie_embeddings")
    for name in (*names, "rope_theta", "rope_scaling", "norm_eps"):
        one, other = getattr(a.config, name), getattr(b.config, name)
        if one != other:
            raise InputError(f"{b.path}: {name}: expected {one} as in {a.path}, found {other}")
    return a.config


def _compare(name: str, a: Tensor, b: Tensor) -> Difference:
    same, squared, signal, largest = True, 0.0, 0.0, 0.0
    for begin, end in a.blocks():
        one, other = a.rows(begin, end), b.rows(begin, end)
        if _identical(one, other):
            continue
        same = False
        one, other = (x.floats() if isinstance(x, Integers) else x.astype(np.float32) for x in (one, other))
        with np.errstate(all="ignore"):  # NaN and infinities result in NaN, which counts as a difference
            difference = np.abs(one - other)
            squared += float(np.sum(difference**2, dtype=np.float64))
            signal += float(np.sum(one**2, dtype=np.float64))
        largest = float(np.maximum(largest, difference.max()))
    if squared == 0 and largest == 0:  # the same values in another dtype
        return Difference(name, True, 0.0, 0.0)
    return Difference(name, same, (squared / signal) ** 0.5 if signal else float("inf"), largest)


def _identical(one: Any, other: Any) -> bool:
    if isinstance(one, Integers) and isinstance(other, Integers):
        alike = one.scale.shape == other.scale.shape and one.scale.dtype == other.scale.dtype
        return alike and _identical(one.data, other.data) and _identical(one.scale, other.scale)
    if isinstance(one, Integers) or isinstance(other, Integers) or one.dtype != other.dtype:
        return False
    kind = np.dtype(f"u{one.dtype.itemsize}")  # bits are compared, so that NaN equals itself
    return np.array_equal(np.ascontiguousarray(one).view(kind), np.ascontiguousarray(other).view(kind))


@dataclass(frozen=True)
class LogitsDifference:
    """The difference between two models' logits for a prompt."""

    tokens: int
    largest: float
    spread: float  # standard deviation of the first model's logits, to compare `largest` with
    agreeing: int  # number of positions where both models have the same most likely token


def compare_logits(a: Source, b: Source) -> LogitsDifference:
    """Run both models on the same prompt, one after the other."""
    ids = prompt_ids(a)
    one, other = _logits(a, ids), _logits(b, ids)
    agreeing = int((one.argmax(-1) == other.argmax(-1)).sum())
    return LogitsDifference(len(ids), float(np.abs(one - other).max()), float(one.std()), agreeing)


def prompt_ids(source: Source) -> list[int]:
    """The ids of a sentence, or arbitrary ids if the checkpoint has no tokenizer."""
    from jllama.text.tokenizer import tokenizer_for

    if source.tokenizer is not None:
        return tokenizer_for(source).encode(PROMPT)
    return [source.config.bos_id, *(7 * i % source.config.vocab_size for i in range(1, 12))]


def _logits(source: Source, ids: list[int]) -> np.ndarray:
    # Imported here, because conversions do not need jax.
    import jax.numpy as jnp

    from jllama.formats.checkpoint import load
    from jllama.model import forward

    logits, _ = forward(load(source, max_len=len(ids)), jnp.asarray([ids]))
    return np.asarray(logits[0])

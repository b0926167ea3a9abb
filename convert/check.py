"""Two checkpoints held against each other: tensor by tensor, then by what they make of a prompt."""

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
    """How far a tensor is from another: ``same`` says that every value is the same."""

    name: str
    same: bool
    relative: float  # root mean squared difference, relative to the first one's values
    largest: float


def tolerance(a: Source, b: Source) -> float:
    """The relative difference that the two forms explain: nothing for the same, rounding for a narrower one."""
    bits = min((t.quant.bits for s in (a, b) for t in s.tensors.values() if t.quant), default=0)
    if bits:
        same = all(a.tensors[name].quant == b.tensors[name].quant for name in a.tensors)
        return 1e-6 if same else {8: 0.03, 4: 0.25}[bits]
    dtypes = {a.dtype, b.dtype}
    return 0.0 if len(dtypes) == 1 else 2**-8 if "bfloat16" in dtypes else 2**-10


def compare_tensors(a: Source, b: Source) -> Iterator[Difference]:
    """The differences of all tensors, one after another."""
    for name in expected_shapes(_common(a, b)):
        yield _compare(name, a.tensors[name], b.tensors[name])


def _common(a: Source, b: Source) -> Any:
    """The config, once both are known to have the same; context and special ids are not always stored."""
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
        with np.errstate(all="ignore"):  # NaN and infinities give a NaN, which is no agreement
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
    kind = np.dtype(f"u{one.dtype.itemsize}")  # bits, so that NaN equals itself
    return np.array_equal(np.ascontiguousarray(one).view(kind), np.ascontiguousarray(other).view(kind))


@dataclass(frozen=True)
class LogitsDifference:
    """How far the logits of a prompt are apart, and for how many of its tokens the likeliest next one agrees."""

    tokens: int
    largest: float
    spread: float  # standard deviation of the first one's logits: the scale to read `largest` on
    agreeing: int


def compare_logits(a: Source, b: Source) -> LogitsDifference:
    """Run both models, one after the other, on the same prompt."""
    ids = prompt_ids(a)
    one, other = _logits(a, ids), _logits(b, ids)
    agreeing = int((one.argmax(-1) == other.argmax(-1)).sum())
    return LogitsDifference(len(ids), float(np.abs(one - other).max()), float(one.std()), agreeing)


def prompt_ids(source: Source) -> list[int]:
    """A sentence, or without a tokenizer some ids."""
    from jllama.text.tokenizer import tokenizer_for

    if source.tokenizer is not None:
        return tokenizer_for(source).encode(PROMPT)
    return [source.config.bos_id, *(7 * i % source.config.vocab_size for i in range(1, 12))]


def _logits(source: Source, ids: list[int]) -> np.ndarray:
    # Imported here: whoever converts need not wait for jax.
    import jax.numpy as jnp

    from jllama.formats.checkpoint import load
    from jllama.model import forward

    logits, _ = forward(load(source, max_len=len(ids)), jnp.asarray([ids]))
    return np.asarray(logits[0])

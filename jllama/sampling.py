"""Choosing the next token, on the device, with settings of its own for every row.

The order is that of Hugging Face: repetition penalty, temperature, top-k, top-p, min-p; all but the first are
`pallas_kernels.draw`'s.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jllama.errors import InputError
from jllama.kernels import draw, log_probability


@struct.dataclass
class Sampling:
    """Settings, an array [B] each. A setting that no row uses is None: it costs nothing and is not compiled in."""

    key: jax.Array  # [B] random keys, one a row: a row's text does not depend on its neighbours
    temperature: jax.Array | None = None  # None: all rows greedy; a row of 0 is greedy
    top_k: jax.Array | None = None  # int32; 0: off
    top_p: jax.Array | None = None  # 1: off
    min_p: jax.Array | None = None  # 0: off
    repetition_penalty: jax.Array | None = None  # 1: off


# What each setting may be, and the value that turns it off.
_RULES: dict[str, tuple[str, Callable[[float], bool], float]] = {
    "temperature": ("a number of at least 0", lambda v: 0 <= v < float("inf"), 0.0),
    "top_k": ("a whole number of at least 0 (0: off)", lambda v: 0 <= v < 2**31 and v == int(v), 0),
    "top_p": ("a number above 0 and at most 1 (1: off)", lambda v: 0 < v <= 1, 1.0),
    "min_p": ("a number from 0 to below 1 (0: off)", lambda v: 0 <= v < 1, 0.0),
    "repetition_penalty": (
        "a number above 0 (1: off)",
        lambda v: 0 < v < float("inf"),
        1.0,
    ),
}

Setting = float | Sequence[float]


def make_sampling(
    batch: int,
    *,
    seed: int | Sequence[int] = 0,
    temperature: Setting = 0.0,
    top_k: Setting = 0,
    top_p: Setting = 1.0,
    min_p: Setting = 0.0,
    repetition_penalty: Setting = 1.0,
) -> Sampling:
    """Settings for ``batch`` rows; every one may be a single value or one a row. Temperature 0 is greedy.

    A single ``seed`` gives row ``i`` the seed ``seed + i``.
    """
    given = dict(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    rows = {name: _per_row(name, value, batch) for name, value in given.items()}
    if not rows["temperature"].any():  # truncation changes nothing about the largest logit
        rows = {"repetition_penalty": rows["repetition_penalty"]}
    arrays = {
        name: jnp.asarray(row, jnp.int32 if name == "top_k" else jnp.float32)
        for name, row in rows.items()
        if (row != _RULES[name][2]).any()
    }
    seeds = list(range(seed, seed + batch)) if isinstance(seed, int) else list(seed)
    if len(seeds) != batch:
        raise InputError(f"seed: expected one value or {batch} (one a row), found {len(seeds)}")
    return Sampling(key=_keys(np.asarray([s % 2**32 for s in seeds], np.uint32)), **arrays)


_keys = jax.jit(jax.vmap(jax.random.key))


def check_setting(name: str, value: float) -> float:
    """The value itself, or an `InputError` that says what was expected."""
    expected, valid, _ = _RULES[name]
    if not valid(value):
        raise InputError(f"{name}: expected {expected}, found {value:g}")
    return value


def _per_row(name: str, value: Setting, batch: int) -> np.ndarray:
    values = [value] * batch if isinstance(value, int | float) else list(value)
    if len(values) != batch:
        raise InputError(f"{name}: expected one value or {batch} (one a row), found {len(values)}")
    return np.asarray([check_setting(name, v) for v in values], np.float64)


def sample(
    logits: jax.Array,  # [B, V] float32
    sampling: Sampling,
    step: jax.Array,  # [B]: how many tokens the row has drawn before; makes each draw's key
    seen: jax.Array | None = None,  # [B, V] bool: tokens so far, for the repetition penalty
    *,
    backend: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """A token for every row [B], and its log-probability [B] under the model's own, unchanged distribution."""
    u = None
    if sampling.temperature is not None:
        u = jax.vmap(jax.random.uniform)(jax.vmap(jax.random.fold_in)(sampling.key, step))
    how = dict(temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p)
    if sampling.repetition_penalty is None or seen is None:
        return draw(logits, u, backend=backend, **how)
    penalty = sampling.repetition_penalty[:, None]
    penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
    token, _ = draw(jnp.where(seen, penalised, logits), u, backend=backend, **how)
    return token, log_probability(logits, token)

"""Whether a greedy text in bfloat16 is right. Two ways of computing round differently. After a choice between two
nearly equal logits their texts go on differently, and cannot be compared. So every token is compared with the logits of
its place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jllama.model import forward
from jllama.params import Params


def worst_choice(params: Params, prompt: list[int], ids: list[int]) -> float:
    """How far the logit of any of ``ids`` is below the largest one at its place, in one forward by XLA over prompt and
    ids. A text with nothing but rounding in it stays under a tenth or two. On the 7B, logits have a spread of 1.3 and
    the kernels differ from XLA by 0.03. Of 256 draws, 22 differed, the worst by 0.14."""
    tokens = jnp.asarray([prompt + ids])
    logits = jax.jit(functools.partial(forward, backend="xla"))(params, tokens)[0][0, len(prompt) - 1 : -1]
    drawn = np.take_along_axis(np.asarray(logits), np.asarray(ids)[:, None], axis=1)[:, 0]
    return float((np.asarray(logits).max(axis=1) - drawn).max())

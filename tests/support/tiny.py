"""A tiny grouped-query model for tests. It compiles fast, and its logits differ enough for a clear greedy choice."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jllama.config import LlamaConfig
from jllama.params import Params, init

CONFIG = LlamaConfig(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=48, vocab_size=96, max_seq_len=256, eos_ids=(2,)
)


@functools.cache
def model(dtype: str = "float32", config: LlamaConfig = CONFIG, seed: int = 0) -> Params:
    """Random weights. Those of `init` are made for training and give flat logits, so these are larger."""
    params = init(config, jax.random.key(seed), dtype=jnp.float32)
    return jax.tree.map(lambda w: (w * (10.0 if w.ndim > 1 else 1.0)).astype(dtype), params)


def prompt(length: int, seed: int = 0) -> list[int]:
    """Token ids past the special ones."""
    return np.random.RandomState(seed + length).randint(3, CONFIG.vocab_size, length).tolist()

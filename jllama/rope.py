"""Rotary position embedding in the half-split layout of Hugging Face checkpoints: pair ``(i, i + D/2)``."""

import jax
import jax.numpy as jnp
import numpy as np

from jllama.config import LlamaConfig


def inverse_frequencies(config: LlamaConfig) -> np.ndarray:
    """[head_dim / 2] float64: the rotation of each pair per position, in radians, after any scaling."""
    exponents = np.arange(0, config.head_dim, 2) / config.head_dim
    freqs = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return freqs
    if scaling.kind == "linear":
        return freqs / scaling.factor
    # llama3: low frequencies are divided by the factor, high ones stay, and those between are interpolated.
    turns = scaling.original_max_seq_len * freqs / (2 * np.pi)
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return freqs * (smooth + (1 - smooth) / scaling.factor)


def rotations(positions: jax.Array, config: LlamaConfig) -> tuple[jax.Array, jax.Array]:
    """The cosines and sines of every position, each [..., head_dim / 2] float32."""
    angles = jnp.multiply.outer(positions.astype(jnp.float32), jnp.asarray(inverse_frequencies(config), jnp.float32))
    return jnp.cos(angles), jnp.sin(angles)

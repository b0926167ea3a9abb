"""The weights of a whole decode step, as the op `decode_step` takes them."""

from dataclasses import dataclass

import jax

from .quantized import QuantizedTensor

Weight = jax.Array | QuantizedTensor


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepWeights:
    """All weights of a model except the embedding. Those of the layers are stacked on a leading axis L."""

    attn_norm: jax.Array  # [L, dim]
    ffn_norm: jax.Array  # [L, dim]
    norm: jax.Array  # [dim]
    wqkv: Weight  # [L, (heads + 2 * kv_heads) * head_dim, dim]
    wo: Weight  # [L, dim, heads * head_dim]
    w_gate_up: Weight  # [L, 2 * hidden, dim]
    w_down: Weight  # [L, dim, hidden]
    head: Weight  # [vocab, dim]

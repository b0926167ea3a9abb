"""The names and shapes of the tensors of a Llama."""

from collections.abc import Mapping

from jllama.config import LlamaConfig

# Our name of a layer's tensor -> Hugging Face's name.
LAYER = {
    "attn_norm": "input_layernorm",
    "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj",
    "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "w_gate": "mlp.gate_proj",
    "w_up": "mlp.up_proj",
    "w_down": "mlp.down_proj",
}
MODEL = {"embed": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"}

# Field of `jllama.params.Layer` -> the tensors that are concatenated along their rows in it, in this order.
FUSED = {
    "attn_norm": ("attn_norm",),
    "wqkv": ("wq", "wk", "wv"),
    "wo": ("wo",),
    "ffn_norm": ("ffn_norm",),
    "w_gate_up": ("w_gate", "w_up"),
    "w_down": ("w_down",),
}

# Our name of a bias, and the weight that it goes with; in Hugging Face and GGUF it has that weight's name.
BIASES = {
    "bq": "wq",
    "bk": "wk",
    "bv": "wv",
    "bo": "wo",
    "b_gate": "w_gate",
    "b_up": "w_up",
    "b_down": "w_down",
}
_FUSED_BIASES = {
    "attention_bias": {"bqkv": ("bq", "bk", "bv"), "bo": ("bo",)},
    "mlp_bias": {"b_gate_up": ("b_gate", "b_up"), "b_down": ("b_down",)},
}


def fused(config: LlamaConfig) -> dict[str, tuple[str, ...]]:
    """`FUSED`, and with it the biases that such a model has."""
    fields = dict(FUSED)
    for flag, biases in _FUSED_BIASES.items():
        if getattr(config, flag):
            fields |= biases
    return fields


def bias_flag(name: str) -> str | None:
    """The config's flag that says whether there is a tensor ``layers.0.bq``; None for tensors that all models have."""
    field = name.rpartition(".")[2]
    return next((flag for flag, biases in _FUSED_BIASES.items() if field in sum(biases.values(), ())), None)


def file_name(field: str, names: Mapping[str, str]) -> str:
    """The name of a layer's tensor in a file, where ``names`` has the file's names of weights."""
    return f"{names[BIASES[field]]}.bias" if field in BIASES else f"{names[field]}.weight"


def hf_names(config: LlamaConfig) -> dict[str, str]:
    """Our name of every tensor -> Hugging Face's name."""
    names = {ours: f"{theirs}.weight" for ours, theirs in MODEL.items()}
    if config.tie_embeddings:
        del names["lm_head"]
    for i in range(config.n_layers):
        names |= {
            f"layers.{i}.{ours}": f"model.layers.{i}.{file_name(ours, LAYER)}" for ours in unfused_layer_shapes(config)
        }
    return names


def unfused_layer_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Our name of every tensor of a layer, before fusion -> its shape."""
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    weights = {
        "attn_norm": (config.dim,),
        "wq": (q, config.dim),
        "wk": (kv, config.dim),
        "wv": (kv, config.dim),
        "wo": (config.dim, q),
        "ffn_norm": (config.dim,),
        "w_gate": (config.hidden_dim, config.dim),
        "w_up": (config.hidden_dim, config.dim),
        "w_down": (config.dim, config.hidden_dim),
    }
    parts = [part for parts in fused(config).values() for part in parts if part in BIASES]
    return weights | {part: weights[BIASES[part]][:1] for part in parts}


def expected_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Our name of every tensor -> its shape."""
    vocabulary = (config.vocab_size, config.dim)
    shapes: dict[str, tuple[int, ...]] = {"embed": vocabulary, "norm": (config.dim,)}
    if not config.tie_embeddings:
        shapes["lm_head"] = vocabulary
    for i in range(config.n_layers):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in unfused_layer_shapes(config).items()}
    return shapes

"""Makes tests/golden/*.npz: what Hugging Face transformers says about small random Llamas, for `test_hf_parity.py`.

    make peers && .venv-peers/bin/python tests/make_golden.py

Weights and prompts come from a seed (numpy's legacy generator, whose stream is frozen), so a file holds only the
float32 logits of LlamaForCausalLM and its greedy continuation. torch is imported only when this runs as a script, or
by the live comparison.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parent / "golden"
BATCH, PROMPT, NEW = 2, 40, 24
CLEAR = 2e-4  # a greedy choice with a smaller gap to the second best proves nothing

_BASE: dict[str, Any] = dict(
    model_type="llama",
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    vocab_size=120,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    hidden_act="silu",
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
)
_LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)

# The config.json of every case. The later ones add a feature to grouped heads, so that features are combined.
CASES: dict[str, dict[str, Any]] = {
    "mha": {},
    "gqa": dict(num_key_value_heads=2),
    "mqa-deep": dict(num_key_value_heads=1, num_hidden_layers=4),
    "tied": dict(num_key_value_heads=2, tie_word_embeddings=True),
    "rope-linear": dict(num_key_value_heads=2, rope_scaling=dict(rope_type="linear", factor=4.0)),
    "rope-llama3": dict(num_key_value_heads=2, rope_theta=500000.0, rope_scaling=_LLAMA3, head_dim=16),
    "rope-theta": dict(num_key_value_heads=2, rope_theta=100.0, rms_norm_eps=1e-6),
    "head-dim": dict(num_key_value_heads=2, head_dim=12, tie_word_embeddings=True),
    "mistral": dict(model_type="mistral", num_key_value_heads=2, head_dim=12, sliding_window=128),
    "biases": dict(num_key_value_heads=2, head_dim=12, attention_bias=True, mlp_bias=True),
    "attention-bias": dict(num_key_value_heads=1, attention_bias=True, tie_word_embeddings=True),
}


def config(case: str) -> dict[str, Any]:
    """The config.json of a case."""
    return _BASE | CASES[case]


def shapes(values: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Hugging Face's name of every tensor -> its shape, written out here so that the two sides share no table."""
    dim, hidden, vocab = values["hidden_size"], values["intermediate_size"], values["vocab_size"]
    head_dim = values.get("head_dim", dim // values["num_attention_heads"])
    q, kv = values["num_attention_heads"] * head_dim, values["num_key_value_heads"] * head_dim
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, dim), "model.norm.weight": (dim,)}
    if not values["tie_word_embeddings"]:
        out["lm_head.weight"] = (vocab, dim)
    for i in range(values["num_hidden_layers"]):
        layer = {
            "input_layernorm": (dim,),
            "self_attn.q_proj": (q, dim),
            "self_attn.k_proj": (kv, dim),
            "self_attn.v_proj": (kv, dim),
            "self_attn.o_proj": (dim, q),
            "post_attention_layernorm": (dim,),
            "mlp.gate_proj": (hidden, dim),
            "mlp.up_proj": (hidden, dim),
            "mlp.down_proj": (dim, hidden),
        }
        out |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
        biased = [part for part, flag in (("self_attn", "attention_bias"), ("mlp", "mlp_bias")) if values.get(flag)]
        out |= {
            f"model.layers.{i}.{name}.bias": shape[:1]
            for name, shape in layer.items()
            if name.partition(".")[0] in biased
        }
    return out


def weights(case: str) -> dict[str, np.ndarray]:
    """Random weights under Hugging Face's names, of a scale that makes logits and attention scores of order one."""
    rng = np.random.RandomState(1000 + list(CASES).index(case))
    out = {}
    for name, shape in shapes(config(case)).items():
        values = rng.standard_normal(shape)
        if name.endswith(".bias"):
            values *= 0.5
        elif len(shape) == 1:
            values = 1 + 0.2 * values
        else:
            values *= (2.0 if "self_attn" in name else 1.5) * shape[-1] ** -0.5
        out[name] = values.astype(np.float32)
    return out


def prompts(case: str) -> np.ndarray:
    """[BATCH, PROMPT] token ids, long enough that scaled rotary differs."""
    values = config(case)
    return np.random.RandomState(2000 + list(CASES).index(case)).randint(3, values["vocab_size"], (BATCH, PROMPT))


def hf_model(case: str, directory: Path) -> Any:
    """The case as a float32 model of transformers, loaded from a checkpoint that is written to ``directory``."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config(case)))
    state = {name: torch.from_numpy(array) for name, array in weights(case).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing  # where it is tied
    model.save_pretrained(directory)
    return read_hf(directory)


def read_hf(directory: Path) -> Any:
    """A checkpoint directory as a float32 model of transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def run_hf(model: Any, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The logits [B, PROMPT, V] of the prompts, and NEW greedy ids [B, NEW], with end-of-sequence ignored."""
    import torch

    tokens = torch.from_numpy(ids)
    with torch.no_grad():
        logits = model(tokens).logits
        for _ in range(NEW):
            last = model(tokens).logits[:, -1]
            best = last.topk(2).values
            gap = (best[:, 0] - best[:, 1]).min().item()
            assert gap > CLEAR, f"a greedy choice by only {gap:.1e}: take another seed"
            tokens = torch.cat([tokens, last.argmax(-1, keepdim=True)], dim=1)
    return logits.numpy(), tokens[:, ids.shape[1] :].numpy()


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    GOLDEN.mkdir(exist_ok=True)
    for case in CASES:
        with tempfile.TemporaryDirectory() as directory:
            logits, ids = run_hf(hf_model(case, Path(directory)), prompts(case))
        path = GOLDEN / f"{case}.npz"
        np.savez_compressed(path, logits=logits.astype(np.float32), ids=ids.astype(np.int16))
        print(f"{path.name}: logits {logits.shape}, std {logits.std():.2f}, {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()

"""Makes tests/golden/demo.npz: the embedded model's greedy text and logits, in float64, for `test_demo_golden.py`.

    .venv/bin/python tests/make_demo_golden.py

It uses numpy and nothing of jllama, so the two sides share no code: neither the reader of the weights, nor the
forward, nor the tokenizer's wrapper.
"""

import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import sentencepiece

DEMO = Path(__file__).parents[1] / "jllama" / "demo"
GOLDEN = Path(__file__).parent / "golden" / "demo.npz"
PROMPTS = (
    "Once upon a time,",
    "Lily and Tom went to the park. They saw a big",
    "The old man was sad because",
    '"Can I have a cookie?" asked',
)
NEW = 48
POSITIONS = (0, 3, -1)  # of a prompt, whose logits are kept


def weights() -> dict[str, np.ndarray]:
    """Every tensor of the file in float64: 8 bytes of header length, a JSON header, bfloat16 data."""
    raw = (DEMO / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    arrays = {}
    for name, entry in header.items():
        assert entry["dtype"] == "BF16", entry
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        arrays[name] = np.frombuffer(raw[begin:end], ml_dtypes.bfloat16).reshape(entry["shape"]).astype(np.float64)
    return arrays


def forward(w: dict[str, np.ndarray], config: dict, ids: list[int]) -> np.ndarray:
    """Logits [T, V] of a Llama: pre-norm blocks of grouped-query attention and SwiGLU, rotary positions, tied head."""
    T, D = len(ids), config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    angles = np.outer(np.arange(T), config["rope_theta"] ** (-np.arange(0, D, 2) / D))  # [T, D / 2]
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"]) * w[f"{name}.weight"]

    def rotated(x: np.ndarray) -> np.ndarray:
        a, b = x[..., : D // 2], x[..., D // 2 :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    x = w["model.embed_tokens.weight"][ids]  # [T, E]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"

        def linear(x: np.ndarray, name: str, layer: str = layer) -> np.ndarray:
            return x @ w[f"{layer}.{name}.weight"].T

        h = norm(x, f"{layer}.input_layernorm")
        q = rotated(linear(h, "self_attn.q_proj").reshape(T, heads, D))
        k = rotated(linear(h, "self_attn.k_proj").reshape(T, kv_heads, D)).repeat(heads // kv_heads, axis=1)
        v = linear(h, "self_attn.v_proj").reshape(T, kv_heads, D).repeat(heads // kv_heads, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(D)
        scores = np.where(np.tril(np.ones((T, T), bool)), scores, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        x = x + linear(np.einsum("hqk,khd->qhd", shares, v).reshape(T, heads * D), "self_attn.o_proj")
        h = norm(x, f"{layer}.post_attention_layernorm")
        gate = linear(h, "mlp.gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, "mlp.up_proj"), "mlp.down_proj")
    return norm(x, "model.norm") @ w["model.embed_tokens.weight"].T


def main() -> None:
    """Write the file."""
    config, w = json.loads((DEMO / "config.json").read_text()), weights()
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(DEMO / "tokenizer.model"))
    saved: dict[str, np.ndarray] = {"prompts": np.asarray(PROMPTS), "positions": np.asarray(POSITIONS)}
    texts = []
    for number, prompt in enumerate(PROMPTS):
        ids, gap = [config["bos_token_id"], *tokenizer.encode(prompt)], np.inf
        saved[f"prompt_{number}"] = np.asarray(ids, np.int32)
        logits = forward(w, config, ids)
        saved[f"logits_{number}"] = logits[list(POSITIONS)].astype(np.float32)
        for _ in range(NEW):
            second, first = np.sort(logits[-1])[-2:]
            gap = min(gap, first - second)
            ids.append(int(logits[-1].argmax()))
            if ids[-1] == config["eos_token_id"]:
                break
            logits = forward(w, config, ids)
        # A choice that rounding could change would only test rounding.
        assert gap > 1e-3, (prompt, gap)
        saved[f"ids_{number}"] = np.asarray(ids, np.int32)
        texts.append(tokenizer.decode([i for i in ids if i not in (config["bos_token_id"], config["eos_token_id"])]))
        print(f"{prompt!r}: {len(ids)} ids, the closest choice by {gap:.4f}: {texts[-1]!r}")
    np.savez_compressed(GOLDEN, texts=np.asarray(texts), **saved)  # pyright: ignore[reportArgumentType]
    print(f"{GOLDEN}: {GOLDEN.stat().st_size} bytes")


if __name__ == "__main__":
    main()

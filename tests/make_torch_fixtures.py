"""Makes tests/data/: small random checkpoints that torch wrote itself, with the logits of reference models.

    make peers && .venv-peers/bin/python tests/make_torch_fixtures.py

- ``meta-1``, ``meta-2``, ``meta-8``: one model as Meta released theirs, cut into as many shards as the name says,
  bfloat16, grouped queries; ``meta.npz``: tokens, and the logits of a model written here as Meta's is.
- ``hf-sharded`` (safetensors), ``hf-bin`` and ``hf-bin-sharded``: one model as transformers and torch write them;
  ``hf.npz``: tokens, and the logits of transformers' LlamaForCausalLM.
"""

import json
import shutil
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"

# Eight shards need eight kv heads. Grouped queries need more query heads. The rotary order matters from head_dim 4 on.
DIM, HEADS, KV_HEADS, HIDDEN, VOCAB, LAYERS = 64, 16, 8, 32, 48, 2
EPS, THETA = 1e-5, 10000.0
# The axis along which Meta splits each matrix into shards: outputs (0) or inputs (1).
AXES = {"wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0, "tok_embeddings": 1, "output": 0}
HF = dict(
    hidden_size=48,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    vocab_size=64,
    max_position_embeddings=128,
    tie_word_embeddings=False,
)


def meta_weights(torch: Any) -> dict[str, Any]:
    """A whole model under Meta's names."""
    generator = torch.Generator().manual_seed(3)
    head_dim = DIM // HEADS
    shapes = {"tok_embeddings": (VOCAB, DIM), "norm": (DIM,), "output": (VOCAB, DIM)}
    for i in range(LAYERS):
        shapes |= {
            f"layers.{i}.attention.wq": (DIM, DIM),
            f"layers.{i}.attention.wk": (KV_HEADS * head_dim, DIM),
            f"layers.{i}.attention.wv": (KV_HEADS * head_dim, DIM),
            f"layers.{i}.attention.wo": (DIM, DIM),
            f"layers.{i}.feed_forward.w1": (HIDDEN, DIM),
            f"layers.{i}.feed_forward.w2": (DIM, HIDDEN),
            f"layers.{i}.feed_forward.w3": (HIDDEN, DIM),
            f"layers.{i}.attention_norm": (DIM,),
            f"layers.{i}.ffn_norm": (DIM,),
        }
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        weights[f"{name}.weight"] = (1 + 0.1 * noise if len(shape) == 1 else 0.2 * noise).to(torch.bfloat16)
    return weights


def meta_logits(torch: Any, weights: dict[str, Any], tokens: Any) -> Any:
    """Meta's model: rotary on neighbouring pairs, as complex numbers; everything in float32."""
    w = {name.removesuffix(".weight"): tensor.float() for name, tensor in weights.items()}
    batch, length = tokens.shape
    head_dim = DIM // HEADS
    frequencies = 1.0 / THETA ** (torch.arange(0, head_dim, 2).float() / head_dim)
    angles = torch.outer(torch.arange(length).float(), frequencies)
    turns = torch.polar(torch.ones_like(angles), angles)[None, :, None]

    def norm(x: Any, name: str) -> Any:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * w[name]

    def rotate(x: Any) -> Any:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns).flatten(3)

    x = w["tok_embeddings"][tokens]
    mask = torch.full((length, length), float("-inf")).triu(1)
    for i in range(LAYERS):
        h = norm(x, f"layers.{i}.attention_norm")
        q, k, v = ((h @ w[f"layers.{i}.attention.{n}"].T).view(batch, length, -1, head_dim) for n in ("wq", "wk", "wv"))
        q, k = rotate(q), rotate(k)
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=2) for t in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / head_dim**0.5 + mask
        out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).reshape(batch, length, DIM)
        x = x + out @ w[f"layers.{i}.attention.wo"].T
        h = norm(x, f"layers.{i}.ffn_norm")
        gate, up = (h @ w[f"layers.{i}.feed_forward.{n}"].T for n in ("w1", "w3"))
        x = x + (torch.nn.functional.silu(gate) * up) @ w[f"layers.{i}.feed_forward.w2"].T
    return norm(x, "norm") @ w["output"].T


def write_meta(torch: Any, weights: dict[str, Any], shards: int) -> None:
    """One release, split for ``shards`` GPUs."""
    path = DATA / f"meta-{shards}"
    path.mkdir()
    params = dict(dim=DIM, multiple_of=8, n_heads=HEADS, n_kv_heads=KV_HEADS, n_layers=LAYERS, norm_eps=EPS)
    (path / "params.json").write_text(json.dumps(params | {"vocab_size": -1}) + "\n")
    for i in range(shards):
        part = {}
        for name, tensor in weights.items():
            axis = AXES.get(name.removesuffix(".weight").rpartition(".")[2])
            part[name] = (tensor if axis is None else tensor.chunk(shards, axis)[i]).clone()
        part["rope.freqs"] = torch.ones(DIM // HEADS // 2)  # Meta's files have it, too, but nothing uses it
        torch.save(part, path / f"consolidated.{i:02}.pth")


def write_hf(torch: Any, transformers: Any, np: Any) -> None:
    """One model in three forms, and its logits."""
    torch.manual_seed(5)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**HF, initializer_range=0.15)).to(torch.bfloat16)
    model.save_pretrained(DATA / "hf-sharded", max_shard_size="30KB")
    state = model.state_dict()
    for name in ("hf-bin", "hf-bin-sharded"):
        (DATA / name).mkdir()
        shutil.copy(DATA / "hf-sharded" / "config.json", DATA / name)
    torch.save(state, DATA / "hf-bin" / "pytorch_model.bin")
    names = list(state)
    parts = [names[: len(names) // 2], names[len(names) // 2 :]]
    files = [f"pytorch_model-{i:05}-of-00002.bin" for i in (1, 2)]
    for file, part in zip(files, parts, strict=True):
        torch.save({name: state[name] for name in part}, DATA / "hf-bin-sharded" / file)
    weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (DATA / "hf-bin-sharded" / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=1) + "\n")
    tokens = torch.randint(3, HF["vocab_size"], (2, 24))
    # Read back, because .to(bfloat16) rounded the rotary frequencies of the model in memory, too.
    model = transformers.LlamaForCausalLM.from_pretrained(DATA / "hf-sharded", dtype=torch.float32)
    with torch.no_grad():
        logits = model(tokens).logits
    np.savez_compressed(DATA / "hf.npz", tokens=tokens.numpy(), logits=logits.numpy())


def main() -> None:
    """Write all files again."""
    import numpy as np
    import torch
    import transformers

    shutil.rmtree(DATA, ignore_errors=True)
    DATA.mkdir()
    weights = meta_weights(torch)
    for shards in (1, 2, 8):
        write_meta(torch, weights, shards)
    tokens = torch.randint(3, VOCAB, (2, 24), generator=torch.Generator().manual_seed(4))
    logits = meta_logits(torch, weights, tokens)
    np.savez_compressed(DATA / "meta.npz", tokens=tokens.numpy(), logits=logits.numpy())
    write_hf(torch, transformers, np)


if __name__ == "__main__":
    main()

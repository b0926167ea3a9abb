"""A plain PyTorch decoder: static cache, one step captured as a CUDA graph. On a CPU the same step runs eagerly.

It is what a careful PyTorch user writes by hand: fused weights, no framework, greedy choice on the device.
"""

import json
import time
from pathlib import Path
from typing import Any

from bench.peers import NotSupported, Output, Peer, missing
from bench.peers._hf import PACKAGES, peak_bytes, pick_threads, torch_device, torch_dtype
from bench.workloads import DRAWN, SEED

Tensors = dict[str, Any]


class Decoder:
    """The model's tensors, and a cache and a graph for the last batch and length."""

    def __init__(self, job: dict[str, Any]) -> None:
        import torch

        self.torch = torch
        self.device, self.dtype = torch_device(job["platform"]), torch_dtype(job["dtype"])
        drawn = job["model"].startswith(DRAWN)
        self.config = c = job["config"] if drawn else json.loads(Path(job["model"], "config.json").read_text())
        if c.get("rope_scaling"):
            raise NotSupported("does not support scaled rotary embeddings")
        raw = self._random() if drawn else self._read(Path(job["model"]))
        self.heads, self.kv = c["num_attention_heads"], c["num_key_value_heads"]
        self.D = c.get("head_dim") or c["hidden_size"] // self.heads
        self.embed, self.norm = raw["model.embed_tokens.weight"], raw["model.norm.weight"]
        self.head = raw.get("lm_head.weight", self.embed)
        self.layers = [self._layer(raw, f"model.layers.{i}.") for i in range(c["num_hidden_layers"])]
        self.frequencies = c.get("rope_theta", 10000.0) ** (
            -torch.arange(0, self.D, 2, device=self.device, dtype=torch.float32) / self.D
        )
        self.room: tuple[int, int] | None = None
        if self.device.type == "cpu":
            pick_threads(job["cores"], lambda: self.generate([[1, 5, 7, 9]], 9))

    def _read(self, path: Path) -> Tensors:
        from safetensors.torch import load_file

        raw: Tensors = {}
        for file in sorted(path.glob("*.safetensors")):
            raw |= {k: v.to(self.device, self.dtype) for k, v in load_file(file).items()}
        return raw

    def _random(self) -> Tensors:
        """Random tensors under the names of a checkpoint."""
        torch, c = self.torch, self.config
        torch.manual_seed(SEED)
        dim, hidden, width = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"] * c["head_dim"]
        kv, vocab = c["num_key_value_heads"] * c["head_dim"], c["vocab_size"]
        attention = {"q": (width, dim), "k": (kv, dim), "v": (kv, dim), "o": (dim, width)}
        feed_forward = {"gate": (hidden, dim), "up": (hidden, dim), "down": (dim, hidden)}
        shapes = {"model.embed_tokens": (vocab, dim), "model.norm": (dim,)}
        shapes |= {} if c["tie_word_embeddings"] else {"lm_head": (vocab, dim)}
        for i in range(c["num_hidden_layers"]):
            layer = f"model.layers.{i}"
            shapes |= {f"{layer}.self_attn.{name}_proj": shape for name, shape in attention.items()}
            shapes |= {f"{layer}.mlp.{name}_proj": shape for name, shape in feed_forward.items()}
            shapes |= {f"{layer}.{name}_layernorm": (dim,) for name in ("input", "post_attention")}
        how = dict(device=self.device, dtype=self.dtype)
        return {
            f"{name}.weight": torch.randn(shape, **how) * 0.02 if len(shape) == 2 else torch.ones(shape, **how)
            for name, shape in shapes.items()
        }

    def _layer(self, raw: Tensors, prefix: str) -> Tensors:
        def join(*names: str) -> Any:
            return self.torch.cat([raw.pop(f"{prefix}{n}.weight") for n in names])

        return {
            "attn_norm": join("input_layernorm"),
            "qkv": join("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "o": join("self_attn.o_proj"),
            "ffn_norm": join("post_attention_layernorm"),
            "gate_up": join("mlp.gate_proj", "mlp.up_proj"),
            "down": join("mlp.down_proj"),
        }

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Output:
        """Prefill, then replay the step. The host waits once, at the end."""
        torch = self.torch
        batch, length = len(prompts), len(prompts[0])
        with torch.inference_mode():
            self._make_room(batch, -(-(length + new_tokens) // 128) * 128)
            begin = time.perf_counter()
            tokens = torch.tensor(prompts, device=self.device)
            logits = self._forward(tokens, torch.arange(length, device=self.device))
            self.token.copy_(logits.argmax(-1, keepdim=True))
            self.position.fill_(length)
            drawn = [self.token.clone()]
            self._wait()
            first = time.perf_counter() - begin
            for _ in range(new_tokens - 1):
                self.graph.replay() if self.graph else self._step()
                drawn.append(self.token.clone())
            ids = torch.cat(drawn, dim=1).tolist()
        return Output(ids, first, time.perf_counter() - begin - first)

    def peak_bytes(self) -> int:
        """See `_hf.peak_bytes`."""
        return peak_bytes()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()

    def _make_room(self, batch: int, length: int) -> None:
        if self.room == (batch, length):
            return
        torch, self.room, self.graph = self.torch, (batch, length), None
        shape = (batch, self.kv, length, self.D)
        self.cache = [
            [torch.zeros(shape, device=self.device, dtype=self.dtype) for _ in "kv"] for _ in range(len(self.layers))
        ]
        self.token = torch.zeros(batch, 1, device=self.device, dtype=torch.long)
        self.position = torch.zeros(1, device=self.device, dtype=torch.long)
        if self.device.type != "cuda":
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._step()

    def _step(self) -> None:
        logits = self._forward(self.token, self.position)
        self.token.copy_(logits.argmax(-1, keepdim=True))
        self.position += 1

    def _forward(self, tokens: Any, positions: Any) -> Any:
        torch, F = self.torch, self.torch.nn.functional
        batch, length = tokens.shape
        eps = self.config["rms_norm_eps"]
        angles = positions[:, None] * self.frequencies
        cos, sin = (f(angles)[None, :, None].to(self.dtype) for f in (torch.cos, torch.sin))
        # A single query sees the keys up to its own position. A prompt is causal and starts at position 0.
        seen = (
            torch.arange(self.cache[0][0].shape[2], device=self.device)[None, None, None]
            <= positions[None, None, :, None]
        )
        x = F.embedding(tokens, self.embed)
        for layer, (k_cache, v_cache) in zip(self.layers, self.cache, strict=True):
            h = F.rms_norm(x, (x.shape[-1],), layer["attn_norm"], eps)
            qkv = F.linear(h, layer["qkv"]).view(batch, length, -1, self.D)
            q, k, v = qkv.split([self.heads, self.kv, self.kv], dim=2)
            q, k = self._rotate(q, cos, sin), self._rotate(k, cos, sin)
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            k_cache.index_copy_(2, positions, k)
            v_cache.index_copy_(2, positions, v)
            grouped = self.heads != self.kv
            if length > 1:
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
            else:
                out = F.scaled_dot_product_attention(q, k_cache, v_cache, attn_mask=seen, enable_gqa=grouped)
            x = x + F.linear(out.transpose(1, 2).reshape(batch, length, -1), layer["o"])
            gate, up = F.linear(F.rms_norm(x, (x.shape[-1],), layer["ffn_norm"], eps), layer["gate_up"]).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, layer["down"])
        last = F.rms_norm(x[:, -1], (x.shape[-1],), self.norm, eps)
        return F.linear(last, self.head)

    def _rotate(self, x: Any, cos: Any, sin: Any) -> Any:
        a, b = x.chunk(2, -1)
        return self.torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def available() -> str | None:
    """Why torch is missing, else None."""
    return missing("torch", "safetensors", install="`make peers`, or pip install torch safetensors")


PEER = Peer("torch-graph", "model", available, Decoder, PACKAGES, draws=True)

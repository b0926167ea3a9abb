"""PyTorch: scaled_dot_product_attention (FlashAttention or cuDNN, as torch chooses), and plain modules for the rest."""

from collections.abc import Callable
from typing import Any

import numpy as np

from bench import opcases
from bench.measure import sets_needed, time_calls
from bench.peers import NotSupported, Peer, Rounds, missing
from bench.peers._hf import pick_threads, torch_device, torch_dtype
from bench.peers._jax_ops import CACHE, LIMIT

EPS = 1e-5
REPEAT = 8  # passes over the input sets in one graph


class TorchOps:
    """PyTorch's operations. On a GPU, many are captured in one CUDA graph, so that launches are not timed."""

    def __init__(self, job: dict[str, Any]) -> None:
        import torch

        self.torch, self.device = torch, torch_device(job["platform"])
        self.threads = torch.get_num_threads()

    def run(self, case: opcases.Case, expected: str, warmup: int, iterations: int) -> Rounds:
        """See `bench.peers.Ops`."""
        torch = self.torch
        dtype = torch_dtype(case["dtype"])
        inputs = [torch.from_numpy(a).to(self.device, dtype) for a in opcases.arrays(case).values()]
        op = build(case, torch)
        before = self._held(reset=True)
        with torch.inference_mode():
            out = op(*inputs)
        held = self._held() - before if self.device.type == "cuda" else None
        yield
        if self.device.type == "cpu":
            pick_threads(self.threads, lambda: op(*inputs))
        yield
        error = opcases.relative_error(out.float().cpu().numpy(), np.load(expected))
        reply = {"error_vs_reference": error, "peak_bytes": held, "samples": []}
        if error > opcases.TOLERANCE[case["dtype"]]:
            return reply
        size = "cpu" if self.device.type == "cpu" else "gpu"
        count = sets_needed(opcases.nbytes(case), CACHE[size], LIMIT[size])
        sets = [inputs] + [[t.roll(i, 0) if t.ndim > 1 else t.clone() for t in inputs] for i in range(1, count)]

        def work() -> list[Any]:
            with torch.inference_mode():
                return [op(*s) for s in sets]

        graph = self._captured(work) if self.device.type == "cuda" else None
        yield
        samples = (
            self._replayed(graph, warmup, iterations)
            if graph
            else time_calls(work, id, warmup=warmup, iterations=iterations)
        )
        each = count * (REPEAT if graph else 1)
        how = {"sets": count, "ops_per_call": each, "graph": graph is not None}
        return reply | {"samples": [s / each for s in samples], "how": how}

    def _held(self, *, reset: bool = False) -> int:
        if self.device.type != "cuda":
            return 0
        if reset:
            self.torch.cuda.reset_peak_memory_stats()
        return self.torch.cuda.max_memory_allocated()

    def _captured(self, work: Callable[[], Any]) -> Any:
        """One CUDA graph of `REPEAT` passes of ``work``."""
        torch = self.torch
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(REPEAT):
                work()
        return graph

    def _replayed(self, graph: Any, warmup: int, iterations: int) -> list[float]:
        """Seconds of every replay after the warm-up."""
        torch = self.torch
        samples = []
        for _ in range(warmup + iterations):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in "be")
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            samples.append(begin.elapsed_time(end) / 1e3)
        return samples[warmup:]


def build(case: opcases.Case, torch: Any) -> Callable[..., Any]:
    """The operation as a function of tensors."""
    F = torch.nn.functional

    def attention(x: Any, k: Any, v: Any) -> Any:
        causal, grouped = x.shape[1] > 1, x.shape[2] != k.shape[1]
        out = F.scaled_dot_product_attention(x.transpose(1, 2), k, v, is_causal=causal, enable_gqa=grouped)
        return out.transpose(1, 2)

    def ffn(x: Any, norm: Any, gate_up: Any, down: Any) -> Any:
        gate, up = F.linear(F.rms_norm(x, (x.shape[-1],), norm, EPS), gate_up).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, down)

    def layer(x: Any, attn_norm: Any, wqkv: Any, wo: Any, *rest: Any) -> Any:
        D, heads, kv = case["head_dim"], case["heads"], case["kv_heads"]
        h = F.rms_norm(x, (x.shape[-1],), attn_norm, EPS)
        q, k, v = F.linear(h, wqkv).view(*x.shape[:2], -1, D).split([heads, kv, kv], dim=2)
        at = torch.arange(x.shape[1], device=x.device)[:, None]
        angles = at * 10000.0 ** (-torch.arange(0, D, 2, device=x.device).float() / D)
        cos, sin = (f(angles)[None, :, None].to(x.dtype) for f in (torch.cos, torch.sin))
        q, k = (torch.cat([a * cos - b * sin, b * cos + a * sin], -1) for a, b in (q.chunk(2, -1), k.chunk(2, -1)))
        out = attention(q, k.transpose(1, 2), v.transpose(1, 2))
        return ffn(x + F.linear(out.reshape(*x.shape[:2], -1), wo), *rest)

    known = {"matmul": F.linear, "ffn": ffn, "layer": layer, "attention": attention, "decode-attention": attention}
    if case["op"] not in known:
        raise NotSupported(f"has no {case['op']}")
    return known[case["op"]]


def available() -> str | None:
    """Why torch is missing, else None."""
    return missing("torch", install="`make peers`, or pip install torch")


PEER = Peer("torch", "ops", available, TorchOps, ("torch",))

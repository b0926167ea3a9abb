"""cuDNN's attention through `jax.nn`."""

from collections.abc import Callable
from typing import Any

from bench import opcases
from bench.peers import NotSupported, Peer
from bench.peers._jax_ops import JaxOps, need_gpu, only, to_device


def build(case: opcases.Case) -> Callable[..., Any]:
    """Attention of a prompt is causal; a single query sees all keys."""
    import jax

    need_gpu()
    only(case, "attention", "decode-attention")
    if case["dtype"] == "f32":
        raise NotSupported("16-bit inputs only")
    causal = case["seq"] > 1
    return lambda x, k, v: jax.nn.dot_product_attention(x, k, v, is_causal=causal, implementation="cudnn")


def prepare(case: opcases.Case, arrays: Any) -> tuple[Any, ...]:
    """The inputs as cuDNN takes them: [B, S, heads, D]."""
    x, k, v = to_device(case, arrays)
    return x, k.swapaxes(1, 2) + 0, v.swapaxes(1, 2) + 0


def available() -> str | None:
    """Why cuDNN is missing, else None. It comes with jax's CUDA plugins."""
    from importlib.util import find_spec

    found = find_spec("jax_cuda13_plugin") or find_spec("jax_cuda12_plugin")
    return None if found else "jax has no CUDA here (pip install jax[cuda13])"


PEER = Peer("cudnn", "ops", available, lambda job: JaxOps(build, prepare), ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12"))

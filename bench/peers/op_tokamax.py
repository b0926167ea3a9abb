"""tokamax: attention, and the gated product of a feed-forward."""

import importlib
import sys
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from bench import opcases
from bench.peers import Peer, missing
from bench.peers._jax_ops import JaxOps, need_gpu, only, to_device
from bench.peers.op_cudnn import prepare as attention_inputs

EPS = 1e-5


def _import() -> Any:
    """Import tokamax without its profiler, a package of 30 MB that is not used here."""
    if "xprof" not in sys.modules and find_spec("xprof") is None:
        for name in ("xprof", "xprof.cli", "xprof.cli.tools", "xprof.cli.tools.get_kernel_stats_tool"):
            module = sys.modules[name] = ModuleType(name)
            module.__path__ = []
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, module)
    return importlib.import_module("tokamax")


def build(case: opcases.Case) -> Callable[..., Any]:
    """tokamax's Mosaic kernels. For the feed-forward it has gate, up and SwiGLU; the rest is jax.numpy."""
    import jax
    import jax.numpy as jnp

    tokamax = _import()
    need_gpu()
    only(case, "attention", "decode-attention", "ffn")
    if case["op"] != "ffn":
        causal = case["seq"] > 1
        return lambda x, k, v: tokamax.dot_product_attention(x, k, v, is_causal=causal, implementation="mosaic")

    def ffn(x: Any, norm: Any, gate_up: Any, down: Any) -> Any:
        x32 = x.astype(jnp.float32)
        h = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + EPS) * norm.astype(jnp.float32)
        act = tokamax.gated_linear_unit(h.astype(x.dtype), gate_up, activation=jax.nn.silu, implementation="mosaic")
        return x + jnp.dot(act, down, preferred_element_type=jnp.float32).astype(x.dtype)

    return ffn


def prepare(case: opcases.Case, arrays: Any) -> tuple[Any, ...]:
    """The weights as [in, 2, hidden] and [hidden, dim]. Making them is not timed."""
    if case["op"] != "ffn":
        return attention_inputs(case, arrays)
    x, norm, gate_up, down = to_device(case, arrays)
    both = gate_up.reshape(2, case["hidden"], case["dim"]).transpose(2, 0, 1)
    return x, norm, both + 0, down.T + 0


PEER = Peer(
    "tokamax",
    "ops",
    lambda: missing("tokamax", install="pip install tokamax"),
    lambda job: JaxOps(build, prepare),
    ("tokamax",),
)

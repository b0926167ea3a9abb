"""The Mosaic attention kernel from jax's examples. It takes float16 and causal prompts."""

from collections.abc import Callable
from typing import Any

from bench import opcases
from bench.peers import NotSupported, Peer
from bench.peers._jax_ops import JaxOps, need_gpu, only
from bench.peers.op_cudnn import available, prepare


def build(case: opcases.Case) -> Callable[..., Any]:
    """The kernel, with the tiles that its own benchmark uses for heads of 128."""
    need_gpu()
    only(case, "attention")
    if case["dtype"] != "f16":
        raise NotSupported("float16 only (--dtype f16)")
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    tiles = attention_mgpu.TuningConfig(block_q=64, block_kv=128, max_concurrent_steps=2, causal=True)
    scale = case["head_dim"] ** -0.5  # the example does not scale the scores
    return lambda x, k, v: attention_mgpu.attention(x * scale, k, v, tiles)


PEER = Peer("jax-example", "ops", available, lambda job: JaxOps(build, prepare))

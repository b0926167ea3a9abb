"""The Mosaic attention kernel among jax's own examples. It takes float16 and causal prompts."""

from collections.abc import Callable
from typing import Any

from bench import opcases
from bench.peers import NotSupported, Peer
from bench.peers._jax_ops import JaxOps, need_gpu, only
from bench.peers.op_cudnn import available, prepare


def build(case: opcases.Case) -> Callable[..., Any]:
    """With the tiles that its own benchmark prefers for heads of 128."""
    need_gpu()
    only(case, "attention")
    if case["dtype"] != "f16":
        raise NotSupported("float16 only (--dtype f16)")
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    tiles = attention_mgpu.TuningConfig(block_q=64, block_kv=128, max_concurrent_steps=2, causal=True)
    scale = case["head_dim"] ** -0.5  # the example leaves the scores unscaled
    return lambda x, k, v: attention_mgpu.attention(x * scale, k, v, tiles)


PEER = Peer("jax-example", "ops", available, lambda job: JaxOps(build, prepare))

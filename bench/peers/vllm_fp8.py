"""vLLM with weights and activations in fp8: it quantises the run's float weights while it loads them."""

import dataclasses
import functools

from bench.peers import vllm

PEER = dataclasses.replace(
    vllm.PEER, name="vllm-fp8", open=functools.partial(vllm.open_model, quantization="fp8"), dtype="fp8"
)

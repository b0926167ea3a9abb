"""Llama's operations: each a `jax.numpy` reference and, where there is one, a Pallas kernel held to it."""

from pallas_kernels.attention import DECODE_QUERIES, attention, decode_attention
from pallas_kernels.decode_step import StepWeights, decode_step
from pallas_kernels.dispatch import BACKENDS, Choice, Op, Unsupported, record
from pallas_kernels.draw import draw
from pallas_kernels.ffn import ffn
from pallas_kernels.indexed import Indexed, cut_out
from pallas_kernels.matmul import Weight, matmul
from pallas_kernels.qkv import qkv
from pallas_kernels.quantized import QuantizedTensor, dequantize, group_size, quantize
from pallas_kernels.rms_norm import rms_norm

OPS: dict[str, Op] = {
    op.name: op for op in (rms_norm, matmul, qkv, attention, decode_attention, ffn, decode_step, draw)
}

__all__ = [
    "BACKENDS",
    "DECODE_QUERIES",
    "OPS",
    "Choice",
    "Indexed",
    "Op",
    "QuantizedTensor",
    "StepWeights",
    "Unsupported",
    "Weight",
    "attention",
    "cut_out",
    "decode_attention",
    "decode_step",
    "dequantize",
    "draw",
    "ffn",
    "group_size",
    "matmul",
    "qkv",
    "quantize",
    "record",
    "rms_norm",
]

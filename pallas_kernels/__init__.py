"""Llama's operations: each a `jax.numpy` reference and, where there is one, a Pallas kernel held to it."""

from .attention import DECODE_QUERIES, attention, decode_attention
from .decode_step import StepWeights, decode_step
from .dispatch import BACKENDS, Choice, Op, Unsupported, record, require_hopper
from .draw import draw, log_probability
from .ffn import ffn
from .layer_view import Indexed, cut_out
from .matmul import Weight, matmul
from .paged_attention import PAGE, paged_attention, write_pages
from .qkv import qkv, rotate, split_heads, write
from .quantized import QuantizedTensor, dequantize, group_size, quantize
from .rms_norm import rms_norm

OPS: dict[str, Op] = {
    op.name: op for op in (rms_norm, matmul, qkv, attention, decode_attention, paged_attention, ffn, decode_step, draw)
}

__all__ = [
    "BACKENDS",
    "DECODE_QUERIES",
    "OPS",
    "PAGE",
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
    "log_probability",
    "matmul",
    "paged_attention",
    "qkv",
    "quantize",
    "record",
    "require_hopper",
    "rms_norm",
    "rotate",
    "split_heads",
    "write",
    "write_pages",
]

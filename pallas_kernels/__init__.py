"""Llama's operations: each a `jax.numpy` reference and, where there is one, a Pallas kernel held to it."""

from .arch import Arch, known, pinned
from .attend_and_write import attend_and_write, attend_and_write_reference
from .attention import DECODE_QUERIES, attention, decode_attention
from .decode_step import StepWeights, decode_step
from .dispatch import BACKENDS, Choice, Kernel, Op, Recorded, Unsupported, record, recorded, require_kernels
from .draw import draw, log_probability
from .ffn import ffn, ffn_reference
from .finish_layer import finish_layer
from .formats import WeightFormat
from .layer_view import LayerView, materialize
from .matmul import NO_BIAS, Weight, affine, matmul, takes_limbs
from .paged_attention import PAGE, paged_attention
from .peers import why_apart
from .qkv import START_MULTIPLE, qkv, qkv_reference, rotate, split_heads, write, write_pages
from .quantized import GROUPS, QuantizedTensor, dequantize, group_size, quantize
from .rms_norm import rms_norm
from .split_rows import SplitRows, split_rows
from .transforms import vary_with

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        rms_norm,
        matmul,
        qkv,
        attention,
        decode_attention,
        paged_attention,
        attend_and_write,
        ffn,
        finish_layer,
        decode_step,
        draw,
    )
}

__all__ = [
    "BACKENDS",
    "DECODE_QUERIES",
    "GROUPS",
    "NO_BIAS",
    "OPS",
    "PAGE",
    "START_MULTIPLE",
    "Arch",
    "Choice",
    "Kernel",
    "LayerView",
    "Op",
    "QuantizedTensor",
    "Recorded",
    "SplitRows",
    "StepWeights",
    "Unsupported",
    "Weight",
    "WeightFormat",
    "affine",
    "attend_and_write",
    "attend_and_write_reference",
    "attention",
    "decode_attention",
    "decode_step",
    "dequantize",
    "draw",
    "ffn",
    "ffn_reference",
    "finish_layer",
    "group_size",
    "known",
    "log_probability",
    "materialize",
    "matmul",
    "paged_attention",
    "pinned",
    "qkv",
    "qkv_reference",
    "quantize",
    "record",
    "recorded",
    "require_kernels",
    "rms_norm",
    "rotate",
    "split_heads",
    "split_rows",
    "takes_limbs",
    "vary_with",
    "why_apart",
    "write",
    "write_pages",
]

"""The phases of a decode step, in their order. Plan, buffers, barrier counts and checks are derived from this table.

A new phase is one entry here and its prologue (or its work): docs/kernels.md adds a norm of q and k as an example.
"""

from . import attention
from .epilogues import add_residual, identity, swiglu
from .phase import ItemPhase, Phase, ProductPhase
from .prologues import join_key_splits, plain, rms_norm

QKV = ProductPhase(
    "qkv", reads=("x",), writes=("qkv",), weight="wqkv", inner="dim", outer="qkv_width",
    prologue=rms_norm, gain="attn_norm", epilogue=identity, scale_slot=0,
)  # fmt: skip
ATTEND = ItemPhase(
    "attend", reads=("qkv",), writes=("parts", "logs", "k", "v"), prefetch=attention.prefetch, work=attention.attend
)
OUT = ProductPhase(
    "o", reads=("parts", "logs"), writes=("x_mid",), weight="wo", inner="q_width", outer="dim",
    prologue=join_key_splits, epilogue=add_residual, residual="x", over_devices=True, scale_slot=1,
)  # fmt: skip
GATE_UP = ProductPhase(
    "gate_up", reads=("x_mid",), writes=("hidden",), weight="w_gate_up", inner="dim", outer="hidden", halves=2,
    prologue=rms_norm, gain="ffn_norm", epilogue=swiglu, scale_slot=0,
)  # fmt: skip
DOWN = ProductPhase(
    "down", reads=("hidden",), writes=("x",), weight="w_down", inner="hidden", outer="dim",
    prologue=plain, epilogue=add_residual, residual="x_mid", over_devices=True, scale_slot=1,
)  # fmt: skip

LAYER_PHASES: tuple[Phase, ...] = (QKV, ATTEND, OUT, GATE_UP, DOWN)

# Once, after the last layer.
HEAD = ProductPhase(
    "head", reads=("x",), writes=("logits",), weight="head", inner="dim", outer="vocab",
    prologue=rms_norm, gain="norm", epilogue=identity, scale_slot=0,
)  # fmt: skip

"""`LlamaConfig`, the architecture of a model, and how it is read from and written to ``config.json``.

It is frozen and hashable, so it is static under jit. `Backend` and `Quant` are the string choices that many functions
take.
"""

import dataclasses
import json
import math
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jllama.errors import InputError

Backend = Literal["auto", "xla", "pallas"]  # which implementation an op gets; see pallas_kernels/dispatch.py
Quant = Literal["none", "int8", "int4"]  # the weight format that `load` and `init` use for matrices

_MAX_JSON_BYTES = 16 << 20


@dataclass(frozen=True)
class RopeScaling:
    """Scaling of the rotary frequencies. ``kind`` is ``"linear"`` or ``"llama3"``; only llama3 uses the last three
    fields."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192


@dataclass(frozen=True)
class LlamaConfig:
    """The architecture of a Llama model. Field names follow the paper."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    hidden_dim: int
    vocab_size: int
    max_seq_len: int = 4096
    head_dim: int = 0  # 0: dim / n_heads
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    attention_bias: bool = False  # of q, k, v and o
    mlp_bias: bool = False  # of gate, up and down
    bos_id: int = 1
    eos_ids: tuple[int, ...] = (2,)

    def __post_init__(self) -> None:
        if self.head_dim == 0:
            if self.dim % self.n_heads:
                raise InputError(f"config: dim {self.dim} is not a multiple of n_heads {self.n_heads}")
            object.__setattr__(self, "head_dim", self.dim // self.n_heads)
        if self.n_heads % self.n_kv_heads:
            raise InputError(f"config: n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.head_dim % 2:
            raise InputError(
                f"config: head_dim: expected an even number (rotary works on pairs), found {self.head_dim}"
            )

    @property
    def n_params(self) -> int:
        """Number of parameters of the model."""
        attention = self.dim * self.head_dim * (2 * self.n_heads + 2 * self.n_kv_heads)
        layer = attention + 3 * self.dim * self.hidden_dim + 2 * self.dim
        if self.attention_bias:
            layer += self.head_dim * (self.n_heads + 2 * self.n_kv_heads) + self.dim
        if self.mlp_bias:
            layer += 2 * self.hidden_dim + self.dim
        return self.n_layers * layer + self.dim + self.vocab_size * self.dim * (1 if self.tie_embeddings else 2)

    def replace(self, **changes: Any) -> "LlamaConfig":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def _llama2(
    dim: int,
    n_layers: int,
    n_heads: int,
    hidden_dim: int,
    n_kv_heads: int = 0,
    **more: Any,
) -> LlamaConfig:
    settings: dict[str, Any] = {"vocab_size": 32000} | more
    return LlamaConfig(dim, n_layers, n_heads, n_kv_heads or n_heads, hidden_dim, **settings)


def _llama3(dim: int, n_layers: int, n_heads: int, hidden_dim: int, **more: Any) -> LlamaConfig:
    settings: dict[str, Any] = dict(vocab_size=128_256, rope_theta=500_000.0, bos_id=128_000, eos_ids=(128_001,))
    settings |= dict(max_seq_len=131_072) if "rope_scaling" in more else {}
    return LlamaConfig(dim, n_layers, n_heads, 8, hidden_dim, **settings | more)


def _stretched(factor: float) -> RopeScaling:
    """The rotary scaling of Llama 3.1 and later, from 8,192 positions on."""
    return RopeScaling("llama3", factor, 1.0, 4.0, 8192)


_STORIES: dict[str, Any] = dict(max_seq_len=1024, tie_embeddings=True)

PRESETS: dict[str, LlamaConfig] = {
    "7b": _llama2(4096, 32, 32, 11008),
    "13b": _llama2(5120, 40, 40, 13824),
    "70b": _llama2(8192, 80, 64, 28672, n_kv_heads=8),
    "llama3-8b": _llama3(4096, 32, 32, 14336, max_seq_len=8192),
    "llama3.1-405b": _llama3(16384, 126, 128, 53248, rope_scaling=_stretched(8.0)),
    "llama3.2-1b": _llama3(2048, 16, 32, 8192, rope_scaling=_stretched(32.0), tie_embeddings=True),
    "tinyllama-1.1b": _llama2(2048, 22, 32, 5632, n_kv_heads=4, max_seq_len=2048),
    "stories110m": _llama2(768, 12, 12, 2048, **_STORIES),
    "stories42m": _llama2(512, 8, 8, 1376, **_STORIES),
    "stories15m": _llama2(288, 6, 6, 768, **_STORIES | {"max_seq_len": 256}),
    "stories260k": _llama2(64, 5, 8, 172, n_kv_heads=4, vocab_size=512, **_STORIES | {"max_seq_len": 512}),
    "demo": _llama2(192, 6, 3, 448, n_kv_heads=1, vocab_size=1024, **_STORIES | {"max_seq_len": 512}),
}


def preset(name: str) -> LlamaConfig:
    """The preset configuration with this name."""
    if name not in PRESETS:
        raise InputError(f"preset: expected one of {', '.join(PRESETS)}, found {name!r}")
    return PRESETS[name]


def layer_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every field that a `Layer` of such a model has."""
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    shapes = {
        "attn_norm": (config.dim,),
        "wqkv": (q + 2 * kv, config.dim),
        "wo": (config.dim, q),
        "ffn_norm": (config.dim,),
        "w_gate_up": (2 * config.hidden_dim, config.dim),
        "w_down": (config.dim, config.hidden_dim),
    }
    attention = {"bqkv": (q + 2 * kv,), "bo": (config.dim,)} if config.attention_bias else {}
    mlp = {"b_gate_up": (2 * config.hidden_dim,), "b_down": (config.dim,)} if config.mlp_bias else {}
    return shapes | attention | mlp


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of bounded size."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe could block forever
            raise InputError(f"{path}: expected a file, found something else")
        if status.st_size > _MAX_JSON_BYTES:
            raise InputError(f"{path}: expected at most {_MAX_JSON_BYTES} bytes of JSON, found {status.st_size}")
        value = json.loads(path.read_bytes())
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


class Fields:
    """Reads fields of an untrusted dictionary. Types and ranges are checked; errors name the file and the field."""

    def __init__(self, where: str, values: dict[str, Any]) -> None:
        self.where, self.values = where, values

    def integer(self, name: str, default: int | None = None, low: int = 1, high: int = 1 << 24) -> int:
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise InputError(f"{self.where}: {name}: expected an integer from {low} to {high}, found {_short(value)}")
        return value

    def number(
        self,
        name: str,
        default: float | None = None,
        low: float = 0.0,
        high: float = 1e12,
    ) -> float:
        value = self._get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not low < value <= high:
            raise InputError(
                f"{self.where}: {name}: expected a number above {low:g} up to {high:g}, found {_short(value)}"
            )
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise InputError(f"{self.where}: {name}: expected true or false, found {_short(value)}")
        return value

    def ids(self, name: str, default: tuple[int, ...], vocab_size: int) -> tuple[int, ...]:
        value = self._get(name, default)
        ids = tuple(value) if isinstance(value, list | tuple) else (value,)
        if not 1 <= len(ids) <= 64 or not all(
            isinstance(i, int) and not isinstance(i, bool) and 0 <= i < vocab_size for i in ids
        ):
            raise InputError(f"{self.where}: {name}: expected token ids below {vocab_size}, found {_short(value)}")
        return ids

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is None and default is None:
            raise InputError(f"{self.where}: {name}: missing")
        return default if value is None else value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def from_hf(values: dict[str, Any], where: str = "config.json") -> LlamaConfig:
    """Read the ``config.json`` of a Hugging Face checkpoint. ``model_type`` must be ``llama``, or ``mistral`` if the
    model does not use its sliding window."""
    fields = Fields(where, values)
    kind = values.get("model_type")
    if kind not in ("llama", "mistral"):
        raise InputError(f"{where}: model_type: expected 'llama' or 'mistral', found {_short(kind)}")
    if fields.flag("bias", False):
        raise InputError(f"{where}: bias: expected false (attention_bias and mlp_bias are known), found true")
    if (activation := values.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise InputError(f"{where}: hidden_act: expected 'silu', found {_short(activation)}")
    if (part := values.get("partial_rotary_factor")) not in (None, 1):
        raise InputError(f"{where}: partial_rotary_factor: expected 1, found {_short(part)}")
    n_heads = fields.integer("num_attention_heads", high=4096)
    vocab_size = fields.integer("vocab_size")
    max_seq_len = fields.integer("max_position_embeddings", 131072 if kind == "mistral" else 2048)
    if kind == "mistral":
        _check_window(values, max_seq_len, where)
    rope = _rope_parameters(values, where)
    try:
        return LlamaConfig(
            dim=fields.integer("hidden_size", high=1 << 20),
            n_layers=fields.integer("num_hidden_layers", high=4096),
            n_heads=n_heads,
            n_kv_heads=fields.integer("num_key_value_heads", 8 if kind == "mistral" else n_heads, high=4096),
            hidden_dim=fields.integer("intermediate_size"),
            vocab_size=vocab_size,
            max_seq_len=max_seq_len,
            head_dim=fields.integer("head_dim", 0, low=0, high=1 << 16),
            norm_eps=fields.number("rms_norm_eps", 1e-6, high=1.0),
            rope_theta=Fields(where, rope).number("rope_theta", 10000.0),
            rope_scaling=_rope_scaling(rope, where),
            tie_embeddings=fields.flag("tie_word_embeddings", False),
            attention_bias=fields.flag("attention_bias", False),
            mlp_bias=fields.flag("mlp_bias", False),
            bos_id=fields.ids("bos_token_id", (1,), vocab_size)[0],
            eos_ids=fields.ids("eos_token_id", (2,), vocab_size),
        )
    except InputError as error:
        raise (error if str(error).startswith(where) else InputError(f"{where}: {error}")) from None


def _check_window(values: dict[str, Any], max_seq_len: int, where: str) -> None:
    """Refuse a sliding window that is shorter than the context. Such attention is not that of a Llama."""
    window = values.get("sliding_window", 4096)  # transformers' default
    if window is not None and (not isinstance(window, int) or window < max_seq_len):
        raise InputError(
            f"{where}: sliding_window: expected null or at least max_position_embeddings {max_seq_len}, "
            f"found {_short(window)} (a smaller max_position_embeddings keeps a model within its window)"
        )


def _rope_parameters(values: dict[str, Any], where: str) -> dict[str, Any]:
    """The rotary settings as one dictionary: ``rope_parameters`` in transformers 5, ``rope_theta`` and ``rope_scaling``
    in earlier versions."""
    rope = {"rope_theta": values.get("rope_theta")}
    for name in ("rope_scaling", "rope_parameters"):
        part = values.get(name) or {}
        if not isinstance(part, dict):
            raise InputError(f"{where}: {name}: expected an object, found {_short(part)}")
        rope |= part
    return rope


def _rope_scaling(rope: dict[str, Any], where: str) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    fields = Fields(f"{where}: rope_scaling", rope)
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", fields.number("factor"))
    if kind == "llama3":
        scaling = RopeScaling(
            "llama3",
            fields.number("factor"),
            fields.number("low_freq_factor"),
            fields.number("high_freq_factor"),
            fields.integer("original_max_position_embeddings"),
        )
        if scaling.low_freq_factor >= scaling.high_freq_factor:
            raise InputError(f"{where}: rope_scaling: expected low_freq_factor below high_freq_factor, found {scaling}")
        return scaling
    raise InputError(f"{where}: rope_scaling: expected type 'default', 'linear' or 'llama3', found {_short(kind)}")


def to_hf(config: LlamaConfig, dtype: str) -> dict[str, Any]:
    """The ``config.json`` of a model, for transformers and for this library."""
    values: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "hidden_act": "silu",
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids),
        "torch_dtype": dtype,
    }
    if config.rope_scaling is not None:
        values["rope_scaling"] = _scaling_to_hf(config.rope_scaling)
    assert all(math.isfinite(v) for v in values.values() if isinstance(v, float))
    return values


def _scaling_to_hf(scaling: RopeScaling) -> dict[str, Any]:
    values: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        values |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        }
    return values

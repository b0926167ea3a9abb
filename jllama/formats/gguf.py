"""GGUF checkpoints. The config and the vocabulary come from the metadata.

Q8_0 and Q4_0 tensors keep their integers, because their blocks of 32 values with a float16 scale are groups as in
`Integers`. The gguf package dequantises tensors of the other quantised types.
"""

from pathlib import Path

import ml_dtypes
import numpy as np

from jllama.config import Fields, LlamaConfig, RopeScaling
from jllama.errors import InputError
from jllama.formats.files import label
from jllama.formats.gguf_file import GgufFile, GgufTensor, read_gguf
from jllama.formats.gguf_vocabulary import vocabulary_in
from jllama.formats.layout import BIASES, bias_flag, expected_shapes, file_name
from jllama.formats.source import Integers, Quantization, Source, Tensor, config_at
from jllama.formats.transform import from_interleaved

LAYER = {
    "attn_norm": "attn_norm",
    "wq": "attn_q",
    "wk": "attn_k",
    "wv": "attn_v",
    "wo": "attn_output",
    "ffn_norm": "ffn_norm",
    "w_gate": "ffn_gate",
    "w_up": "ffn_up",
    "w_down": "ffn_down",
}
MODEL = {"embed": "token_embd", "norm": "output_norm", "lm_head": "output"}
ROPE_FACTORS = "rope_freqs.weight"
_PLAIN = {
    "F32": ("float32", np.dtype(np.float32)),
    "F16": ("float16", np.dtype(np.float16)),
    "BF16": ("bfloat16", np.dtype(ml_dtypes.bfloat16)),
}
GROUP = 32  # of Q8_0 and Q4_0


def recognise(path: Path) -> bool:
    """Whether ``path`` is a file with the suffix ``.gguf`` or with GGUF's magic number."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return path.suffix == ".gguf" or file.read(4) == b"GGUF"


def names_of(config: LlamaConfig) -> dict[str, str]:
    """Our name of every tensor -> GGUF's."""
    names = {}
    for name in expected_shapes(config):
        prefix, _, field = name.rpartition(".")
        block = f"blk.{prefix.removeprefix('layers.')}."
        names[name] = f"{block}{file_name(field, LAYER)}" if prefix else f"{MODEL[name]}.weight"
    return names


def open_gguf(path: Path, *, links: bool = False) -> Source:
    """Open a GGUF file that holds a whole model. ``links`` has no effect on the file itself; it is kept for a tokenizer
    that is loaded later."""
    file = read_gguf(path)
    config = _config(file)
    names = names_of(config)
    known = set(names.values())
    if bias := next((n for n in file.tensors if n.startswith("blk.") and n.endswith(".bias") and n not in known), None):
        raise InputError(f"{path}: {label(bias)}: expected biases of projections only, found another")
    tensors = {
        ours: from_interleaved(_tensor(file, theirs), config, ours)
        for ours, theirs in names.items()
        if theirs in file.tensors
    }
    vocabulary = vocabulary_in(file, config.vocab_size)
    return Source(path, "gguf", config, tensors, vocabulary, metadata=file.fields, links=links)


def _config(file: GgufFile) -> LlamaConfig:
    where = str(file.file.path)
    fields = Fields(where, dict(file.fields))
    architecture = file.fields.get("general.architecture")
    if architecture != "llama":
        raise InputError(f"{where}: general.architecture: expected 'llama', found {str(architecture)[:60]!r}")
    if file.fields.get("split.count", 1) not in (0, 1):
        raise InputError(f"{where}: split.count: expected a whole file, found {str(file.fields['split.count'])[:60]!r}")
    if fields.integer("llama.expert_count", 0, low=0):
        raise InputError(f"{where}: llama.expert_count: expected 0 (experts are not supported), found more")
    embed = file.tensors.get("token_embd.weight")
    if embed is None:
        raise InputError(f"{where}: token_embd.weight: missing")
    n_heads = fields.integer("llama.attention.head_count", high=4096)
    dim = fields.integer("llama.embedding_length", high=1 << 20)
    head_dim = fields.integer("llama.attention.key_length", max(1, dim // n_heads), high=1 << 16)
    if (rotated := fields.integer("llama.rope.dimension_count", head_dim, high=1 << 16)) != head_dim:
        raise InputError(f"{where}: llama.rope.dimension_count: expected {head_dim} as a head has, found {rotated}")
    vocab_size = fields.integer("llama.vocab_size", embed.shape[0])
    theta = fields.number("llama.rope.freq_base", 10000.0)
    config = config_at(
        where,
        dim=dim,
        n_layers=fields.integer("llama.block_count", high=4096),
        n_heads=n_heads,
        n_kv_heads=fields.integer("llama.attention.head_count_kv", n_heads, high=4096),
        hidden_dim=fields.integer("llama.feed_forward_length"),
        vocab_size=vocab_size,
        max_seq_len=fields.integer("llama.context_length", 4096),
        head_dim=head_dim,
        norm_eps=_short_float(fields.number("llama.attention.layer_norm_rms_epsilon", 1e-5, high=1.0)),
        rope_theta=_short_float(theta),
        tie_embeddings="output.weight" not in file.tensors,
        **_bias_flags(file),
        bos_id=fields.ids("tokenizer.ggml.bos_token_id", (1,), vocab_size)[0],
        eos_ids=_ends(fields, vocab_size),
    )
    return config.replace(rope_scaling=_scaling(file, fields, config))


def _bias_flags(file: GgufFile) -> dict[str, bool]:
    """No field says which biases there are: those of the first layer do."""
    found = {bias_flag(ours) for ours in BIASES if f"blk.0.{file_name(ours, LAYER)}" in file.tensors}
    return {flag: True for flag in found if flag is not None}


def _ends(fields: Fields, vocab_size: int) -> tuple[int, ...]:
    """What ends a text, and what ends a turn."""
    ends = fields.ids("tokenizer.ggml.eos_token_id", (2,), vocab_size)
    for name in ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"):
        ends += fields.ids(name, ends, vocab_size)
    return tuple(dict.fromkeys(ends))


def _short_float(value: float) -> float:
    """The shortest decimal number with the same float32 value. The file stores 1e-5, for example, as float32."""
    return float(str(np.float32(value)))


def _scaling(file: GgufFile, fields: Fields, config: LlamaConfig) -> RopeScaling | None:
    kind = fields.values.get("llama.rope.scaling.type", "none")
    where = f"{file.file.path}: llama.rope.scaling"
    if kind == "linear":
        return RopeScaling("linear", _short_float(fields.number("llama.rope.scaling.factor")))
    if kind != "none":
        raise InputError(f"{where}.type: expected 'none' or 'linear', found {str(kind)[:60]!r}")
    if ROPE_FACTORS not in file.tensors:
        return None
    table = _tensor(file, ROPE_FACTORS).read().reshape(-1).astype(np.float32)
    # The file holds the result of Llama 3's formula, not its parameters. The factor is 8 in Llama 3.1 and 32 in 3.2.
    for scaling in (RopeScaling("llama3", 8.0), RopeScaling("llama3", 32.0)):
        expected = rope_factors(config.replace(rope_scaling=scaling))
        if table.shape == expected.shape and np.allclose(table, expected, rtol=1e-3):
            return scaling
    raise InputError(f"{file.file.path}: {ROPE_FACTORS}: expected the factors of Llama 3.1 or 3.2, found others")


def rope_factors(config: LlamaConfig) -> np.ndarray:
    """[head_dim / 2] float32: the factor by which scaling divides the frequency of each pair."""
    from jllama.rope import inverse_frequencies  # imports jax, which most conversions do not need

    plain = inverse_frequencies(config.replace(rope_scaling=None))
    return (plain / inverse_frequencies(config)).astype(np.float32)


def _tensor(file: GgufFile, name: str) -> Tensor:
    tensor = file.tensors[name]
    where = f"{file.file.path}: {name}"
    if tensor.kind in _PLAIN:
        dtype, numpy_dtype = _PLAIN[tensor.kind]
        view = file.file.view(numpy_dtype, tensor.shape, tensor.begin)
        return Tensor(tensor.shape, dtype, where, lambda begin, end: view[begin:end])
    if len(tensor.shape) != 2:
        raise InputError(f"{where}: shape: expected two dimensions, found {list(tensor.shape)}")
    raw = file.file.view(np.dtype(np.uint8), (tensor.shape[0], tensor.row_bytes), tensor.begin)
    if tensor.kind in ("Q8_0", "Q4_0"):
        unpack = _q8_0 if tensor.kind == "Q8_0" else _q4_0
        # If a row is one block, it has one scale, which is the same as no groups.
        group = None if tensor.shape[1] == GROUP else GROUP

        def columns(begin: int, end: int, left: int, right: int) -> Integers:
            return unpack(_blocks_of(raw[begin:end], tensor, left, right))

        quant = Quantization("int8" if tensor.kind == "Q8_0" else "int4", group)
        return Tensor(tensor.shape, "float16", where, lambda b, e: unpack(raw[b:e]), quant, columns)
    return _dequantised(tensor, where, raw)


def _blocks_of(raw: np.ndarray, tensor: GgufTensor, left: int, right: int) -> np.ndarray:
    """The bytes [rows, n] of the blocks that hold a range of columns."""
    size = tensor.block_bytes
    return raw[:, left // tensor.block * size : -(-right // tensor.block) * size]


def _dequantised(tensor: GgufTensor, where: str, raw: np.ndarray) -> Tensor:
    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError:
        raise InputError(
            f"{where}: type {tensor.kind}: needs the gguf package (pip install 'jllama[convert]')"
        ) from None
    kind = GGMLQuantizationType[tensor.kind]

    def rows(begin: int, end: int) -> np.ndarray:
        with np.errstate(all="ignore"):  # a damaged scale may overflow; writers count values that are not finite
            return quants.dequantize(raw[begin:end], kind).astype(np.float32, copy=False)

    def columns(begin: int, end: int, left: int, right: int) -> np.ndarray:
        part = np.ascontiguousarray(_blocks_of(raw[begin:end], tensor, left, right))
        with np.errstate(all="ignore"):
            floats = quants.dequantize(part, kind).astype(np.float32, copy=False)
        return floats[:, left % tensor.block :][:, : right - left]

    return Tensor(tensor.shape, "float32", where, rows, columns=columns)


def _blocks(raw: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Split rows of blocks into scales [out, blocks] and integer bytes [out, blocks, n]. A block of ``size`` bytes is a
    float16 scale followed by integers."""
    blocks = raw.reshape(raw.shape[0], -1, size)
    return blocks[..., :2].copy().view(np.float16)[..., 0], blocks[..., 2:]


def _q8_0(raw: np.ndarray) -> Integers:
    scale, data = _blocks(raw, 34)
    return Integers(data.reshape(raw.shape[0], -1).view(np.int8), scale)


def _q4_0(raw: np.ndarray) -> Integers:
    """Unpack 16 bytes per block. The low nibbles are values 0 to 15 and the high nibbles are values 16 to 31, each with
    an offset of 8."""
    scale, data = _blocks(raw, 18)
    out = np.empty((*data.shape[:2], GROUP), np.int8)
    out[..., :16] = (data & 0xF).view(np.int8) - 8
    out[..., 16:] = (data >> 4).view(np.int8) - 8
    return Integers(out.reshape(raw.shape[0], -1), scale)

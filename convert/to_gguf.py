"""GGUF version 3 written: floats only, with config, tokenizer and chat template in the metadata."""

import struct
from pathlib import Path
from typing import Any

import numpy as np

from jllama.config import LlamaConfig
from jllama.errors import InputError
from jllama.formats.bpe import BpeVocabulary
from jllama.formats.gguf import ROPE_FACTORS, names_of, rope_factors
from jllama.formats.gguf_file import MAGIC
from jllama.formats.native import Export
from jllama.formats.output import OutputFile, Watch
from jllama.formats.replaceable import GGUF, GGUF_WRITER
from jllama.formats.source import DTYPES, Source, Tensor
from jllama.formats.tokenizer_json import from_tokenizer_json
from jllama.formats.transform import as_dtype, as_floats, to_interleaved
from jllama.formats.vocabulary import Vocabulary, padded, vocabulary_of
from jllama.text.templates import template_of

ALIGN = 32
_KINDS = {"float32": 0, "float16": 1, "bfloat16": 30}  # ggml's tensor types
_FILE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 32}  # llama.cpp's file types
_LAYOUTS = {"u32": (4, "<I"), "i32": (5, "<i"), "f32": (6, "<f"), "bool": (7, "<?")}


def gguf(source: Source) -> Export:
    """An export of the source's floats to a GGUF file. Norms are float32, as llama.cpp requires."""
    source = as_floats(source)
    names = names_of(source.config)
    tensors = {
        theirs: to_interleaved(_kept(source.tensors[ours]), source.config, ours) for ours, theirs in names.items()
    }
    if source.config.rope_scaling is not None and source.config.rope_scaling.kind == "llama3":
        factors = rope_factors(source.config)
        tensors[ROPE_FACTORS] = Tensor(factors.shape, "float32", ROPE_FACTORS, lambda b, e: factors[b:e])
    head, places, size = _layout(_fields(source), tensors)

    def write(path: Path, watch: Watch) -> None:
        with OutputFile(path, watch) as file:
            file.put(0, head)
            for name, tensor in tensors.items():
                file.put_floats(places[name], tensor)
            if size % ALIGN:  # the end is padded, because readers map whole alignment units
                file.put(size, bytes(-size % ALIGN))

    return Export(size, write, GGUF)


def _kept(tensor: Tensor) -> Tensor:
    return as_dtype(tensor, "float32") if len(tensor.shape) == 1 else tensor


def _layout(fields: list[bytes], tensors: dict[str, Tensor]) -> tuple[bytes, dict[str, int], int]:
    infos, offset, end, offsets = [], 0, 0, {}
    for name, tensor in tensors.items():
        shape = b"".join(struct.pack("<Q", n) for n in reversed(tensor.shape))
        infos.append(_text(name) + struct.pack("<I", len(tensor.shape)) + shape)
        infos.append(struct.pack("<IQ", _KINDS[tensor.dtype], offset))
        offsets[name] = offset
        nbytes = int(np.prod(tensor.shape, dtype=np.int64)) * DTYPES[tensor.dtype].itemsize
        end = offset + nbytes
        offset = -(-end // ALIGN) * ALIGN
    head = MAGIC + struct.pack("<IQQ", 3, len(tensors), len(fields)) + b"".join(fields) + b"".join(infos)
    head += bytes(-len(head) % ALIGN)
    return head, {name: len(head) + at for name, at in offsets.items()}, len(head) + end


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _field(name: str, kind: str, value: Any) -> bytes:
    if kind == "text":
        return _text(name) + struct.pack("<I", 8) + _text(value)
    number, layout = _LAYOUTS[kind]
    return _text(name) + struct.pack("<I", number) + struct.pack(layout, value)


def _array(name: str, kind: str, values: tuple[Any, ...]) -> bytes:
    if kind == "text":
        number, body = 8, b"".join(_text(value) for value in values)
    else:
        number, layout = _LAYOUTS[kind]
        body = struct.pack(f"<{len(values)}{layout[1]}", *values)
    return _text(name) + struct.pack("<IIQ", 9, number, len(values)) + body


def _fields(source: Source) -> list[bytes]:
    config = source.config
    fields = [
        _field("general.architecture", "text", "llama"),
        _field("general.name", "text", source.path.resolve().name),
        _field("general.file_type", "u32", _FILE_TYPES[source.dtype]),
        _field("general.alignment", "u32", ALIGN),
        _field(GGUF_WRITER[0], "text", GGUF_WRITER[1]),
        _field("llama.block_count", "u32", config.n_layers),
        _field("llama.context_length", "u32", config.max_seq_len),
        _field("llama.embedding_length", "u32", config.dim),
        _field("llama.feed_forward_length", "u32", config.hidden_dim),
        _field("llama.attention.head_count", "u32", config.n_heads),
        _field("llama.attention.head_count_kv", "u32", config.n_kv_heads),
        _field("llama.attention.key_length", "u32", config.head_dim),
        _field("llama.attention.value_length", "u32", config.head_dim),
        _field("llama.attention.layer_norm_rms_epsilon", "f32", config.norm_eps),
        _field("llama.rope.dimension_count", "u32", config.head_dim),
        _field("llama.rope.freq_base", "f32", config.rope_theta),
        _field("llama.vocab_size", "u32", config.vocab_size),
    ]
    if config.rope_scaling is not None and config.rope_scaling.kind == "linear":
        fields.append(_field("llama.rope.scaling.type", "text", "linear"))
        fields.append(_field("llama.rope.scaling.factor", "f32", config.rope_scaling.factor))
    vocabulary, _ = carried(source)
    if vocabulary is not None:
        return fields + _tokenizer_fields(vocabulary, config) + _template_fields(source)
    # Ids that the tokenizer, wherever it is, will need.
    ids = (("bos", config.bos_id), ("eos", config.eos_ids[0]))
    fields.append(_field("tokenizer.ggml.model", "text", "none"))  # without this, llama.cpp refuses the file
    return fields + [_field(f"tokenizer.ggml.{name}_token_id", "u32", value) for name, value in ids]


def carried(source: Source) -> tuple[Vocabulary | BpeVocabulary | None, str | None]:
    """The tokenizer that such a file carries; or None, and why a tokenizer that is there cannot be written."""
    own = source.tokenizer
    if isinstance(own, BpeVocabulary):
        return own, None
    if isinstance(own, Path) and own.suffix == ".json":
        try:
            return from_tokenizer_json(own, source.config, links=source.links), None
        except InputError as reason:
            return None, str(reason)
    return vocabulary_of(own), None


def _tokenizer_fields(vocabulary: Vocabulary | BpeVocabulary, config: LlamaConfig) -> list[bytes]:
    if isinstance(vocabulary, BpeVocabulary):
        return _bpe_fields(vocabulary, config)
    return _vocabulary_fields(padded(vocabulary, config.vocab_size))


def _bpe_fields(vocabulary: BpeVocabulary, config: LlamaConfig) -> list[bytes]:
    fields = [
        _field("tokenizer.ggml.model", "text", "gpt2"),
        _field("tokenizer.ggml.pre", "text", vocabulary.pre),
        _array("tokenizer.ggml.tokens", "text", vocabulary.tokens),
        _array("tokenizer.ggml.token_type", "i32", vocabulary.types),
        _array("tokenizer.ggml.merges", "text", vocabulary.merges),
        _field("tokenizer.ggml.bos_token_id", "u32", vocabulary.bos_id),
        _field("tokenizer.ggml.eos_token_id", "u32", vocabulary.eos_id),
    ]
    # Llama 3.1's ends: of a text, of a message and of a turn. Of two, the second is a turn's.
    ends = [i for i in config.eos_ids if i != vocabulary.eos_id]
    for name, end in zip(("eot", "eom"), reversed(ends), strict=False):
        fields.append(_field(f"tokenizer.ggml.{name}_token_id", "u32", end))
    if vocabulary.add_bos is not None:
        fields.append(_field("tokenizer.ggml.add_bos_token", "bool", vocabulary.add_bos))
    return fields


def _template_fields(source: Source) -> list[bytes]:
    """The source's chat template, unless another tokenizer than its own took the place of the one it is for."""
    own = not isinstance(source.tokenizer, Path) or source.tokenizer.parent == source.path
    found = template_of(source) if own else None
    return [] if found is None else [_field("tokenizer.chat_template", "text", found[0])]


def _vocabulary_fields(vocabulary: Vocabulary) -> list[bytes]:
    if min(vocabulary.bos_id, vocabulary.eos_id, vocabulary.unk_id) < 0:
        raise InputError(
            f"{vocabulary.where}: expected a vocabulary with bos, eos and unknown pieces, found one without"
        )
    return [
        _field("tokenizer.ggml.model", "text", "llama"),
        _array("tokenizer.ggml.tokens", "text", vocabulary.pieces),
        _array("tokenizer.ggml.scores", "f32", vocabulary.scores),
        _array("tokenizer.ggml.token_type", "i32", vocabulary.types),
        _field("tokenizer.ggml.bos_token_id", "u32", vocabulary.bos_id),
        _field("tokenizer.ggml.eos_token_id", "u32", vocabulary.eos_id),
        _field("tokenizer.ggml.unknown_token_id", "u32", vocabulary.unk_id),
        _field("tokenizer.ggml.add_bos_token", "bool", True),
        _field("tokenizer.ggml.add_eos_token", "bool", False),
        _field("tokenizer.ggml.add_space_prefix", "bool", vocabulary.add_dummy_prefix),
        _field("tokenizer.ggml.remove_extra_whitespaces", "bool", vocabulary.remove_extra_whitespaces),
    ]

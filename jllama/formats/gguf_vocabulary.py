"""The tokenizer in a GGUF file's metadata: a sentencepiece vocabulary or a byte-level BPE one."""

from typing import Any

from jllama.config import Fields
from jllama.errors import InputError
from jllama.formats.bpe import BpeVocabulary
from jllama.formats.gguf_file import GgufFile
from jllama.formats.vocabulary import MAX_PIECES, NORMAL, Vocabulary

_ADD_BOS = "tokenizer.ggml.add_bos_token"


def vocabulary_in(file: GgufFile, vocab_size: int) -> Vocabulary | BpeVocabulary | None:
    """The vocabulary in the file. None if the file has no vocabulary or one of another kind: the user must then name a
    tokenizer file."""
    kind = file.fields.get("tokenizer.ggml.model")
    if kind == "llama":
        return _sentencepiece(file, vocab_size)
    return _bpe(file, vocab_size) if kind == "gpt2" else None


def _array(file: GgufFile, name: str, kind: type, length: int, default: Any = None) -> tuple[Any, ...]:
    where, values = f"{file.file.path}: tokenizer.ggml.{name}", file.fields.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(values, tuple) or len(values) > MAX_PIECES or not all(type(v) is kind for v in values):
        raise InputError(f"{where}: expected an array of {kind.__name__}, found another")
    if len(values) != length:
        raise InputError(f"{where}: expected {length} as the embedding, found {len(values)}")
    return values


def _types(file: GgufFile, vocab_size: int) -> tuple[int, ...]:
    types = _array(file, "token_type", int, vocab_size, (NORMAL,) * vocab_size)
    if not all(0 <= kind <= 6 for kind in types):
        raise InputError(f"{file.file.path}: tokenizer.ggml.token_type: expected types from 0 to 6, found another")
    return types


def _special(fields: Fields, vocab_size: int, defaults: dict[str, int]) -> dict[str, int]:
    names = {"unk": "unknown", "bos": "bos", "eos": "eos"}
    return {
        f"{name}_id": fields.integer(f"tokenizer.ggml.{names[name]}_token_id", i, low=0, high=vocab_size - 1)
        for name, i in defaults.items()
    }


def _sentencepiece(file: GgufFile, vocab_size: int) -> Vocabulary:
    fields = Fields(str(file.file.path), dict(file.fields))
    flags = {
        "add_dummy_prefix": fields.flag("tokenizer.ggml.add_space_prefix", True),
        "remove_extra_whitespaces": fields.flag("tokenizer.ggml.remove_extra_whitespaces", False),
        "add_bos": fields.flag(_ADD_BOS, True),
    }
    return Vocabulary(
        f"{file.file.path}: tokenizer.ggml.tokens",
        _array(file, "tokens", str, vocab_size),
        _array(file, "scores", float, vocab_size, (0.0,) * vocab_size),
        _types(file, vocab_size),
        **_special(fields, vocab_size, {"unk": 0, "bos": 1, "eos": 2}),
        **flags,
    )


def _bpe(file: GgufFile, vocab_size: int) -> BpeVocabulary:
    where = str(file.file.path)
    fields = Fields(where, dict(file.fields))
    merges = file.fields.get("tokenizer.ggml.merges", ())
    if not isinstance(merges, tuple) or not all(type(merge) is str for merge in merges):
        raise InputError(f"{where}: tokenizer.ggml.merges: expected an array of str, found another")
    return BpeVocabulary(
        f"{where}: tokenizer.ggml.tokens",
        _array(file, "tokens", str, vocab_size),
        _types(file, vocab_size),
        merges,
        str(file.fields.get("tokenizer.ggml.pre", "default")),
        # llama.cpp's defaults for this kind of vocabulary: the ids of GPT-2.
        **_special(fields, vocab_size, {"bos": 11, "eos": 11}),
        add_bos=fields.flag(_ADD_BOS, False) if _ADD_BOS in file.fields else None,
    )

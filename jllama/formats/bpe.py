"""Converts a byte-level BPE vocabulary from GGUF metadata to an equivalent ``tokenizer.json``.

A pre-tokenizer splits a text into words before merges are applied. A GGUF file only contains its name, in
``tokenizer.ggml.pre``. The rules here are those of llama.cpp with the same names.
"""

import json
from dataclasses import dataclass
from typing import Any

from jllama.errors import InputError
from jllama.formats.files import label
from jllama.formats.vocabulary import CONTROL, UNKNOWN, USER_DEFINED


@dataclass(frozen=True)
class PreTokenizer:
    """How a text is split into words. Each pattern splits the pieces that the patterns before it left."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a word that is itself a token is used without merges
    add_bos: bool = False  # default if the file does not say


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+"
    r"|[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))+((?=[\p{L}])([^A-Z]))*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS = PreTokenizer((r"\p{N}", _GPT2))
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": PreTokenizer((_GPT2,)),
    "llama-bpe": PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True),
    "refact": _DIGITS,
    "smollm": _DIGITS,
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True),
}


@dataclass(frozen=True)
class BpeVocabulary:
    """A byte-level BPE vocabulary. The texts of tokens use the printable characters that stand for bytes."""

    where: str  # file and field, for error messages
    tokens: tuple[str, ...]
    types: tuple[int, ...]  # as in `jllama.formats.vocabulary`
    merges: tuple[str, ...]  # "left right", in the order of their priority
    pre: str  # a name of `PRE_TOKENIZERS`; checked by `tokenizer_json`
    bos_id: int
    eos_id: int
    add_bos: bool | None = None  # None: the default of the pre-tokenizer

    def tokenizer_json(self) -> bytes:
        """The content of an equivalent ``tokenizer.json``."""
        pre = self._pre()
        added = [
            {
                "id": i,
                "content": self.tokens[i],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind != USER_DEFINED,
            }
            for i, kind in enumerate(self.types)
            if kind in (CONTROL, UNKNOWN, USER_DEFINED)
        ]
        splits = [_split(pattern) for pattern in pre.patterns]
        as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        vocabulary = {token: i for i, token in enumerate(self.tokens)}
        if len(vocabulary) < len(self.tokens):
            raise InputError(f"{self.where}: expected every token once, found one twice")
        model = {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre.ignore_merges,
            "vocab": vocabulary,
            "merges": [self._merge(i, merge) for i, merge in enumerate(self.merges)],
        }
        document = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, as_bytes]},
            "post_processor": self._with_bos() if (pre.add_bos if self.add_bos is None else self.add_bos) else None,
            "decoder": as_bytes,
            "model": model,
        }
        return json.dumps(document, ensure_ascii=False).encode()

    def _pre(self) -> PreTokenizer:
        if self.pre not in PRE_TOKENIZERS:
            names = ", ".join(PRE_TOKENIZERS)
            raise InputError(f"{self.where}: tokenizer.ggml.pre: expected one of {names}, found {label(self.pre)!r}")
        return PRE_TOKENIZERS[self.pre]

    def _merge(self, index: int, merge: str) -> list[str]:
        left, _, right = merge.partition(" ")
        if not left or not right or " " in right:
            raise InputError(f"{self.where}: merge {index}: expected two tokens, found {merge[:40]!r}")
        return [left, right]

    def _with_bos(self) -> dict[str, Any]:
        bos = self.tokens[self.bos_id]
        one, two = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
        return {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, one],
            "pair": [{"SpecialToken": {"id": bos, "type_id": 0}}, one, two],
            "special_tokens": {bos: {"id": bos, "ids": [self.bos_id], "tokens": [bos]}},
        }


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}

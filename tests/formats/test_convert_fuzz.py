"""Damaged files from a seeded generator. Each is read to its end, or refused with an `InputError`.

No other exception, no hang, and no memory beyond twice the file's size and a fixed allowance. JLLAMA_FUZZ says how
many files of each format (default: 40; the full run: 2000).
"""

import os
import random
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import checkpoints
import pytest

from jllama.errors import InputError
from jllama.formats import open_source
from jllama.formats.output import Watch
from jllama.formats.vocabulary import to_llama2c
from jllama.text.tokenizer import load_tokenizer, tokenizer_for

COUNT = int(os.environ.get("JLLAMA_FUZZ", "40"))
SECONDS = 20.0  # on a loaded machine; alone it is a few milliseconds
ALLOWANCE = 64 << 20
NUMBERS = (0, 1, 2, 7, 0x7F, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 40, 1 << 62, (1 << 63) - 1, -1, -2)
CONFIG = checkpoints.CONFIG.replace(n_layers=1, tie_embeddings=False)


def flip(rng: random.Random, raw: bytearray, at: int) -> None:
    raw[at] ^= 1 << rng.randrange(8)


def replace(rng: random.Random, raw: bytearray, at: int) -> None:
    raw[at] = rng.randrange(256)


def number(rng: random.Random, raw: bytearray, at: int) -> None:
    layout = rng.choice(["<I", "<Q", "<H"])
    value = rng.choice(NUMBERS) & ((1 << 8 * struct.calcsize(layout)) - 1)
    raw[at : at + struct.calcsize(layout)] = struct.pack(layout, value)


def digits(rng: random.Random, raw: bytearray, at: int) -> None:
    """For JSON: replace a number by another."""
    found = next((i for i in range(at, min(at + 400, len(raw))) if chr(raw[i]).isdigit()), None)
    if found is not None:
        raw[found : found + 1] = str(rng.choice([*NUMBERS, 1e400, 0.5, "null", '"x"', "[]"])).encode()


def cut(rng: random.Random, raw: bytearray, at: int) -> None:
    del raw[at:]


def remove(rng: random.Random, raw: bytearray, at: int) -> None:
    del raw[at : at + rng.choice([1, 2, 4, 8, 60])]


def insert(rng: random.Random, raw: bytearray, at: int) -> None:
    raw[at:at] = rng.randbytes(rng.choice([1, 2, 4, 8, 60]))


def repeat(rng: random.Random, raw: bytearray, at: int) -> None:
    raw[at:at] = raw[at : at + rng.choice([4, 30, 300])] * rng.choice([1, 2, 50])


def move(rng: random.Random, raw: bytearray, at: int) -> None:
    begin = rng.randrange(len(raw))
    raw[at : at + 16] = raw[begin : begin + 16]


MUTATIONS = (
    flip,
    flip,
    flip,
    replace,
    replace,
    number,
    number,
    number,
    digits,
    digits,
    cut,
    remove,
    insert,
    repeat,
    move,
)


def mutated(rng: random.Random, content: bytes) -> bytes:
    """Make a few changes, most of them near the beginning or the end, where headers are."""
    raw = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        if not raw:
            break
        near = min(len(raw), rng.choice([16, 64, 512, 4096, len(raw)]))
        at = rng.randrange(near) if rng.random() < 0.75 else len(raw) - 1 - rng.randrange(near)
        rng.choice(MUTATIONS)(rng, raw, at)
    return bytes(raw)


def files(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.is_dir() else [path]


def cases(path: Path, seed: str) -> Iterator[tuple[str, int]]:
    """Damage one file of a checkpoint at a time. Yields what was done, and the checkpoint's new size."""
    rng = random.Random(seed)
    originals = {file: file.read_bytes() for file in files(path)}
    for i in range(COUNT):
        file = rng.choice(list(originals))
        file.write_bytes(mutated(rng, originals[file]))
        yield f"{seed}-{i}: {file.name}", sum(f.stat().st_size for f in originals)
        file.write_bytes(originals[file])


def survives(path: Path, seed: str, use: Callable[[Path], object]) -> int:
    """How many of the damaged files were refused."""
    refused = 0
    tracemalloc.start()
    try:
        for what, size in cases(path, seed):
            tracemalloc.reset_peak()
            before, began = tracemalloc.get_traced_memory()[0], time.perf_counter()
            try:
                use(path)
            except InputError as error:
                refused += 1
                message = str(error)
                assert message.isprintable(), what
                assert len(message) < 1000, what
            except Exception as error:
                raise AssertionError(f"{what}: {error!r}") from error
            assert time.perf_counter() - began < SECONDS, what
            assert tracemalloc.get_traced_memory()[1] - before < 2 * size + ALLOWANCE, what
    finally:
        tracemalloc.stop()
    return refused


def read_all(path: Path) -> None:
    source, watch = open_source(path), Watch()
    for tensor in source.tensors.values():
        for begin, end in tensor.blocks():
            watch.look(tensor.where, tensor.floats(begin, end))
    if source.tokenizer is not None:
        encode(tokenizer_for(source))


def encode(tokenizer: object) -> None:
    ids = tokenizer.encode("the other cat, a rat and \u00e9")
    tokenizer.decode(ids)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("form", checkpoints.FORMS)
def test_damaged_checkpoints(form: str, tmp_path: Path) -> None:
    path = checkpoints.make(form, checkpoints.source(CONFIG), tmp_path / "model")
    refused = survives(path, form, read_all)
    assert refused > COUNT // 10  # the damage was in parts that are checked


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["model", "bin", "json"])
def test_damaged_tokenizers(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"tokenizer.{kind}"
    if kind == "json":
        tokenizers = pytest.importorskip("tokenizers")
        words = {piece: i for i, piece in enumerate(checkpoints.vocabulary().pieces)}
        model = tokenizers.models.BPE(words, [("t", "h"), ("h", "e")], unk_token="<unk>", fuse_unk=True)
        made = tokenizers.Tokenizer(model)
        made.add_special_tokens(["<s>", "</s>"])
        made.save(str(path))
    else:
        vocabulary = checkpoints.vocabulary()
        path.write_bytes(vocabulary.model_bytes() if kind == "model" else to_llama2c(vocabulary))
    refused = survives(path, kind, lambda path: encode(load_tokenizer(path)))
    assert refused > COUNT // 10

"""A trained model, stories260K: its text against llama2.c's, and its logits against float64."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jllama.formats.checkpoint import load
from jllama.model import forward
from jllama.params import Params
from jllama.stream import Session
from jllama.text.tokenizer import load_tokenizer

GREEDY = "golden/stories260K_greedy.json"
CASES = range(6)
WITH_LOGITS = (0, 2, 3, 4)


@pytest.fixture(scope="module")
def params(data: Path) -> Params:
    return load(data / "weights" / "stories260K_hf", dtype="float32")


@pytest.fixture(scope="module")
def cases(data: Path) -> list[dict[str, Any]]:
    cases = json.loads((data / GREEDY).read_text())
    assert len(cases) == len(CASES)
    return cases


@pytest.mark.parametrize("case", CASES)
def test_greedy_ids_and_text_equal_the_golden_file(
    case: int, cases: list[dict[str, Any]], params: Params, data: Path
) -> None:
    golden = cases[case]
    prompt, ids = golden["prompt_ids"], golden["ids"]
    tokenizer = load_tokenizer(data / "tokenizer" / f"{golden['tokenizer']}.model", params.config.vocab_size)
    assert tokenizer.encode(golden["prompt"]) == prompt
    session = Session(params, max_len=params.config.max_seq_len)
    chunks = session.run(prompt, max_new_tokens=len(ids) - len(prompt))
    assert prompt + [t for chunk in chunks for t in chunk.ids] == ids
    assert tokenizer.decode(ids) == golden["text"]


@pytest.mark.parametrize("case", WITH_LOGITS)
def test_logits_are_within_1e_3_of_float64(case: int, cases: list[dict[str, Any]], params: Params, data: Path) -> None:
    with np.load(data / "golden" / "stories260K_logits_f32_from_f64.npz") as golden:
        expected = golden[f"logits_{case}"]
    logits, _ = jax.jit(forward)(params, jnp.asarray([cases[case]["ids"][: len(expected)]]))
    np.testing.assert_allclose(logits[0], expected, rtol=0, atol=1e-3)

"""The embedded model, a trained one that every checkout has, against a golden file from numpy in float64.

`tests/make_demo_golden.py` writes the file and shares no code with the library.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jllama
from jllama.stream import Session

GOLDEN = Path(__file__).parents[1] / "golden" / "demo.npz"
CASES = range(4)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        assert len(file["prompts"]) == len(CASES)
        return dict(file)


@pytest.fixture(scope="module")
def params() -> jllama.Params:
    return jllama.load(jllama.DEMO, dtype="float32", stacked=False)


@pytest.mark.parametrize("case", CASES)
def test_greedy_ids_and_text(case: int, golden: dict[str, np.ndarray], params: jllama.Params) -> None:
    tokenizer = jllama.load_tokenizer(jllama.DEMO / "tokenizer.model", params.config.vocab_size)
    prompt, ids = golden[f"prompt_{case}"].tolist(), golden[f"ids_{case}"].tolist()
    assert tokenizer.encode(str(golden["prompts"][case])) == prompt
    session = Session(params, max_len=params.config.max_seq_len)
    chunks = session.run(prompt, max_new_tokens=len(ids) - len(prompt))
    assert prompt + [t for chunk in chunks for t in chunk.ids] == ids
    assert tokenizer.decode(ids) == str(golden["texts"][case])


@pytest.mark.parametrize("stacked", [False, True], ids=["layers", "stacked"])
def test_all_at_once_with_generate(stacked: bool, golden: dict[str, np.ndarray], params: jllama.Params) -> None:
    params = jllama.stack(params) if stacked else params
    prompts, wanted = ([golden[f"{name}_{case}"] for case in CASES] for name in ("prompt", "ids"))
    tokens = np.zeros((len(CASES), max(map(len, prompts))), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    lengths = jnp.asarray([len(prompt) for prompt in prompts])
    new = max(len(ids) - len(prompt) for ids, prompt in zip(wanted, prompts, strict=True))
    out = jllama.generate(params, jnp.asarray(tokens), lengths=lengths, max_new_tokens=new)
    for row, length, prompt, ids in zip(out.tokens, out.lengths, prompts, wanted, strict=True):
        np.testing.assert_array_equal(row[:length][: len(ids) - len(prompt)], ids[len(prompt) :])


@pytest.mark.parametrize("case", CASES)
def test_logits_are_within_1e_3_of_float64(case: int, golden: dict[str, np.ndarray], params: jllama.Params) -> None:
    logits, _ = jax.jit(jllama.forward)(params, jnp.asarray(golden[f"prompt_{case}"])[None])
    np.testing.assert_allclose(logits[0, golden["positions"]], golden[f"logits_{case}"], rtol=0, atol=1e-3)

"""The whole model against Hugging Face transformers, on small random Llamas of every kind that `config` reads.

It is always compared with the files that `make_golden.py` wrote. If torch and transformers are installed, it is also
compared live, through a checkpoint directory that transformers wrote.
"""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import make_golden
import numpy as np
import pytest
from safetensors.numpy import save_file

from jllama.decode import generate
from jllama.formats.checkpoint import load, save
from jllama.model import forward
from jllama.params import Params

RELATIVE = 1e-4  # of float32 logits, to the largest
jit_forward = jax.jit(forward, static_argnames="backend")

missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
live = pytest.mark.skipif(bool(missing), reason=f"needs {' and '.join(missing)} (make peers)")


def our_model(case: str, directory: Path) -> Params:
    """The case as a user would have it: a directory with config.json and safetensors."""
    (directory / "config.json").write_text(json.dumps(make_golden.config(case)))
    save_file(make_golden.weights(case), directory / "model.safetensors")
    return load(directory, dtype="float32")


def assert_agrees(params: Params, case: str, logits: np.ndarray, ids: np.ndarray) -> None:
    tokens = jnp.asarray(make_golden.prompts(case))
    found, _ = jit_forward(params, tokens, backend="xla")
    error = np.abs(np.asarray(found) - logits).max() / np.abs(logits).max()
    assert error < RELATIVE, f"relative error {error:.1e}"
    made = generate(params, tokens, max_new_tokens=make_golden.NEW, stop_ids=(), backend="xla")
    np.testing.assert_array_equal(made.tokens, ids)


@pytest.mark.parametrize("case", make_golden.CASES)
def test_logits_and_greedy_ids_equal_the_golden_files(case: str, tmp_path: Path) -> None:
    with np.load(make_golden.GOLDEN / f"{case}.npz") as golden:
        assert_agrees(our_model(case, tmp_path), case, golden["logits"], golden["ids"])


def test_every_golden_file_belongs_to_a_case_and_is_small() -> None:
    files = [path for path in make_golden.GOLDEN.glob("*") if path.is_file()]
    # demo.npz is of test_demo_golden.py.
    assert {file.name for file in files} == {f"{case}.npz" for case in [*make_golden.CASES, "demo"]}
    assert sum(file.stat().st_size for file in files) < 1e6


@pytest.mark.parametrize("case", ["rope-linear", "rope-llama3", "rope-theta"])
def test_the_comparison_notices_what_a_case_is_about(case: str, tmp_path: Path) -> None:
    """Without the field that the case adds, the error is far above the limit."""
    params = our_model(case, tmp_path)
    scaled = params.config.rope_scaling is not None
    plain = params.config.replace(rope_scaling=None) if scaled else params.config.replace(rope_theta=10000.0)
    with np.load(make_golden.GOLDEN / f"{case}.npz") as golden, pytest.raises(AssertionError, match="relative error"):
        assert_agrees(params.replace(config=plain), case, golden["logits"], golden["ids"])


@pytest.mark.peers
@live
@pytest.mark.filterwarnings("default")  # theirs
@pytest.mark.parametrize("case", make_golden.CASES)
def test_live_logits_and_greedy_ids_from_a_directory_that_transformers_wrote(case: str, tmp_path: Path) -> None:
    logits, ids = make_golden.run_hf(make_golden.hf_model(case, tmp_path), make_golden.prompts(case))
    assert_agrees(load(tmp_path, dtype="float32"), case, logits, ids)
    with np.load(make_golden.GOLDEN / f"{case}.npz") as golden:  # the files are what this transformers says, too
        np.testing.assert_allclose(logits, golden["logits"], atol=RELATIVE * np.abs(logits).max())


@pytest.mark.peers
@live
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("case", ["gqa", "tied", "rope-linear", "rope-llama3", "head-dim"])
def test_transformers_reads_what_save_wrote(case: str, tmp_path: Path) -> None:
    (tmp_path / "given").mkdir()
    save(our_model(case, tmp_path / "given"), tmp_path / "saved")
    logits, ids = make_golden.run_hf(make_golden.read_hf(tmp_path / "saved"), make_golden.prompts(case))
    with np.load(make_golden.GOLDEN / f"{case}.npz") as golden:
        np.testing.assert_allclose(logits, golden["logits"], atol=RELATIVE * np.abs(logits).max())
        np.testing.assert_array_equal(ids, golden["ids"])

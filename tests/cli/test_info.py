"""``jllama info``: describes a checkpoint without reading its weights."""

import json
from pathlib import Path

import jax
import pytest

import jllama
from jllama.cli import info
from jllama.config import LlamaConfig
from jllama.formats import checkpoint
from jllama.formats.checkpoint import save
from jllama.params import init

CONFIG = LlamaConfig(dim=256, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=384, vocab_size=80, max_seq_len=128)


def told(*flags: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert info.main(list(flags)) == 0
    return capsys.readouterr().out


def test_it_says_what_the_demo_is(capsys: pytest.CaptureFixture[str]) -> None:
    text = told(capsys=capsys)
    for part in (
        "hf, bfloat16",
        "2.3 M weights",
        "6 layers",
        "context 512",
        "1,024 pieces",
        "int4 with float32",
        "fits",
    ):
        assert part in text
    assert "of 1, 4, 16, 64 rows: one launch for each op: needs an NVIDIA Hopper GPU, found platform 'cpu'" in text
    assert "decode_step, attend_and_write, finish_layer: ops: needs an NVIDIA Hopper GPU, found platform 'cpu'" in text


def test_json_has_the_same_and_the_memory_is_what_loading_takes(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(told("--json", "-c", "64", "--batch-size", "3", capsys=capsys))
    assert found["config"]["n_layers"] == 6
    assert found["tokenizer"]["pieces"] == 1024
    ways = {rows: way["impl"] for rows, way in found["ways"].items()}
    assert ways == {"1": "ops", "4": "ops", "16": "ops", "64": "ops"}
    rows = {(row["dtype"], row["quant"]): row for row in found["memory"]}
    assert set(rows) == {(d, "none") for d in checkpoint.DTYPES} | {("float32", "int8"), ("float32", "int4")}
    for (dtype, quant), row in rows.items():
        params = jllama.load(jllama.DEMO, dtype=dtype, quant=quant)
        taken = sum(leaf.nbytes for leaf in jax.tree.leaves(params, is_leaf=lambda x: hasattr(x, "scale")))
        assert row["weights"] == taken
        assert row["total"] == row["weights"] + row["cache"] + row["workspace"]


def test_of_a_quantised_checkpoint_only_its_own_form_is_offered(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    save(init(CONFIG, jax.random.key(0), quant="int4", group=32), tmp_path / "model")
    found = json.loads(told(str(tmp_path / "model"), "--json", capsys=capsys))
    assert found["quant"] == {"format": "int4", "group": 32}
    assert {row["quant"] for row in found["memory"]} == {"int4"}
    assert found["tokenizer"] is None
    assert "int4" in told(str(tmp_path / "model"), capsys=capsys)


def test_what_does_not_fit_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jllama.device.free_bytes", lambda device: 16_000_000)
    text = told(capsys=capsys)
    assert "float32                 0.02 GB  does not fit" in text
    monkeypatch.setattr("jllama.device.free_bytes", lambda device: None)
    assert "unknown free" in told(capsys=capsys)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["no/such/model"], "no/such/model: no such file"),
        (["-c", "1000"], "--max-seq-len: expected 2 to 512"),
        (["--batch-size", "0"], "--batch-size: expected at least 1, found 0"),
    ],
)
def test_bad_input_is_one_line(flags: list[str], words: str, refused) -> None:
    assert words in refused(*flags, command=info)

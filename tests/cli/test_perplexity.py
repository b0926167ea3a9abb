"""Perplexity: against float64 figures of a trained model, and against its definition."""

import json
import math
from pathlib import Path

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CONFIG, model, prompt

from jllama.cli.perplexity import Perplexity, cut, main, measure, summary
from jllama.errors import InputError
from jllama.formats.checkpoint import load
from jllama.model import forward
from jllama.text.tokenizer import load_tokenizer

jit_forward = jax.jit(forward)


def direct(ids: list[int], window: int, stride: int | None = None) -> float:
    """The mean by definition: token by token, each given all earlier tokens of its window."""
    room = window - 1
    step, total, begin = stride or room, 0.0, 0
    done = 0
    while done < len(ids):
        piece = ids[begin : begin + room]
        padded = np.zeros((1, window), np.int32)  # what comes after a token does not change its logits
        padded[0, : 1 + len(piece)] = [1, *piece]
        logits, _ = jit_forward(model(), padded)
        logprobs = np.asarray(jax.nn.log_softmax(logits[0].astype(jnp.float32)), np.float64)
        for i, token in enumerate(piece):
            if begin + i >= done:
                total -= logprobs[i, token]
        done, begin = begin + len(piece), begin + step
    return total / len(ids)


@pytest.mark.parametrize(("window", "stride"), [(16, None), (16, 15), (16, 4), (16, 1), (64, 7), (500, None)])
def test_it_is_what_the_definition_says(window: int, stride: int | None) -> None:
    ids = prompt(50)
    windows = cut(ids, window, stride)
    assert sum(w.counted for w in windows) == len(ids)
    finished: list[int] = []
    result = measure(model(), windows, CONFIG.bos_id, slots=3, progress=finished.append)
    assert result.mean_nll == pytest.approx(direct(ids, window, stride), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.mean_nll))
    assert (result.tokens, result.windows) == (50, len(windows))
    assert sum(finished) == len(windows)


def test_windows_are_cut_as_asked() -> None:
    ids = list(range(10))
    assert [(w.ids, w.counted) for w in cut(ids, 5)] == [((0, 1, 2, 3), 4), ((4, 5, 6, 7), 4), ((8, 9), 2)]
    assert [(w.ids[0], w.ids[-1], w.counted) for w in cut(ids, 5, 2)] == [(0, 3, 4), (2, 5, 2), (4, 7, 2), (6, 9, 2)]
    assert len(cut(ids, 5, 1, limit=3)) == 3
    assert cut([], 5) == []
    for window, stride in ((1, None), (5, 0), (5, 5)):
        with pytest.raises(InputError, match="--stride: expected 1 to"):
            cut(ids, window, stride)
    with pytest.raises(InputError, match="expected at least one token"):
        measure(model(), [], 1)


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.RandomState(0)
    hits = 0
    for _ in range(400):
        counts = rng.randint(50, 100, 12)
        sums = counts * (2.0 + 0.3 * rng.randn(12))
        interval = summary(sums.tolist(), counts.tolist()).nll_interval
        assert interval is not None
        hits += interval[0] <= 2.0 <= interval[1]
    assert 0.91 < hits / 400 < 0.98
    assert summary([3.0], [2]) == Perplexity(1.5, math.exp(1.5), None, None, 2, 1)
    assert summary([1e6], [1]).perplexity == math.inf


@pytest.mark.parametrize("index", range(5))
def test_a_trained_model_has_the_perplexity_of_float64(index: int, data: Path) -> None:
    case = json.loads((data / "golden" / "stories260K_ppl_float64.json").read_text())[index]
    path = data / case["file"]
    if not path.exists():
        pytest.skip(f"{case['file']} is not among the test data")
    ids = load_tokenizer(data / "tokenizer" / "tok512.model").encode(path.read_text()[:200_000], bos=False)
    windows = cut(ids, 512, limit=case["windows"])
    params = load(data / "weights" / "stories260K_hf", dtype="float32")
    result = measure(params, windows, 1)
    assert (result.tokens, result.windows) == (case["targets"], case["windows"])
    assert result.perplexity == pytest.approx(case["ppl"], rel=1e-3)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    path = checkpoints.make("hf", checkpoints.source(), tmp_path / "model")
    (tmp_path / "text.txt").write_text("the other rat sat on a hat. " * 20)
    return path, tmp_path / "text.txt"


def run(*args: object) -> int:
    return main([str(arg) for arg in args])


def test_the_command(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    path, text = files
    assert run("--model", path, "--text", text, "--window", 32, "--json", "--no-compilation-cache") == 0
    values = json.loads(capsys.readouterr().out)
    assert values["perplexity"] == pytest.approx(math.exp(values["mean_nll"]))
    assert values["perplexity_interval"][0] < values["perplexity"] < values["perplexity_interval"][1]
    assert values["windows"] == math.ceil(values["tokens"] / 31)
    assert run("--model", path, "--text", text, "--window", 32, "--no-compilation-cache") == 0
    out = capsys.readouterr().out
    assert f"perplexity {values['perplexity']:.4f} (95 % confidence: " in out
    assert f"over {values['tokens']} tokens in {values['windows']} windows" in out
    assert run("--model", path, "--text", text, "--windows", 1, "--json", "--no-compilation-cache") == 0
    assert json.loads(capsys.readouterr().out)["nll_interval"] is None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--window", "65"], "--window: expected 2 to 64 (the model's context), found 65"),
        (["--window", "1"], "--window: expected 2 to 64"),
        (["--window", "9", "--stride", "9"], "--stride: expected 1 to 8"),
        (["--windows", "0"], "--windows: expected at least 1"),
        (["--batch-size", "-1"], "--slots: expected at least 1"),
        (["--text", "nowhere.txt"], "nowhere.txt: cannot be read: No such file"),
    ],
)
def test_what_it_refuses(
    args: list[str], message: str, files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run("--model", files[0], "--text", files[1], "--no-compilation-cache", *args)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("content", "message"), [(b"", "at least one token"), (b"ab\xff", "byte 2: expected UTF-8")])
def test_texts_that_are_none(
    content: bytes, message: str, files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    files[1].write_bytes(content)
    with pytest.raises(SystemExit):
        run("--model", files[0], "--text", files[1], "--no-compilation-cache")
    assert message in capsys.readouterr().err

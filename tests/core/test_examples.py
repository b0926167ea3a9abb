"""Every example runs as written."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("name", ["quickstart", "forward", "generate_in_jit", "policy_gradient"])
def test_the_example_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().out.count("\n") >= 3


def test_the_training_script_learns_a_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    stories = [f"The {a} cat saw a {b} dog. The dog ran to the {a} house." for a in COLOURS for b in COLOURS]
    text.write_text("<|endoftext|>".join(stories))
    flags = [
        "--text",
        text,
        "--held-out",
        text,
        "--out",
        tmp_path / "model",
        "--preset",
        "tiny",
        "--steps",
        20,
        "--batch",
        2,
    ]
    from jllama.config import PRESETS, LlamaConfig

    tiny = LlamaConfig(32, 2, 2, 1, 64, 320, max_seq_len=64, tie_embeddings=True)
    monkeypatch.setitem(PRESETS, "tiny", tiny)
    monkeypatch.setattr("sys.argv", ["train_demo.py", *map(str, flags)])
    runpy.run_path(str(EXAMPLES / "train_demo.py"), run_name="__main__")
    printed = capsys.readouterr().out
    losses = [
        float(line.split("validation ")[1].split(",")[0]) for line in printed.splitlines() if "validation" in line
    ]
    assert losses[-1] < losses[0] - 0.3
    assert "held-out perplexity" in (tmp_path / "model" / "README.md").read_text()

    from jllama import load

    assert load(tmp_path / "model").config == tiny


COLOURS = ("red", "blue", "green", "grey", "brown", "small", "big", "old", "new", "kind")


@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "docs/library.md"])
def test_the_python_on_a_page_runs(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = (EXAMPLES.parent / page).read_text()
    blocks = text.split("```python\n")[1:]
    assert blocks
    names: dict[str, object] = {}  # a page's blocks follow one another
    for block in blocks:
        exec(block.split("```")[0], names)
    assert capsys.readouterr().out.strip()

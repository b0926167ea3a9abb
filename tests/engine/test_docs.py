"""The pages about the engine: their code runs, and begins with an example of five lines."""

from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("page", ["engine", "rollouts", "structured"])
def test_the_code_of_the_page_runs(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    if page == "structured":
        pytest.importorskip("llguidance")
    text = (DOCS / f"{page}.md").read_text()
    blocks = [block.split("```")[0] for block in text.split("```python\n")[1:]]
    assert text.split("\n")[2] == "```python"
    assert blocks[0].count("\n") <= 7
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    assert capsys.readouterr().out.count("\n") == len(blocks)

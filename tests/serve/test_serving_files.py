"""The files for operations name what is there."""

import json
import re
from pathlib import Path

from serving import Live

from jllama.cli import serve

ROOT = Path(__file__).parents[2]
FILES = ROOT / "examples" / "serving"


def test_every_figure_of_the_dashboard_and_of_the_page_is_exported(live: Live) -> None:
    live.complete()
    exported = live.client.get("/metrics").text
    dashboard = json.loads((FILES / "grafana.json").read_text())
    asked = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    names = re.findall(r"(?:vllm|jllama):\w+|process_\w+", asked)
    assert len(names) > 15
    documented = re.findall(r"`((?:vllm|jllama):\w+)`", (ROOT / "docs" / "serving.md").read_text())
    for name in {*names, *documented}:
        assert re.search(rf"^# TYPE {re.sub('_(bucket|total)$', '', name)}(_total)? ", exported, re.MULTILINE), name
    served = re.findall(r"^# TYPE ((?:vllm|jllama):\w+) ", exported, re.MULTILINE)
    assert {name for name in served if not name.endswith("_created")} <= set(documented)


def test_flags_and_variables_of_the_examples_exist() -> None:
    flags = {flag for action in serve.parser()._actions for flag in action.option_strings}
    for name in ("Dockerfile", "jllama.service"):
        text = (FILES / name).read_text()
        line = next(line for line in text.splitlines() if line.startswith(("ENTRYPOINT", "ExecStart")))
        assert set(re.findall(r"--[a-z-]+", line)) <= flags
        assert serve.KEY in text

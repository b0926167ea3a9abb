"""The shell commands of README and docs run as written, in a copy of the project where they may leave what they write.

The paths that a reader supplies are there: the embedded model under the name of Llama-2, and a few prompts.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/index.md", "docs/cli.md")
# What is not run here, and why.
SKIPPED = {
    "make test": "it is this suite",
    "EXTRA=cuda13 make demo": "it needs a GPU, and installs",
    "pip install .": "it installs; `make wheel-test` does so in an empty environment",
    'pip install ".[cuda13]"': "it needs a GPU, and installs",
}
LANGUAGES = ("", "sh", "bash", "shell", "console")
TYPED = b"What is the capital of France?\n/quit\n"
SECONDS = 120  # a bound for one that hangs; a command takes two or three


def commands(page: str) -> list[str]:
    """The lines of a page's fenced blocks, but for those in another language than the shell's."""
    blocks = (ROOT / page).read_text().split("```")[1::2]
    lines = [block.partition("\n")[2].splitlines() for block in blocks if block.partition("\n")[0] in LANGUAGES]
    return [line for block in lines for line in block if line.strip()]


def bare(command: str) -> str:
    """A command without the comment after it."""
    return command.partition("  #")[0].strip()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone after its setup, as far as commands can tell: the project's files, and this environment as .venv."""
    place = tmp_path_factory.mktemp("clone")
    for name in ("jllama", "convert", "pallas_kernels"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy2(ROOT / name, place / name)
    (place / ".venv").mkdir()
    for entry in Path(sys.prefix).iterdir():
        if not entry.name.startswith("."):
            (place / ".venv" / entry.name).symlink_to(entry)
    (place / ".venv" / ".ready").touch()

    for name in ("llama-2-7b", "llama-2-7b-chat"):
        model = place / "path" / "to" / name
        shutil.copytree(place / "jllama" / "demo", model)
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    (place / "story.txt").write_text("Once upon a time,\nthere was a cat.")
    (place / "prompts.txt").write_text("Once upon a time,\nOne day,\n")
    (place / "prompts.jsonl").write_text('"Once upon a time,"\n{"prompt": "One day,"}\n')
    return place


@pytest.fixture(scope="module")
def ran() -> set[str]:
    """The commands that ran already: pages share some."""
    return set()


@pytest.mark.timeout(900)  # all commands of a page, on a machine that does much else
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run_as_written(page: str, place: Path, ran: set[str]) -> None:
    environment = os.environ | {
        "PATH": f"{place / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(place),
        "XDG_CACHE_HOME": str(place / "cache"),
        "XDG_STATE_HOME": str(place / "state"),
        "JAX_PLATFORMS": "cpu",
    }
    run = [command for command in commands(page) if bare(command) not in SKIPPED]
    assert run
    for command in run:
        name = bare(command).removeprefix(".venv/bin/")
        if name in ran:
            continue
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", command],
            cwd=place, env=environment, input=TYPED, capture_output=True, timeout=SECONDS, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stderr.decode()}"
        assert done.stdout.strip(), command
        assert b"Traceback" not in done.stderr, command
        assert b"error:" not in done.stderr, f"{command}\n{done.stderr.decode()}"
        ran.add(name)


def test_nothing_is_skipped_that_no_page_has() -> None:
    assert {bare(command) for page in PAGES for command in commands(page)} >= set(SKIPPED)

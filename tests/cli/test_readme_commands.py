"""The shell commands of README and docs run as written, in a copy of the project where they may leave what they write.

The paths that a reader supplies are there: the embedded model under the name of Llama-2, and a few prompts. A command
that is nothing but `jllama` and its arguments runs in this process, where JAX is imported already.
"""

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jllama import cli

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


def in_shell(command: str, place: Path) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command that bash runs."""
    path = {"PATH": f"{place / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(place)}
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=place, env=os.environ | path, input=TYPED, capture_output=True, timeout=SECONDS, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def in_process(arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """The same of ``jllama`` with some arguments, without a process."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(TYPED)))
    try:
        status = cli.main(arguments)
    except SystemExit as end:
        status = end.code
    return status, *capsys.readouterr()


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run_as_written(
    page: str, place: Path, ran: set[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    for variable, folder in (("XDG_CACHE_HOME", "cache"), ("XDG_STATE_HOME", "state")):
        monkeypatch.setenv(variable, str(place / folder))
    run = [command for command in commands(page) if bare(command) not in SKIPPED]
    assert run
    for command in run:
        name = bare(command).removeprefix(".venv/bin/")
        if name in ran:
            continue
        program, *arguments = shlex.split(name)
        alone = program == "jllama" and not set("|<>;&$`") & set(name)
        status, out, err = in_process(arguments, capsys, monkeypatch) if alone else in_shell(command, place)
        assert not status, f"{command}\n{err}"
        assert out.strip(), command
        assert "Traceback" not in err, command
        assert "error:" not in err, f"{command}\n{err}"
        ran.add(name)


def test_nothing_is_skipped_that_no_page_has() -> None:
    assert {bare(command) for page in PAGES for command in commands(page)} >= set(SKIPPED)

"""Fixtures that run the command lines in this process, on the embedded model."""

import subprocess
import sys
from collections.abc import Callable

import pytest

from jllama.cli import generate as generate_command


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[str, str]]:
    """Run ``jllama generate`` with some flags. Returns its stdout and stderr."""
    cache = str(tmp_path_factory.getbasetemp() / "xla")

    def call(*flags: str, command=generate_command) -> tuple[str, str]:
        command.main([*flags, "--compilation-cache", cache])
        out, err = capsys.readouterr()
        return out, err

    return call


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one-line error with which ``jllama generate`` refuses some flags."""

    def call(*flags: str, command=generate_command) -> str:
        with pytest.raises(SystemExit) as exit_:
            command.main(list(flags))
        out, err = capsys.readouterr()
        assert exit_.value.code == 2
        assert out == ""
        assert err.count("\n") == 1
        assert "Traceback" not in err
        return err

    return call


@pytest.fixture
def module() -> Callable[..., subprocess.CompletedProcess[bytes]]:
    """Run ``python -W error -m ...`` in its own process, with these bytes as its input."""

    def call(*args: str | bytes, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-W", "error", "-m", *args]
        return subprocess.run(command, input=stdin, capture_output=True, timeout=120, check=False)

    return call

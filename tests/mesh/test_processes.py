"""One command in two processes, each with four CPU devices, which exchange sums through gloo."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import checkpoints
import pytest
import quick

ROOT = Path(__file__).parents[2]
CONFIG = checkpoints.CONFIG.replace(n_heads=8, n_kv_heads=2, head_dim=8)
PROMPTS = "the\nto be\nsea\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.make("hf", checkpoints.source(CONFIG), tmp_path_factory.mktemp("model") / "hf")


def start(model: Path, *flags: str, devices: int = 4) -> subprocess.Popen[str]:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": quick.xla_flags(f"--xla_force_host_platform_device_count={devices}"),
    }
    command = [sys.executable, "-m", "jllama", "generate", "-m", str(model), "--no-compilation-cache", "--temp", "0.9"]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen([*command, *flags], cwd=ROOT, env=environment, text=True, **pipes)


def pair(model: Path, *flags: str) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        where = f"localhost:{free.getsockname()[1]}"
    mesh = ("--tp", "4", "--dp", "2", "--coordinator", where, "--num-processes", "2")
    return [start(model, *flags, *mesh, "--process-id", str(i)) for i in range(2)]


@pytest.mark.timeout(280)
def test_two_processes_print_what_one_does(model: Path) -> None:
    flags = ("--prompt-file", "-", "-n", "12")
    both = pair(model, *flags)
    alone, _ = start(model, *flags, devices=1).communicate(PROMPTS, timeout=120)
    assert both[0].stdin is not None
    both[0].stdin.write(PROMPTS)  # process 1 hears of it from process 0
    both[0].stdin.close()
    both[0].stdin = None
    second, first = (process.communicate(timeout=120) for process in reversed(both))
    assert [process.returncode for process in both] == [0, 0], first[1] + second[1]
    assert first[0] == alone
    assert second[0] == ""
    assert "tokens/s" in first[1]
    assert "tokens/s" not in second[1]


@pytest.mark.timeout(280)
def test_a_process_that_dies_ends_all_and_is_named(model: Path) -> None:
    first, second = pair(model, "-p", "the", "--samples", "4000", "-n", "40", "--ignore-eos", "--jsonl", "--slots", "2")
    assert first.stdout is not None
    assert first.stdout.readline().startswith("{")  # it runs
    second.kill()
    began = time.monotonic()
    _, said = first.communicate(timeout=30)
    assert time.monotonic() - began < 30
    assert first.returncode == 3
    assert "jllama: error: process 1 of 2 has ended, so all others end, too" in said
    second.communicate()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--process-id", "0"), "--num-processes, --process-id: expected --coordinator with them, found none"),
        (("--coordinator", "there"), "--coordinator: expected HOST:PORT or auto, found 'there'"),
        (("--tp", "3"), "--tp 3: expected 3 devices, found 1 (cpu)"),
        (("--dp", "0"), "--dp: expected at least 1, found 0"),
    ],
)
def test_flags_that_make_no_sense(flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    from jllama.cli.generate import main

    with pytest.raises(SystemExit):
        main(["the", "--no-compilation-cache", *flags])
    assert message in capsys.readouterr().err

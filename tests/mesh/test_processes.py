"""One command in two processes with two CPU devices each, or in four with one each, which exchange sums through
gloo."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import quick

import jllama

ROOT = Path(__file__).parents[2]
CONFIG = checkpoints.CONFIG.replace(n_heads=8, n_kv_heads=2, head_dim=8, n_layers=1)
PROMPTS = "the\nto be\nsea\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.make("hf", checkpoints.source(CONFIG), tmp_path_factory.mktemp("model") / "hf")


def start(command: str, model: Path, *flags: str, devices: int = 4) -> subprocess.Popen[str]:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": quick.xla_flags(f"--xla_force_host_platform_device_count={devices}"),
    }
    words = [sys.executable, "-m", "jllama", command, "-m", str(model), "--no-compilation-cache"]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen([*words, *flags], cwd=ROOT, env=environment, text=True, **pipes)


def start_all(count: int, command: str, model: Path, *flags: str, devices: int) -> list[subprocess.Popen[str]]:
    """The processes of one command, on a mesh of all their devices, of which two have the same part of the model."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        where = f"localhost:{free.getsockname()[1]}"
    mesh = ("--tp", str(count * devices // 2), "--dp", "2", "--coordinator", where, "--num-processes", str(count))
    every = [(*flags, *mesh, "--process-id", str(i)) for i in range(count)]
    return [start(command, model, *these, devices=devices) for these in every]


@pytest.mark.timeout(280)
def test_two_processes_print_what_one_does(model: Path) -> None:
    flags = ("--prompt-file", "-", "-n", "12", "--temp", "0.9")
    both = start_all(2, "generate", model, *flags, devices=4)
    alone, _ = start("generate", model, *flags, devices=1).communicate(PROMPTS, timeout=120)
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


@pytest.fixture
def four(model: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """A server of four processes."""
    found = start_all(4, "serve", model, "--port", "0", "--slots", "4", "--pages", "32", "--no-warm-up", devices=1)
    yield found
    for process in found:
        process.kill()
        process.communicate()


@pytest.mark.timeout(280)
def test_four_processes_serve_and_end_together(four: list[subprocess.Popen[str]], model: Path) -> None:
    """Process 0 answers what one device does, also after a client has left. Then a process dies: all others end, and
    say which it was."""
    said = ""
    for line in four[0].stderr or ():
        said += line
        if found := re.search(r"ready at (\S+)", line):
            break
    else:
        pytest.fail(said)
    url = found[1]
    with ask(url, prompt="sea", stream=True, max_tokens=60) as stream:
        assert stream.readline().startswith(b"data: ")  # and leaves
    prompts = PROMPTS.split("\n")[:3]
    with ThreadPoolExecutor(3) as clients:
        texts = list(
            clients.map(lambda prompt: json.loads(ask(url, prompt=prompt).read())["choices"][0]["text"], prompts)
        )
    alone = jllama.LM.load(model).generate(prompts, max_new_tokens=12, presence_penalty=0.5)
    assert texts == [completion.text for completion in alone]
    four[2].kill()
    began = time.monotonic()
    others = [process for i, process in enumerate(four) if i != 2]
    for process in others:
        _, err = process.communicate(timeout=30)
        assert "jllama: error: process 2 of 4 has ended, so all others end, too" in err
    assert time.monotonic() - began < 30
    assert [process.returncode for process in others] == [3, 3, 3]


def ask(url: str, **fields: Any) -> Any:
    """An open answer. All requests are of one kind, so that few programs are compiled."""
    body = json.dumps({"temperature": 0, "presence_penalty": 0.5, "max_tokens": 12} | fields).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=100)


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

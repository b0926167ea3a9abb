"""One command in two processes with four CPU devices each, or in four with one each, which exchange sums through
gloo."""

import functools
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
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import quick

import jllama

ROOT = Path(__file__).parents[2]
CONFIG = checkpoints.CONFIG.replace(n_heads=8, n_kv_heads=2, head_dim=8, n_layers=1)
PROMPTS = "the\nto be\nsea\n"
IMPATIENT = "from jllama.cli import cluster, main; cluster.PATIENCE = cluster.REMIND = 0.1; main()"
JSON = '{}":0123456789'  # the letters that the usual vocabulary has not
AGE = {"type": "object", "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}}, "required": ["age"]}
AGE |= {"additionalProperties": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    usual = checkpoints.vocabulary()
    vocabulary = replace(usual, pieces=(*usual.pieces[: -len(JSON)], *JSON))
    source = checkpoints.source(CONFIG, tokenizer=vocabulary)
    return checkpoints.make("hf", source, tmp_path_factory.mktemp("model") / "hf")


def start(
    command: str, model: Path, *flags: str, devices: int = 1, run: tuple[str, str] = ("-m", "jllama"), **variables: str
) -> subprocess.Popen[str]:
    of_a_cluster = ("SLURM_", "OMPI_", "KUBERNETES_", "JAX_")  # which the tests themselves may run in
    environment = {name: value for name, value in os.environ.items() if not name.startswith(of_a_cluster)} | variables
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": quick.xla_flags(f"--xla_force_host_platform_device_count={devices}"),
    }
    words = [sys.executable, *run, command, "-m", str(model), "--no-compilation-cache"]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen([*words, *flags], cwd=ROOT, env=environment, text=True, **pipes)


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


@pytest.mark.timeout(280)
def test_two_processes_of_a_cluster_print_what_one_does(model: Path) -> None:
    """``--coordinator auto``, with the variables of a Slurm job."""
    flags = ("--prompt-file", "-", "-n", "12", "--temp", "0.9")
    job = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost,other", "SLURM_NTASKS": "2"}
    job["JAX_COORDINATOR_PORT"] = free_port()
    both = [
        start("generate", model, *flags, "--tp", "4", "--dp", "2", "--coordinator", "auto", devices=4, **job, **own)
        for own in ({"SLURM_PROCID": i, "SLURM_LOCALID": i} for i in "01")
    ]
    alone, _ = start("generate", model, *flags).communicate(PROMPTS, timeout=120)
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


def test_what_keeps_processes_apart_is_said_in_a_line(model: Path) -> None:
    """All at once, because most of the time is the start of Python and jax."""
    clusters = "--coordinator auto: expected Slurm, Open MPI, Kubernetes or a TPU pod, as jax detects it, found "
    key = "one that jax cannot use: KeyError: 'OMPI_COMM_WORLD_SIZE'"
    two = ("--dp", "2", "--num-processes", "2", "--coordinator")
    late = "--coordinator nowhere.invalid:1: expected all processes within 0.1 seconds, found that some"
    pair = (*two, f"localhost:{free_port()}", "--process-id")
    starts = functools.partial(start, "generate", model, "the")
    expected = [
        (starts("--coordinator", "auto"), 2, f"{clusters}none"),
        (starts("--coordinator", "auto", SLURM_JOB_ID="7"), 2, f"{clusters}a Slurm job without its step"),
        (starts("--coordinator", "auto", OMPI_MCA_orte_hnp_uri="0.0;tcp://127.0.0.1:1"), 2, f"{clusters}{key}"),
        (starts(*two, "nowhere.invalid:1", "--process-id", "1", "-q", run=("-c", IMPATIENT)), 2, late),
        (starts(*pair, "1", "-n", "7"), 2, "process 1: --max-new-tokens: expected 256, as in process 0, found 7"),
        (starts(*pair, "0"), 3, "process 1 of 2 has ended, so all others end, too"),
    ]
    said = [process.communicate(timeout=60) for process, _, _ in expected]
    for (process, code, message), (out, err) in zip(expected, said, strict=True):
        lines = [line for line in err.splitlines() if not line.startswith("[Gloo]")]
        assert re.fullmatch(f"jllama( generate)?: error: {re.escape(message)}.*", "\n".join(lines))
        assert (process.returncode, out) == (code, "")


@pytest.fixture
def four(model: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """A server of four processes, of which two have the same part of the model."""
    flags = ("--port", "0", "--slots", "4", "--pages", "32", "--no-warm-up", "--tp", "2", "--dp", "2")
    flags += ("--coordinator", f"localhost:{free_port()}", "--num-processes", "4")
    found = [start("serve", model, *flags, "--process-id", str(i)) for i in range(4)]
    yield found
    for process in found:
        process.kill()
        process.communicate()


@pytest.mark.timeout(280)
def test_four_processes_serve_and_end_together(four: list[subprocess.Popen[str]], model: Path) -> None:
    """Process 0 answers what one device does, also after a client has left, and with grammars, whose masks each process
    makes. Then a process dies: all others end, and say which it was."""
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
    asked: list[dict[str, Any]] = [{"prompt": prompt} for prompt in prompts]
    in_json = {"type": "json_schema", "json_schema": {"name": "age", "schema": AGE}}
    asked += [{"prompt": "sea", "max_tokens": 50, "response_format": in_json}]
    asked += [{"prompt": "the", "structured_outputs": {"regex": "[a-c]{3}x"}}]
    with ThreadPoolExecutor(5) as clients:
        *texts, age, letters = clients.map(lambda fields: json.load(ask(url, **fields))["choices"][0]["text"], asked)
    lm = jllama.LM.load(model)
    assert texts == [found.text for found in lm.generate(prompts, max_new_tokens=12, presence_penalty=0.5)]
    assert age == lm.generate("sea", max_new_tokens=50, presence_penalty=0.5, json_schema=AGE).text
    assert 0 <= json.loads(age)["age"] <= 99
    assert re.fullmatch("[a-c]{3}x", letters)
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
        (("--coordinator", "there:70000"), "--coordinator: expected HOST:PORT or auto, found 'there:70000'"),
        (("--coordinator", "auto", "--process-id", "0"), "expected no --num-processes and --process-id, found some"),
        (("--tp", "3"), "--tp 3: expected 3 devices, found 1 (cpu)"),
        (("--dp", "0"), "--dp: expected at least 1, found 0"),
    ],
)
def test_flags_that_make_no_sense(flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    from jllama.cli.generate import main

    with pytest.raises(SystemExit):
        main(["the", "--no-compilation-cache", *flags])
    assert message in capsys.readouterr().err


def test_process_0_needs_a_port_that_is_free(capsys: pytest.CaptureFixture[str]) -> None:
    from jllama.cli.generate import main

    with socket.create_server(("", 0)) as other:
        where = f"localhost:{other.getsockname()[1]}"
        with pytest.raises(SystemExit):
            main(["the", "--no-compilation-cache", "--coordinator", where, "--num-processes", "2", "--process-id", "0"])
    assert f"--coordinator {where}: expected a free port of this host, found: " in capsys.readouterr().err

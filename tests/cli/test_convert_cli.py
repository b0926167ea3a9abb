"""``python -m convert`` as users call it: what it recognises, refuses, leaves on disk and compares."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import checkpoints
import numpy as np
import pytest

import jllama.formats.staging as staging
from convert.__main__ import main
from jllama.errors import InputError
from jllama.formats import open_source
from jllama.formats.native import directory, save
from jllama.formats.replaceable import LLAMA2C
from jllama.formats.source import Source

ROOT = Path(__file__).parents[2]


def run(*args: object) -> int:
    return main([str(arg) for arg in args])


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The one line on stderr of a command that exits with 2."""
    with pytest.raises(SystemExit) as stop:
        run(*args)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert len(lines) == 1, lines
    return lines[0]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return checkpoints.make("hf", checkpoints.source(), tmp_path / "model")


@pytest.mark.parametrize("form", checkpoints.FORMS)
def test_every_form_is_recognised(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = checkpoints.source()
    path = checkpoints.make(form, source, tmp_path / "model")
    assert run(path, tmp_path / "out") == 0
    opened = open_source(path)
    checkpoints.assert_same_tensors(open_source(tmp_path / "out"), opened)
    assert "out: native" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("name", "args", "form"),
    [
        ("x", [], "hf"),
        ("x.gguf", [], "gguf"),
        ("x.bin", [], "llama2c"),
        ("x", ["--to", "hf"], "hf"),
        ("x", ["--to", "llama2c"], "llama2c"),
        ("x", ["--quant", "int8"], "native"),
        ("x.bin", ["--quant", "int8", "--group", "16"], "llama2c"),
    ],
)
def test_what_is_written_follows_from_the_flags(name: str, args: list[str], form: str, model: Path) -> None:
    destination = model.parent / name
    assert run(model, destination, "-q", *args) == 0
    opened = open_source(destination)
    assert opened.form == form
    assert (opened.quant is None) == ("--quant" not in args)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("to", ["native", "hf", "gguf"])
def test_the_dtype_asked_for(dtype: str, to: str, model: Path) -> None:
    assert run(model, model.parent / "out", "--to", to, "--dtype", dtype, "-q") == 0
    assert open_source(model.parent / "out").dtype == dtype


def test_a_tokenizer_from_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkpoints.make("llama2c-0", checkpoints.source(), tmp_path / "model")
    tokenizer = tmp_path / "some.model"
    tokenizer.write_bytes(checkpoints.vocabulary().model_bytes())
    assert run(path, tmp_path / "out", "--tokenizer", tokenizer, "-q") == 0
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == tokenizer.read_bytes()
    tokenizer.write_bytes(checkpoints.vocabulary(60).model_bytes())
    checkpoints.make("llama2c-0", checkpoints.source(checkpoints.CONFIG.replace(vocab_size=50)), tmp_path / "small")
    line = refused(capsys, tmp_path / "small.bin", tmp_path / "no", "--tokenizer", tokenizer)
    assert "expected a tokenizer for the model's vocab_size 50, found 60 pieces" in line
    assert "no such tokenizer file" in refused(capsys, path, tmp_path / "no", "--tokenizer", tmp_path / "none")


def test_nothing_is_overwritten_without_force(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = model.parent / "other"
    assert run(model, other, "-q") == 0
    before = (other / "model.safetensors").stat().st_ino
    assert "exists already (--force replaces it)" in refused(capsys, model, other)
    assert (other / "model.safetensors").stat().st_ino == before
    assert run(model, other, "--force", "-q") == 0
    assert (other / "model.safetensors").stat().st_ino != before
    assert run(model, model.parent / "x.gguf", "-q") == run(model, model.parent / "x.gguf", "-q", "--force") == 0
    assert "found the same" in refused(capsys, model, model, "--force")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--group", "32"], "--group: expected --quant int8 or int4"),
        (["--group", "33", "--quant", "int4"], "--group: expected 32, 64 or 128, found 33"),
        (["--quant", "int4", "--to", "gguf"], "--quant: expected --to native"),
        (["--quant", "int4", "--to", "llama2c"], "--to llama2c: expected float32 or --quant int8"),
        (["--dtype", "float16", "--to", "llama2c"], "--to llama2c: expected float32 or --quant int8"),
    ],
)
def test_flags_that_do_not_go_together(
    args: list[str], message: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, model, model.parent / "out", *args)
    assert not (model.parent / "out").exists()


def test_quantised_weights_are_not_quantised_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkpoints.make("native-int8", checkpoints.source(), tmp_path / "model")
    line = refused(capsys, path, tmp_path / "out", "--quant", "int4")
    assert "expected float weights, found int8 already" in line


def test_too_little_disk(model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: _Usage())
    assert "GB, the disk has 0.001 GB free" in refused(capsys, model, model.parent / "out")
    assert not (model.parent / "out").exists()


class _Usage:
    free = 1_000_000


@pytest.mark.parametrize("to", ["native", "gguf", "llama2c"])
def test_a_disk_that_fills_up(
    to: str, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.pwrite, []

    def pwrite(handle: int, data: bytes, at: int) -> int:
        calls.append(at)
        if len(calls) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle, data, at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    before = set(model.parent.iterdir())
    assert "out: cannot be written: No space left on device" in refused(capsys, model, model.parent / "out", "--to", to)
    assert set(model.parent.iterdir()) == before
    monkeypatch.undo()
    assert run(model, model.parent / "out", "--to", to, "-q") == 0


def test_places_that_cannot_be_written(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such directory" in refused(capsys, model, model.parent / "nowhere" / "out")
    assert "no such file or directory" in refused(capsys, model.parent / "nowhere", model.parent / "out")


# A suite that runs in the background of a shell is told to ignore interrupts, and its children inherit that.
SLOW = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
real = os.pwrite
def pwrite(handle, data, at):
    print("writing", flush=True)
    sys.stdin.readline()  # goes on when it is told to
    return real(handle, data, at)
os.pwrite = pwrite
from convert.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_an_interrupted_run_leaves_nothing_under_the_name(number: int, code: int, model: Path) -> None:
    parent, out = model.parent, model.parent / "out"
    command = [sys.executable, "-c", SLOW, str(model), str(out)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process = subprocess.Popen(command, cwd=ROOT, text=True, bufsize=1, **pipes)
    assert process.stdin is not None
    assert process.stdout is not None
    for _ in range(2):
        assert process.stdout.readline() == "writing\n"
        process.stdin.write("\n")
    assert process.stdout.readline() == "writing\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in errors
    assert not out.exists()
    left = [p for p in parent.iterdir() if p.name.startswith(".out.partial-")]
    assert len(left) == (1 if number == signal.SIGKILL else 0)
    # A second run just works, and removes what the first one could not.
    assert run(model, out, "-q") == 0
    checkpoints.assert_same_tensors(open_source(out), open_source(model))
    assert {p.name for p in parent.iterdir()} == {"model", "out"}


def test_what_a_running_conversion_writes_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def write_both() -> None:
        with staging.staged(out, 10, LLAMA2C) as place:
            place.write_text("second")
            with staging.staged(out, 10, LLAMA2C) as other:
                other.write_text("first")
            assert place.read_text() == "second"

    with pytest.raises(InputError, match="exists already"):
        write_both()
    assert out.read_text() == "first"
    assert list(tmp_path.iterdir()) == [out]


def test_check(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parent = model.parent
    assert run(model, parent / "half.gguf", "--dtype", "float16", "-q") == 0
    assert run(model, parent / "int8", "--quant", "int8", "-q") == 0
    for other in (model, parent / "half.gguf", parent / "int8"):
        capsys.readouterr()
        assert run("--check", model, other) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[-2].startswith("tensors: " + ("20 of 20" if other == model else ""))
        assert "likeliest tokens agree" in lines[-1]
    save(directory(checkpoints.source(seed=1)), parent / "other")
    assert run("--check", model, parent / "other") == 1
    save(directory(checkpoints.source(checkpoints.UNTIED)), parent / "untied")
    capsys.readouterr()
    assert "untied: tie_embeddings: expected True" in refused(capsys, "--check", model, parent / "untied")


@pytest.mark.parametrize("to", ["native", "gguf", "llama2c"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_nan_and_infinities_are_counted(
    dtype: str, to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoints.source(dtype=dtype)
    arrays = {name: tensor.read() for name, tensor in source.tensors.items()}
    arrays["layers.1.w_up"][3, 5] = np.nan
    arrays["layers.1.w_up"][4, :2] = [np.inf, -np.inf]
    arrays["norm"][7] = -np.nan
    damaged: Source = checkpoints.in_memory(source.config, arrays)
    path = checkpoints.make("hf", damaged, tmp_path / "model")
    assert run(path, tmp_path / "out", "--to", to) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert any(line.endswith("up_proj.weight: 1 NaN and 2 infinite values") for line in lines)
    assert any(line.endswith("model.norm.weight: 1 NaN and 0 infinite values") for line in lines)


def test_values_too_large_for_the_dtype_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = checkpoints.source()
    source.tensors["layers.0.wo"].read()[2, 3:6] = 1e6
    path = checkpoints.make("hf", source, tmp_path / "model")
    assert run(path, tmp_path / "out", "--dtype", "float16") == 0
    assert "o_proj.weight: 0 NaN and 3 infinite values" in capsys.readouterr().err


def test_help_waits_for_nothing_heavy() -> None:
    code = """
        import sys
        from convert.__main__ import parser
        from convert import quantize
        from jllama.cli import perplexity
        for made in (parser, perplexity.parser, quantize.parser):
            made().format_help()
        print([name for name in ("jax", "numpy", "gguf", "tokenizers", "sentencepiece") if name in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True)
    # convert/__init__ opens sources, which numpy does; jax is what takes seconds.
    assert done.stdout.strip() in ("[]", "['numpy']"), done.stderr

"""`convert` and `quantize` never delete the only copy of something, whatever is at DST, with and without --force."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import checkpoints
import pytest

import convert.__main__
import convert.quantize
from jllama.errors import InputError
from jllama.formats import open_source, staging
from jllama.formats.native import directory, save
from jllama.formats.replaceable import HF, check_place

ROOT = Path(__file__).parents[2]
COMMANDS = {"convert": convert.__main__.main, "quantize": convert.quantize.main}


def tree(path: Path) -> dict[str, object]:
    """Everything below a path: contents of files, targets of links."""
    found = {}
    for entry in sorted(path.rglob("*")):
        name = str(entry.relative_to(path))
        found[name] = os.readlink(entry) if entry.is_symlink() else entry.read_bytes() if entry.is_file() else None
    return found


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint in its own folder, and what a test puts beside it."""
    return checkpoints.make("hf", checkpoints.source(), tmp_path / "model")


def refused(capsys: pytest.CaptureFixture[str], command: str, src: Path, dst: Path, *flags: str) -> str:
    """The command's one-line error. Checks that it exits with 2 and changes nothing in the folder around SRC."""
    before = tree(src.parent)
    with pytest.raises(SystemExit) as stop:
        COMMANDS[command]([str(src), str(dst), *flags])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert len(lines) == 1, lines
    assert tree(src.parent) == before
    return lines[0]


def link_to(target: Path, link: Path) -> Path:
    link.symlink_to(target)
    return link


# Forbidden places for DST, made from the checkpoint's path, and what the error says.
NEAR: dict[str, tuple[Callable[[Path], Path], str]] = {
    "itself": (lambda src: src, "found the same"),
    "itself, through its parent": (lambda src: src / ".." / src.name, "found the same"),
    "itself, through a link": (lambda src: link_to(src, src.parent / "link"), "found the same"),
    "itself, through a link of its parent": (
        lambda src: link_to(src.parent, src.parent / "link") / src.name,
        "found the same",
    ),
    "its weights": (lambda src: src / "model.safetensors", "found one inside"),
    "a new place inside": (lambda src: src / "int8", "found one inside"),
    "deep inside": (lambda src: src / "a" / "b", "found one inside"),
    "inside, through a link": (lambda src: link_to(src, src.parent / "link") / "int8", "found one inside"),
    "its parent": (lambda src: src.parent, "found one that holds"),
    "its parent, from inside": (lambda src: src / "..", "found one that holds"),
    "a parent of that": (lambda src: src.parent.parent, "found one that holds"),
    "its parent, through a link": (lambda src: link_to(src.parent, src.parent / "link"), "found one that holds"),
}


@pytest.mark.parametrize("flags", [[], ["--force"]], ids=["plain", "force"])
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("case", NEAR)
def test_a_place_that_is_not_apart_from_the_source(
    case: str, command: str, flags: list[str], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, message = NEAR[case]
    assert message in refused(capsys, command, model, make(model), *flags)


@pytest.mark.parametrize("flags", [[], ["--force"]], ids=["plain", "force"])
@pytest.mark.parametrize("form", ["gguf", "llama2c-0"])
def test_a_file_is_not_converted_onto_itself(
    form: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoints.make(form, checkpoints.source(), tmp_path / "model")
    hard = path.with_stem("hard")
    os.link(path, hard)
    soft = link_to(path, path.with_stem("soft"))
    for place in (path, hard, soft):
        assert "found the same" in refused(capsys, "convert", path, place, *flags)
    assert "found one that holds" in refused(capsys, "quantize", path, tmp_path, *flags)


def test_what_the_source_leads_to_is_not_replaced(model: Path) -> None:
    """As in Hugging Face's cache: a snapshot of links to files that lie elsewhere."""
    kept = model.parent / "kept"
    shutil.copytree(model, kept)  # alone, --force would replace it
    snapshot = model.parent / "snapshot"
    snapshot.mkdir()
    for entry in kept.iterdir():
        link_to(entry, snapshot / entry.name)
    assert check_place(kept, HF, force=True) is not None
    with pytest.raises(InputError, match=r"kept: expected a place apart from SRC, found one that holds .* of it"):
        check_place(kept, HF, reads=[snapshot], force=True)


def a_file(path: Path) -> None:
    path.write_text("my thesis")


def a_directory(path: Path) -> None:
    path.mkdir()
    (path / "thesis.txt").write_text("!")


def with_a_thesis(path: Path) -> None:
    save(directory(checkpoints.source()), path)
    (path / "thesis.txt").write_text("!")


def with_a_folder(path: Path) -> None:
    save(directory(checkpoints.source()), path)
    (path / "tokenizer.json").mkdir()


def with_a_link(path: Path) -> None:
    save(directory(checkpoints.source()), path)
    (path / "tokenizer.json").symlink_to("config.json")


def by_another_program(path: Path) -> None:
    save(directory(checkpoints.source()), path)
    values = json.loads((path / "config.json").read_text())
    del values["written_by"]
    (path / "config.json").write_text(json.dumps(values))


def config_alone(path: Path) -> None:
    path.mkdir()
    (path / "config.json").write_text("{}")


def a_damaged_one(path: Path) -> None:
    path.mkdir()
    (path / "model.safetensors").write_text("?")


def a_gguf(path: Path) -> None:
    made = checkpoints.make("gguf", checkpoints.source(), path.with_name("other"))
    made.rename(path)


def a_llama2c(path: Path) -> None:
    made = checkpoints.make("llama2c-0", checkpoints.source(), path.with_name("other"))
    made.rename(path)


def someones_gguf(path: Path) -> None:
    a_gguf(path)
    path.write_bytes(path.read_bytes().replace(b"jllama.written_by", b"x" * len("jllama.written_by")))


def a_directory_of_ours(path: Path) -> None:
    save(directory(checkpoints.source()), path)


def a_link_to_one(path: Path) -> None:
    save(directory(checkpoints.source()), path.with_name("target"))
    path.symlink_to("target")


def a_link_to_nothing(path: Path) -> None:
    path.symlink_to("nowhere")


def a_link_in_a_circle(path: Path) -> None:
    path.symlink_to(path.name)


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


# What is at DST, what should be written there, and what the error says was found.
TAKEN: list[tuple[Callable[[Path], None], str, str]] = [
    (a_file, "native", "found a file"),
    (a_gguf, "native", "found a file"),
    (a_directory, "native", "found thesis.txt in it"),
    (with_a_thesis, "native", "found thesis.txt in it"),
    (with_a_folder, "native", "found tokenizer.json in it"),
    (with_a_link, "native", "found tokenizer.json in it"),
    (by_another_program, "native", "found a checkpoint that another program wrote"),
    (config_alone, "native", "found a checkpoint that another program wrote"),
    (a_damaged_one, "native", "found something else"),
    (a_link_to_one, "native", "found a link"),
    (a_link_to_nothing, "native", "found a link"),
    (a_link_in_a_circle, "native", "found a link"),
    (a_pipe, "native", "found a file"),
    (a_file, "gguf", "found something else"),
    (a_llama2c, "gguf", "found something else"),
    (someones_gguf, "gguf", "found a GGUF file that another program wrote"),
    (a_directory_of_ours, "gguf", "found a directory"),
    (a_link_to_one, "gguf", "found a link"),
    (a_pipe, "gguf", "found something else"),
    (a_directory_of_ours, "llama2c", "found config.json in it"),
    (a_file, "llama2c", "found a file"),
]


@pytest.mark.parametrize(("make", "to", "message"), TAKEN, ids=lambda v: getattr(v, "__name__", str(v)))
def test_force_replaces_nothing_but_our_checkpoints_of_that_form(
    make: Callable[[Path], None], to: str, message: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dst = model.parent / "taken"
    make(dst)
    if not dst.is_fifo():  # reading a FIFO would wait for a writer
        assert "exists already" in refused(capsys, "convert", model, dst, "--to", to)
        assert message in refused(capsys, "convert", model, dst, "--to", to, "--force")
        if to == "native":
            assert message in refused(capsys, "quantize", model, dst, "--force")
    else:
        with pytest.raises(SystemExit):
            COMMANDS["convert"]([str(model), str(dst), "--to", to, "--force"])
        assert message in capsys.readouterr().err
        assert dst.is_fifo()


def test_a_llama2c_file_is_replaced_by_none_but_a_complete_one(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dst = model.parent / "x.bin"
    for content in (b"", b"my thesis", bytes(300)):
        dst.write_bytes(content)
        assert "found something else" in refused(capsys, "convert", model, dst, "--force")


@pytest.mark.parametrize("name", ["x", "x.gguf", "x.bin"])
def test_force_replaces_our_own_and_says_what(name: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dst = model.parent / name
    assert COMMANDS["convert"]([str(model), str(dst), "-q"]) == 0
    other = checkpoints.make("hf", checkpoints.source(seed=1), model.parent / "other")
    capsys.readouterr()
    assert COMMANDS["convert"]([str(other), str(dst), "--force"]) == 0
    error = capsys.readouterr().err
    assert error.startswith(f"jllama convert: replaces {dst}, ")
    assert " of 0.1 MB" in error or " of 0.0 MB" in error
    checkpoints.assert_same_tensors(open_source(dst), open_source(other))
    assert {entry.name for entry in model.parent.iterdir()} == {"model", "other", name}


def test_an_empty_directory_and_a_llama2c_directory_are_replaced(model: Path) -> None:
    dst = model.parent / "x"
    dst.mkdir()
    for _ in range(2):
        assert COMMANDS["convert"]([str(model), str(dst), "--to", "llama2c", "--force", "-q"]) == 0
        assert open_source(dst).form == "llama2c"


def test_quantize_replaces_its_own_result(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dst = model.parent / "x"
    assert COMMANDS["quantize"]([str(model), str(dst), "-q"]) == 0
    assert COMMANDS["quantize"]([str(model), str(dst), "--format", "int4", "--force"]) == 0
    assert f"jllama quantize: replaces {dst}, a Hugging Face or native directory" in capsys.readouterr().err
    assert open_source(dst).quant is not None


def test_the_old_result_goes_when_the_new_one_is_complete(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dst = model.parent / "x"
    save(directory(checkpoints.source(seed=1)), dst)
    before = tree(dst)
    export = directory(checkpoints.source(seed=2))

    def fails(path: Path, watch: object) -> None:
        export.write(path, watch)  # pyright: ignore[reportArgumentType]
        assert tree(dst) == before
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="No space left"):
        save(type(export)(export.nbytes, fails, export.form), dst, force=True)
    assert tree(dst) == before
    # Neither does a rename that fails lose it, between which two there is a moment without a result.
    real = os.replace
    monkeypatch.setattr(staging.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save(export, dst, force=True)
    monkeypatch.setattr(staging.os, "replace", real)
    assert tree(dst) == before
    assert {entry.name for entry in model.parent.iterdir()} == {"model", "x"}


KILLED = """
import os, signal, sys
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
from convert.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_killed_between_the_two_renames_the_next_run_puts_the_old_result_back(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dst = model.parent / "x"
    assert COMMANDS["convert"]([str(model), str(dst), "-q"]) == 0
    before = tree(dst)
    command = [sys.executable, "-c", KILLED, str(model), str(dst), "--force"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120).returncode == -signal.SIGKILL
    assert not dst.exists()  # the moment between
    with pytest.raises(SystemExit):
        COMMANDS["convert"]([str(model), str(dst)])
    assert "exists already" in capsys.readouterr().err
    assert tree(dst) == before
    assert {entry.name for entry in model.parent.iterdir()} == {"model", "x"}


def test_a_tokenizer_may_come_from_what_is_replaced(model: Path) -> None:
    dst = model.parent / "x"
    assert COMMANDS["convert"]([str(model), str(dst), "-q"]) == 0
    before = (dst / "tokenizer.model").read_bytes()
    flags = ["--tokenizer", str(dst / "tokenizer.model"), "--force", "-q"]
    assert COMMANDS["convert"]([str(model), str(dst), *flags]) == 0
    assert (dst / "tokenizer.model").read_bytes() == before


def test_the_library_saves_to_where_it_loaded_from(model: Path) -> None:
    import jllama

    dst = model.parent / "x"
    assert COMMANDS["convert"]([str(model), str(dst), "-q"]) == 0
    params = jllama.load(dst)
    with pytest.raises(InputError, match="exists already"):
        jllama.save(params, dst)
    jllama.save(params, dst, tokenizer=dst / "tokenizer.model", force=True)
    checkpoints.assert_same_tensors(open_source(dst), open_source(model))

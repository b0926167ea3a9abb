"""The command lines as a user types them, on the embedded model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import jllama
from jllama import cli
from jllama.cli import chat
from jllama.cli import generate as generate_command

PROMPT = "Once upon a time,"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory):
    """Runs ``jllama generate`` with some flags: what it printed, and said on stderr."""
    cache = str(tmp_path_factory.getbasetemp() / "xla")

    def call(*flags: str, command=generate_command) -> tuple[str, str]:
        command.main([*flags, "--compilation-cache", cache])
        out, err = capsys.readouterr()
        return out, err

    return call


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]):
    """The one line with which ``jllama generate`` refuses some flags."""

    def call(*flags: str) -> str:
        with pytest.raises(SystemExit) as exit_:
            generate_command.main(list(flags))
        out, err = capsys.readouterr()
        assert exit_.value.code == 2
        assert out == ""
        assert err.count("\n") == 1
        assert "Traceback" not in err
        return err

    return call


def module(*args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """``python -W error -m ...`` in a process of its own."""
    command = [sys.executable, "-W", "error", "-m", *args]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("command", ["jllama.generate", "jllama.cli.chat", "jllama"])
def test_help_imports_nothing_heavy(command: str) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{command}', '--help']\n"
        "try: runpy.run_module(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "heavy = {'jax', 'numpy', 'flax', 'sentencepiece'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout


def test_as_a_module_it_tells_a_story_and_warns_of_nothing() -> None:
    done = module("jllama.generate", "-", "-n", "12", "--no-compilation-cache", stdin=PROMPT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert done.stderr.count("\n") == 1  # the line of figures, and no warning
    assert "12 tokens" in done.stderr
    assert "tokens/s" in done.stderr


def test_a_reader_that_goes_away_is_no_error() -> None:
    flags = "-p 'Once' -n 64 --no-compilation-cache -q"
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m jllama.generate {flags} | head -c 1"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert len(done.stdout) == 1
    assert done.stderr == ""


def test_the_ways_to_give_a_prompt_agree(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(PROMPT + "\n")
    texts = {
        run(*flags, "-n", "8", "-q")[0].strip()
        for flags in (PROMPT.split(), ["-p", PROMPT], ["--prompt-file", str(file)])
    }
    assert len(texts) == 1


def test_json_says_all(run) -> None:
    out, _ = run("-p", PROMPT, "-n", "8", "--json", "--logprobs", "-q")
    got = json.loads(out)
    assert got["finish_reason"] == "length"
    assert len(got["ids"]) == len(got["logprobs"]) == 8
    assert all(value <= 0 for value in got["logprobs"])
    assert got["prompt_ids"][0] == 1
    assert {"load_s", "compile_s", "prefill_s", "decode_s", "tokens_per_s"} <= set(got["timings"])
    assert got["backend"]["decode"]["matmul"]["impl"] == "xla"
    assert "Hopper" in got["backend"]["decode"]["matmul"]["why"]
    assert got["backend"]["decode"]["decode_step"]["impl"] == "ops"
    tokenizer = jllama.load_tokenizer(jllama.DEMO / "tokenizer.model")
    assert tokenizer.decode(got["prompt_ids"] + got["ids"]) == PROMPT + got["text"]


def test_json_without_logprobs_has_none(run) -> None:
    assert "logprobs" not in json.loads(run("-p", PROMPT, "-n", "4", "--json", "-q")[0])


def test_ids_and_echo(run) -> None:
    alone = run("-p", PROMPT, "-n", "4", "--ids", "-q")[0].split()
    echoed = run("-p", PROMPT, "-n", "4", "--ids", "--echo", "-q")[0].split()
    assert len(alone) == 4
    assert echoed[-4:] == alone
    assert echoed[0] == "1"
    assert run("-p", PROMPT, "-n", "4", "--echo", "-q")[0].startswith(PROMPT)


def test_prompts_in_a_batch_give_what_each_gives_alone(run, tmp_path: Path) -> None:
    prompts = [PROMPT, "Tom", "One day, a girl named Lily went to the"]
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(prompts))
    together = [
        json.loads(line) for line in run("--prompt-file", str(file), "-n", "12", "--json", "-q")[0].splitlines()
    ]
    pairs = [
        json.loads(line)
        for line in run("--prompt-file", str(file), "-n", "12", "--json", "-q", "--batch-size", "2")[0].splitlines()
    ]
    for prompt, batched, paired in zip(prompts, together, pairs, strict=True):
        alone = json.loads(run("-p", prompt, "-n", "12", "--json", "-q")[0])
        assert alone["ids"] == batched["ids"] == paired["ids"]
        assert alone["text"] == batched["text"]


def test_same_seed_same_text_other_seed_other_text(run) -> None:
    flags = ("-p", PROMPT, "-n", "24", "--temp", "1.0", "-q")
    first, again, other = (run(*flags, "--seed", seed)[0] for seed in ("3", "3", "4"))
    assert first == again != other


def test_a_stop_string_ends_the_text_before_it(run) -> None:
    whole = run("-p", PROMPT, "-n", "40", "-q")[0]
    stop = whole.split()[6]
    got = json.loads(run("-p", PROMPT, "-n", "40", "--stop", stop, "--json", "-q")[0])
    assert got["finish_reason"] == "stop"
    assert got["text"] == whole[: whole.index(stop)]


def test_end_of_sequence_stops_unless_ignored(run) -> None:
    long = ("-p", "They all lived happily ever after. The end.", "-n", "60", "--json", "-q")
    got = json.loads(run(*long)[0])
    on = json.loads(run(*long, "--ignore-eos")[0])
    assert got["finish_reason"] == "stop"
    assert got["ids"][-1] == 2
    assert len(on["ids"]) == 60
    assert on["ids"][: len(got["ids"])] == got["ids"]


@pytest.mark.parametrize("flags", [["--quant", "int8"], ["--quant", "int4"], ["--dtype", "bfloat16"]])
def test_other_weights_still_tell_a_story(run, flags: list[str]) -> None:
    assert len(run("-p", PROMPT, "-n", "8", "--ids", "-q", *flags)[0].split()) == 8


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--top-p", "1.5"], ["--top-p", "1.5", "at most 1"]),
        (["--temp", "-1"], ["--temperature", "-1", "at least 0"]),
        (["--top-k", "-2"], ["--top-k", "-2"]),
        (["--repetition-penalty", "0"], ["--repetition-penalty", "0"]),
        (["-n", "0"], ["--max-new-tokens", "0"]),
        (["-c", "100000"], ["--max-seq-len", "100000", "512"]),
        (["--model", "no/such/model"], ["no/such/model", "no such file"]),
        (["--prompt-file", "no_such_file"], ["no_such_file"]),
        (["-p", "one", "two"], ["--prompt", "one of"]),
        (["-p", "word " * 600], ["511", "found"]),
        (["--backend", "pallas"], ["--backend pallas", "Hopper", "cpu"]),
        (["--tokenizer", "missing.model"], ["missing.model"]),
    ],
)
def test_bad_input_is_refused_in_one_line(refused, flags: list[str], words: list[str]) -> None:
    line = refused(*flags)
    assert all(word in line for word in words), line


def test_the_console_script_knows_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    assert "generate" in capsys.readouterr().out
    assert cli.main(["dance"]) == 2
    assert "dance" in capsys.readouterr().err


def test_chat_keeps_the_conversation(capsys: pytest.CaptureFixture[str], monkeypatch, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    lines = iter(
        ["/system be kind", "hello", "/nonsense", "and then?", f"/save {saved}", f"/save {saved}", "/reset", "/quit"]
    )
    monkeypatch.setattr(chat, "read_line", lambda prompt: next(lines))
    chat.main(["-n", "6", "--no-compilation-cache"])
    out, err = capsys.readouterr()
    talk = json.loads(saved.read_text())
    assert talk["system"] == "be kind"
    assert [exchange["question"] for exchange in talk["exchanges"]] == ["hello", "and then?"]
    assert all(exchange["answer"] in out for exchange in talk["exchanges"])
    assert "/nonsense: no such command" in err
    assert "cannot be written" in err  # the second save: a file is never overwritten
    assert "forgotten" in err


def test_chat_asks_what_to_drop_when_the_context_is_full(capsys, monkeypatch) -> None:
    asked = []
    lines = iter(["tell me a story", "tell me another story please", "d", "no more", "c", "/quit"])

    def read_line(prompt: str) -> str:
        asked.append(prompt)
        return next(lines)

    monkeypatch.setattr(chat, "read_line", read_line)
    chat.main(["-n", "24", "-c", "80", "-q", "--no-compilation-cache"])
    assert sum("[d]rop" in prompt for prompt in asked) == 2
    assert "the context is full" in capsys.readouterr().err

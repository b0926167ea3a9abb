"""The command lines as a user types them, on the embedded model."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import jllama
from jllama import cli

PROMPT = "Once upon a time,"


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


@pytest.mark.parametrize("given", [["-"], []])
def test_as_a_module_it_tells_a_story_of_what_is_piped_and_warns_of_nothing(given: list[str], module, run) -> None:
    done = module("jllama.generate", *given, "-n", "12", "--no-compilation-cache", stdin=PROMPT.encode() + b"\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == run("-p", PROMPT, "-n", "12", "-q")[0]
    assert done.stderr.count(b"\n") == 1  # the line of figures, and no warning
    assert b"12 tokens" in done.stderr
    assert b"tokens/s" in done.stderr


def test_a_reader_that_goes_away_is_no_error() -> None:
    flags = "-p 'Once' -n 64 --no-compilation-cache -q"
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m jllama.generate {flags} | head -c 1"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert len(done.stdout) == 1
    assert done.stderr == ""


COMMANDS = ["generate", "chat", "serve", "info", "perplexity", "convert", "quantize"]
BENCH = ["compare", "engine", "ops", "report", "two_trees"]
MODULES = ["jllama.generate", "convert", *(f"bench.{name}" for name in BENCH)]
PRINTING = ["jllama --help", "jllama --version", "jllama --completion bash", "jllama info"]


@pytest.mark.parametrize(
    "command", [*PRINTING, *(f"{c} --help" for c in (*(f"jllama {c}" for c in COMMANDS), *MODULES))]
)
def test_output_into_a_closed_pipe_is_no_error(command: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}  # so that output waits in a buffer
    arguments = [sys.executable, "-m", *command.split()]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) == 141


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
    whole = json.loads(out)
    (got,) = whole["completions"]
    assert got["finish_reason"] == "length"
    assert (got["index"], got["sample"], got["prompt"]) == (0, 0, PROMPT)
    assert whole["model"] == {"path": str(jllama.DEMO), "format": "hf", "dtype": "float32", "quant": "none"}
    assert len(got["ids"]) == len(got["logprobs"]) == 8
    assert all(value <= 0 for value in got["logprobs"])
    assert got["prompt_ids"][0] == 1
    assert {"load_s", "compile_s", "prefill_s", "decode_s", "tokens_per_s"} <= set(whole["timings"])
    assert whole["backend"]["decode"]["matmul"]["impl"] == "xla"
    assert "Hopper" in whole["backend"]["decode"]["matmul"]["why"]
    assert whole["backend"]["decode"]["decode_step"]["impl"] == "ops"
    tokenizer = jllama.load_tokenizer(jllama.DEMO / "tokenizer.model")
    assert tokenizer.decode(got["prompt_ids"] + got["ids"]) == PROMPT + got["text"]


def test_json_without_logprobs_has_none(run) -> None:
    assert "logprobs" not in json.loads(run("-p", PROMPT, "-n", "4", "--jsonl", "-q")[0])


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
        json.loads(line) for line in run("--prompt-file", str(file), "-n", "12", "--jsonl", "-q")[0].splitlines()
    ]
    pairs = [
        json.loads(line)
        for line in run("--prompt-file", str(file), "-n", "12", "--jsonl", "-q", "--batch-size", "2")[0].splitlines()
    ]
    for prompt, batched, paired in zip(prompts, together, pairs, strict=True):
        alone = json.loads(run("-p", prompt, "-n", "12", "--jsonl", "-q")[0])
        assert alone["ids"] == batched["ids"] == paired["ids"]
        assert alone["text"] == batched["text"]


def test_same_seed_same_text_other_seed_other_text(run) -> None:
    flags = ("-p", PROMPT, "-n", "24", "--temp", "1.0", "-q")
    first, again, other = (run(*flags, "--seed", seed)[0] for seed in ("3", "3", "4"))
    assert first == again != other


def test_a_stop_string_ends_the_text_before_it(run) -> None:
    whole = run("-p", PROMPT, "-n", "40", "-q")[0]
    stop = whole.split()[6]
    got = json.loads(run("-p", PROMPT, "-n", "40", "--stop", stop, "--jsonl", "-q")[0])
    assert got["finish_reason"] == "stop"
    assert got["text"] == whole[: whole.index(stop)]


def test_end_of_sequence_stops_unless_ignored(run) -> None:
    long = ("-p", "They all lived happily ever after. The end.", "-n", "60", "--jsonl", "-q")
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
        (["-p", "a", "-c", "100000"], ["--max-seq-len", "100000", "512"]),
        (["-p", "a", "--model", "no/such/model"], ["no/such/model", "no such file"]),
        (["--prompt-file", "no_such_file"], ["no_such_file"]),
        (["--file", "no_such_file"], ["no_such_file"]),
        (["-n", "many"], ["--max-new-tokens", "many"]),
        (["--stop", ""], ["--stop: expected a text, found an empty one"]),
        (["--logprobs"], ["--logprobs: expected --json or --jsonl with it, found neither"]),
        (["--json", "--jsonl"], ["--json: expected without --jsonl"]),
        (["--ids", "--json"], ["--ids: expected without --json"]),
        (["--echo", "--jsonl"], ["--echo: expected without --json and --jsonl"]),
        (["--samples", "2"], ["--samples: expected --temp above 0"]),
        (["--samples", "0"], ["--samples: expected at least 1, found 0"]),
        (["--batch-size", "0"], ["--slots: expected at least 1, found 0"]),
        (["--prompt-format", "jsonl"], ["--prompt-format: expected --prompt-file with it"]),
        (["-p", "one", "two"], ["--prompt", "one of"]),
        (["-p", "word " * 600], ["511", "found"]),
        (["-p", "a", "--backend", "pallas"], ["--backend pallas", "Hopper", "cpu"]),
        (["-p", "a", "--tokenizer", "missing.model"], ["missing.model"]),
    ],
)
def test_bad_input_is_refused_in_one_line(refused, flags: list[str], words: list[str]) -> None:
    line = refused(*flags)
    assert all(word in line for word in words), line


def test_the_console_script_knows_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == cli.main([]) == 0
    assert "generate" in capsys.readouterr().out
    for given, words in (("dance", ["dance"]), ("genrate", ["genrate", "did you mean generate?"])):
        assert cli.main([given]) == 2
        line = capsys.readouterr().err
        assert all(word in line for word in words)
        assert line.count("\n") == 1


@pytest.mark.parametrize("command", [[], *([name] for name in cli.NAMES)])
def test_the_version_is_told(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):
        cli.main([*command, "--version"])
    assert capsys.readouterr().out.startswith(f"jllama {jllama.__version__} (jax ")


@pytest.mark.parametrize(
    ("flag", "advice"),
    [
        ("--temprature", "did you mean --temperature?"),
        ("--max-new-token", "did you mean --max-new-tokens?"),  # the beginning of a flag is none
        ("--propmt=x", "--propmt: no such flag; did you mean --prompt?"),
        ("--n-ctx", "use --max-seq-len instead"),
        ("--quux-zzz", "--help lists them"),
    ],
)
def test_an_unknown_flag_gets_the_nearest_one(flag: str, advice: str, refused) -> None:
    line = refused(flag)
    assert "no such flag" in line
    assert advice in line


@pytest.mark.parametrize("command", cli.NAMES)
def test_every_command_has_errors_of_one_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    # What a command needs besides is missing: the slip is named, and not the lack.
    for given, words in (("--hepl", "did you mean --help?"), ("caf\udce9", "found byte 0xe9")):
        with pytest.raises(SystemExit) as exit_:
            cli.main([command, given])
        line = capsys.readouterr().err
        assert exit_.value.code == 2
        assert line.startswith(f"jllama {command}: error: ")
        assert line.count("\n") == 1
        assert words in line


def test_flags_of_other_programs_are_known(run) -> None:
    ours = run("-p", PROMPT, "-n", "6", "-q")[0]
    for flag in ("--max-tokens", "--n-predict", "--max-new-tokens"):
        assert run("-p", PROMPT, flag, "6", "-q", "--ctx-size", "64")[0] == ours
    out, err = run("-p", PROMPT, "-n", "6", "-ngl", "99")
    assert out == ours
    assert "-ngl: has no effect" in err
    assert "JAX_PLATFORMS=cpu" in err


def test_threads_keep_the_process_to_so_many_cores(refused) -> None:
    code = (
        "import os; from jllama.cli import generate; generate.main(['-p', 'a', '-n', '2', '-q', '-t', '1'])\n"
        "print(len(os.sched_getaffinity(0)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "1"
    assert "--threads: expected at least 1, found 0" in refused("-p", "a", "-t", "0")


@pytest.mark.parametrize(
    ("args", "stdin", "words"),
    [
        (["jllama.generate", b"-p\xff"], b"", ["error: '-p\\xff': ", "expected UTF-8 text, found byte 0xff"]),
        (["jllama.generate", "-"], b"ab\xe9", ["standard input: byte 2: expected UTF-8 text, found 0xe9"]),
        (["jllama.generate"], b"\xff", ["standard input: byte 0: expected UTF-8 text, found 0xff"]),
        (["jllama.generate", "--prompt-file", "-"], b"a\nb\xff", ["standard input: byte 3"]),
        (["jllama.cli.chat", b"--system=\xfe"], b"", ["expected UTF-8 text, found byte 0xfe"]),
        (["jllama.cli.chat", "-q"], b"\xff\n/quit\n", ["error: standard input: byte 0: expected UTF-8 text"]),
    ],
)
def test_text_that_is_not_utf8_is_one_line(args: list[str], stdin: bytes, words: list[str], module) -> None:
    done = module(*args, "--no-compilation-cache", stdin=stdin)
    assert done.returncode == (0 if stdin.endswith(b"/quit\n") else 2)  # a conversation goes on
    line = done.stderr.decode()
    assert line.count("\n") == 1
    assert all(word in line for word in words), line


@pytest.mark.parametrize("flag", ["--file", "--prompt-file"])
def test_a_file_that_is_not_utf8_is_one_line(flag: str, refused, tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes(b"caf\xe9")
    assert f"{file}: byte 3: expected UTF-8 text, found 0xe9" in refused(flag, str(file))
    assert "cannot be read" in refused(flag, str(tmp_path))


def test_a_terminal_that_cannot_show_a_letter_is_no_error() -> None:
    command = [sys.executable, "-m", "jllama.generate", "-p", "\u00e9\u4e2d", "--echo", "-n", "2", "-q"]
    done = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, check=True)
    assert done.stdout.startswith(b"??")


def complete(*words: str) -> list[str]:
    """What bash completes for the last of some words."""
    script = f"""source <({sys.executable} -m jllama --completion bash)
        COMP_WORDS=({" ".join(map(repr, words))}); COMP_CWORD={len(words) - 1}; _jllama; echo "${{COMPREPLY[@]}}" """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_bash_completes_commands_flags_and_values() -> None:
    assert complete("jllama", "ge") == ["generate"]
    assert complete("jllama", "chat", "--when") == ["--when-full"]
    assert complete("jllama", "chat", "--when-full", "d") == ["drop"]
    assert complete("jllama", "convert", "--qu") == ["--quant", "--quiet"]
    assert complete("jllama", "--completion", "") == ["bash", "zsh", "fish"]
    assert complete("jllama", "generate", "no_flag") == []  # a file, which bash knows by itself


def test_other_shells_get_a_script_of_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for shell in ("zsh", "fish"):
        assert cli.main(["--completion", shell]) == 0
        out = capsys.readouterr().out
        assert "max-new-tokens" in out
        assert "quantize" in out
    assert cli.main(["--completion"]) == cli.main(["--completion", "tcsh"]) == 2
    assert capsys.readouterr().err.splitlines()[1].endswith("expected one of bash, zsh, fish, found 'tcsh'")

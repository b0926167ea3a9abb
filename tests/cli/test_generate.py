"""``jllama generate`` with many prompts: the same bytes for every batch, in every form."""

import io
import json
import sys
from pathlib import Path

import pytest

from jllama.cli import progress

PROMPTS = ["Once upon a time,", "Tom", "One day, a girl named Lily went to the"]


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS) + "\n")
    return str(file)


@pytest.mark.parametrize("form", [[], ["--echo"], ["--ids"], ["--ids", "--echo"], ["--jsonl"]])
def test_the_output_is_the_same_for_every_batch_size(form: list[str], prompts: str, run) -> None:
    outputs = [run("--prompt-file", prompts, "-n", "6", "-q", "--batch-size", b, *form)[0] for b in ("1", "2", "8")]
    assert outputs[0] == outputs[1] == outputs[2]
    if not form:
        texts = [run("-p", text, "-n", "6", "-q")[0] for text in PROMPTS]
        assert outputs[0] == "\n".join(texts)  # an empty line between two, and none after the last


def test_samples_follow_one_another_and_do_not_depend_on_the_batch(prompts: str, run) -> None:
    flags = ("-n", "6", "-q", "--temp", "1", "--jsonl", "--seed", "5")
    lines = [json.loads(x) for x in run("--prompt-file", prompts, "--samples", "2", *flags)[0].splitlines()]
    assert [(x["index"], x["sample"]) for x in lines] == [(i, j) for i in range(3) for j in range(2)]
    assert [x["prompt"] for x in lines[::2]] == PROMPTS
    assert lines[0]["ids"] != lines[1]["ids"]
    pairs = run("--prompt-file", prompts, "--samples", "2", *flags, "--batch-size", "2")[0].splitlines()
    assert [json.loads(x)["ids"] for x in pairs] == [x["ids"] for x in lines]
    alone = json.loads(run("-p", PROMPTS[1], "-n", "6", "-q", "--temp", "1", "--jsonl", "--seed", "7")[0])
    assert alone["ids"] == lines[2]["ids"]  # the third completion has the third seed


def test_json_is_one_object_that_says_constant_things_once(prompts: str, run) -> None:
    out = run("--prompt-file", prompts, "-n", "4", "-q", "--json", "--batch-size", "2")[0]
    whole = json.loads(out)
    assert [c["prompt"] for c in whole["completions"]] == PROMPTS
    assert whole["timings"]["new_tokens"] == 12
    assert out.count("Hopper") == json.dumps(whole["backend"]).count("Hopper") > 0
    lines = run("--prompt-file", prompts, "-n", "4", "-q", "--jsonl")[0].splitlines()
    assert [json.loads(line) for line in lines] == whole["completions"]


def test_prompts_come_as_json_lines_and_from_a_pipe(prompts: str, run, module, tmp_path: Path) -> None:
    wanted = run("--prompt-file", prompts, "-n", "4", "-q")[0]
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        f"{json.dumps(PROMPTS[0])}\n\n" + "\n".join(json.dumps({"prompt": p, "id": 1}) for p in PROMPTS[1:])
    )
    assert run("--prompt-file", str(file), "-n", "4", "-q")[0] == wanted
    flags = ("jllama.generate", "-n", "4", "-q", "--no-compilation-cache", "--prompt-file", "-")
    assert module(*flags, stdin=Path(prompts).read_bytes()).stdout.decode() == wanted
    assert module(*flags, "--prompt-format", "jsonl", stdin=file.read_bytes()).stdout.decode() == wanted


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected JSON lines, found nothing"),
        ('"a"\n{"text": "b"}', 'line 2: expected a JSON string, or an object with a text "prompt", found dict'),
        ("a", "line 1: expected a JSON string, or an object"),
        ("[" * 100_000, "found no JSON"),
        ('{"prompt": 3}', "found dict"),
        ('"\\ud800"', "line 1: prompt: expected text, found a lone surrogate"),
    ],
)
def test_json_lines_that_are_wrong_are_one_line(text: str, words: str, refused, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(text)
    line = refused("--prompt-file", str(file))
    assert str(file) in line
    assert words in line


def test_a_file_is_one_prompt_and_the_other_way_one_a_line(run, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("Tom had a dog.\nThe dog\n")
    for flag in ("-f", "--file"):
        got = json.loads(run(flag, str(file), "-n", "3", "--jsonl", "-q")[0])
        assert got["prompt"] == "Tom had a dog.\nThe dog"  # without the newline that an editor adds
    assert len(run("--prompt-file", str(file), "-n", "3", "--jsonl", "-q")[0].splitlines()) == 2


def test_one_prompt_that_is_too_long_is_refused_before_anything_is_made(refused, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(["Tom"] * 9 + ["word " * 600]))
    assert "prompt 9: expected 1 to 511 tokens" in refused("--prompt-file", str(file), "-q", "--batch-size", "2")


def test_progress_is_told_where_output_and_errors_are_redirected(
    prompts: str, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    out, err = run("--prompt-file", prompts, "-n", "4", "--batch-size", "1", "--jsonl")
    assert len(out.splitlines()) == 3
    assert "1 of 3 completions in " in err
    assert "2 of 3 completions in " in err
    assert "of 40 tokens in " in run("-p", PROMPTS[0], "-n", "40")[1]
    assert run("--prompt-file", prompts, "-n", "4", "-q")[1] == ""


def test_a_bar_shows_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", screen := Screen())
    bar = progress.Progress(4, "completion", quiet=False)
    bar.add(2)
    bar.close()
    assert "4 [" in screen.getvalue()


def test_penalties_and_biases_are_the_same_for_one_prompt_and_for_many(prompts: str, run, refused) -> None:
    flags = ("-n", "8", "-q", "--jsonl", "--presence-penalty", "0.5")
    free = json.loads(run("-p", PROMPTS[0], *flags)[0])["ids"]
    flags += ("--logit-bias", f"{free[2]}=-inf", "--logit-bias", "300=0.5")
    lines = [json.loads(line) for line in run("--prompt-file", prompts, *flags)[0].splitlines()]
    one = json.loads(run("-p", PROMPTS[0], *flags)[0])
    assert one["ids"] == lines[0]["ids"] != free
    assert all(free[2] not in line["ids"] for line in lines)
    for bad, line in (
        ("--logit-bias=x=1", "--logit-bias: expected ID=BIAS, a token's id and a number, found 'x=1'"),
        ("--logit-bias=5=nan", "--logit-bias: expected ID=BIAS, a token's id and a number, found '5=nan'"),
        ("--frequency-penalty=inf", "--frequency-penalty: expected a number (0: off), found inf"),
        ("--slots=0", "--slots: expected at least 1, found 0"),
    ):
        assert line in refused("-p", "a", bad)


def test_stop_texts_end_each_of_many_completions(prompts: str, run) -> None:
    flags = ("-n", "30", "-q", "--jsonl", "--logprobs")
    free = [json.loads(line) for line in run("--prompt-file", prompts, *flags)[0].splitlines()]
    stop = free[0]["text"].split()[4]
    assert stop in free[0]["text"]
    for whole, line in zip(free, run("--prompt-file", prompts, *flags, "--stop", stop)[0].splitlines(), strict=True):
        found = json.loads(line)
        assert found["text"] == whole["text"].split(stop)[0]
        assert found["finish_reason"] == ("stop" if stop in whole["text"] else whole["finish_reason"])
        assert found["ids"] == whole["ids"][: len(found["ids"])]
        assert len(found["logprobs"]) == len(found["ids"])


def test_a_completion_is_of_a_schema_or_an_expression(tmp_path: Path, run, refused) -> None:
    pytest.importorskip("llguidance")
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 2}')
    text = run("-p", "Tom", "-q", "--temp", "1", "-n", "99", "--json-schema", str(schema))[0]
    assert set(json.loads(text)) <= {1, 2}
    assert run("-p", "Tom", "-q", "-n", "20", "--regex", "(yes|no)!")[0] in ("yes!\n", "no!\n")
    assert "regex: expected a grammar" in refused("-p", "Tom", "--regex", "(")
    assert "cannot be read" in refused("-p", "Tom", "--json-schema", str(tmp_path / "none"))
    assert "--regex: expected without --json-schema" in refused("--regex", "a", "--json-schema", str(schema))

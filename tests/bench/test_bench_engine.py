"""The engine's benchmark, and what it reads from a trace. No test asserts a time."""

from pathlib import Path

import pytest
import tiny

from bench import engine, record
from bench.trace import Span, busy, traced


def test_how_busy_a_device_is() -> None:
    found = busy([Span(6000, 9000, "b"), Span(0, 4000, "a"), Span(1000, 5000, "b"), Span(9500, 10_000, "a")])
    assert found.span_ms == 0.01
    assert found.share == pytest.approx(0.85)
    assert found.gaps_us == [1.0, 0.5]
    assert found.kernels_us == {"b": 7.0, "a": 4.5}
    assert busy([Span(3, 5), Span(3, 4)]).share == 1


def test_without_a_gpu_there_is_no_trace_to_read() -> None:
    assert traced(lambda: None) is None


def test_records_of_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = engine.parser().parse_args(["--requests", "2", "--turns", "1", "--runs", "1", "--prompt-len", "3"])
    monkeypatch.setattr(engine, "complete", lambda e, prompts, new: 0.5 + len(prompts) if new == 16 else None)
    found = busy([Span(0, 9), Span(10, 20)])
    monkeypatch.setattr("bench.trace.traced", lambda work: work() and found)
    params = tiny.model(config=tiny.CONFIG.replace(n_layers=1))
    fields = engine.measured(params, 2, lambda n: [tiny.prompt(3, seed) for seed in range(n)], args)
    started = record.start_run("a CPU", {}, {})
    records = [engine.recorded(started, f | dict(impl="auto", model="tiny", dtype="f32", seq=3)) for f in fields]
    record.append(tmp_path / "engine.jsonl", records)
    shown = [(r["case"], r["metric"]) for r in record.read(tmp_path)]
    steps = [(case, metric) for case in ("engine-step", "engine-step-waiting") for metric in ("ms", "busy_share")]
    assert shown == [("engine-run", "tokens_per_s"), *steps]
    assert records[0]["samples"] == [4.5]
    assert [r["steps_a_launch"] for r in records[1:]] == [16, 16, 4, 4]
    assert all(r["samples"][0] > 0 for r in records[1::2])
    assert [r["value"] for r in records[2::2]] == [0.95, 0.95]
    assert "5.00 % device idle" in engine.line(records[2])


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--slots", "0"], "--slots: expected whole numbers above 0"),
        (["--turns", "0"], "--turns: expected at least 1, found 0"),
        (["--turns", "99"], "--new-tokens, --turns: expected requests of at most 512 tokens (the context), found 3260"),
    ],
)
def test_bad_arguments_are_one_line(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        engine.main(argv)
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1

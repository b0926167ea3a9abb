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
    args.prefill = [(1, 40), (2, 5)]
    monkeypatch.setattr(engine, "complete", lambda e, prompts, new: 0.5 + len(prompts) if new == 16 else None)
    found = busy([Span(0, 9000, "b"), Span(10_000, 20_000, "a")])
    monkeypatch.setattr("bench.trace.traced", lambda work: work() and found)
    params = tiny.model(config=tiny.CONFIG.replace(n_layers=1))
    fields = engine.measured(params, 2, lambda n: [tiny.prompt(3, seed) for seed in range(n)], args)
    started = record.start_run("a CPU", {}, {})
    records = [engine.recorded(started, dict(impl="auto", model="tiny", dtype="f32", seq=3) | f) for f in fields]
    record.append(tmp_path / "engine.jsonl", records)
    shown = [(r["case"], r["metric"]) for r in record.read(tmp_path)]
    steps = [
        (of, metric)
        for case in ("engine-step", "engine-step-waiting")
        for of, metric in ((case, "ms"), (case, "busy_share"), (f"{case}-kernels", "ms"))
    ]
    prefills = [("engine-prefill", "tokens_per_s"), ("engine-prefill-kernels", "ms")] * 2
    assert shown == [("engine-run", "tokens_per_s"), *steps, *prefills]
    assert records[0]["samples"] == [4.5]
    assert [r["steps_a_launch"] for r in records[1:7]] == [16] * 3 + [4] * 3
    assert all(r["samples"][0] > 0 for r in records)
    assert [r["value"] for r in records[2:7:3]] == [0.95, 0.95]
    assert "5.00 % device idle" in engine.line(records[2])
    assert records[3]["kernels_ms"] == {"a": pytest.approx(10e-3 / 16), "b": pytest.approx(9e-3 / 16)}
    assert records[3]["idle_ms"] == pytest.approx(1e-3 / 16)
    assert [(r["batch"], r["seq"], r["context"]) for r in records[7::2]] == [(1, 40, 41), (2, 5, 6)]
    assert engine.line(records[7]).endswith("tokens/s, 1 x 40")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--slots", "0"], "--slots: expected whole numbers above 0"),
        (["--turns", "0"], "--turns: expected at least 1, found 0"),
        (
            ["--prefill", "8x"],
            "--prefill: expected lengths as 512, or rows and lengths as 8x512, by commas, found '8x'",
        ),
        (["--turns", "99"], "--turns, --prefill: expected requests of at most 512 tokens (the context), found 3260"),
    ],
)
def test_bad_arguments_are_one_line(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        engine.main(argv)
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1

"""Which records tables and charts show: runs that held us and the peers, side by side."""

from pathlib import Path

from bench_records import a_record

from bench import choice, plots
from bench.record import Record
from bench.tables import TABLES


def a_run(run: str, **rates: float) -> list[Record]:
    """Records of a run, whose number is its day. A name is an implementation, perhaps with a format of weights."""
    when = f"2026-01-{int(run[1:]):02}T10:00:00"
    whose = {name: name.partition("_") for name in rates}
    return [
        a_record(impl=impl, dtype=dtype or "bf16", value=rates[name], samples=[rates[name]], run=run, when=when)
        for name, (impl, _, dtype) in whose.items()
    ]


def names(records: list[Record]) -> list[str]:
    return [f"{r['run']} {r['impl']}" + (f"_{r['dtype']}" if r["dtype"] != "bf16" else "") for r in records]


def test_a_newer_run_of_ours_alone_does_not_push_the_peers_out() -> None:
    old = a_run("r1", pallas=9.0, torch=8.0, vllm=7.0)
    assert names(choice.side_by_side([*a_run("r2", pallas=11.0), *old])) == ["r1 pallas", "r1 torch", "r1 vllm"]
    newer = a_run("r2", pallas=11.0, engine=12.0)
    assert list(choice.left_out(old + newer)) == [
        "not shown: run r2 at aaaa111, newer but without peers: 7b decode bf16 1 x 8, decode bf16 1 x 8"
    ]
    assert not list(choice.left_out(old + a_run("r2", pallas=11.0, vllm=1.0)))


def test_a_peer_that_only_an_older_run_has_comes_with_ours_of_that_run() -> None:
    old = a_run("r1", pallas=9.0, pallas_int8=18.0, pallas_int4=30.0, torch=8.0, vllm=7.0)
    new = a_run("r2", engine=10.0, engine_int8=20.0, vllm=7.5)
    shown = names(choice.side_by_side(old + new, kind=lambda r: (choice.is_ours(r["impl"]) or r["impl"], r["dtype"])))
    assert shown == ["r2 engine", "r2 engine_int8", "r2 vllm", "r1 pallas", "r1 pallas_int4", "r1 torch"]


def test_formats_that_no_run_with_peers_had_come_from_their_newest_run() -> None:
    alone = [*a_run("r2", pallas_int8=18.0), *a_run("r3", pallas_int8=19.0), *a_run("r4", hf=1.0)]
    assert names(choice.side_by_side([*a_run("r1", pallas=9.0, vllm=7.0), *alone])) == [
        "r1 pallas",
        "r1 vllm",
        "r3 pallas_int8",
    ]


def test_the_last_run_of_each_workload_stands_whatever_ran_later() -> None:
    """A later run of one workload hides no other workload. A record without a figure, or a rehearsal, replaces none."""
    old = [a_record(value=1.0, batch=b, impl=i) for b in (1, 8, 64) for i in ("xla", "pallas")]
    new = [a_record(value=v, batch=b, run="r2", commit="new", when="2026-02") for b, v in ((1, 2.0), (8, None))]
    rehearsal = [a_record(value=9.0, batch=64, run="r3", when="2026-03", note="a rehearsal")]
    (group,) = choice.newest(old + new + rehearsal)
    assert [(r["batch"], r["value"], r["impl"]) for r in group] == [
        (1, 2.0, "xla"),
        *((b, 1.0, i) for b in (8, 64) for i in ("xla", "pallas")),
    ]
    assert choice.newest(rehearsal) == [rehearsal]


def test_what_a_reader_sees_first_is_side_by_side() -> None:
    """Our rows say which way a user runs so many. The best of one run and as many bits is bold. Every row says how old
    it is."""
    session = [
        ("engine", 1, 270.0),
        ("engine", 8, 1900.0),
        ("pallas", 1, 290.0),
        ("vllm", 1, 210.0),
        ("vllm", 8, 1500.0),
    ]
    rows = [_rate("r2", impl, batch, value) for impl, batch, value in session]
    rows += [_rate("r2", "engine", 1, 500.0, dtype="int8"), _rate("r2", "vllm-fp8", 1, 510.0, dtype="fp8")]
    rows += [_rate("r1", "torch", 1, 170.0), _rate("r1", "pallas", 1, 280.0), _rate("r1", "pallas", 8, 1800.0)]
    rows += [_rate("r3", "pallas", 1, 999.0)]
    shown = TABLES["glance-gpu"](rows).splitlines()
    assert shown[0] == "| tokens/s (% of floor) | 1 row | 8 rows | measured |"
    assert shown[2:8] == [
        "| **jllama**, bf16: `generate` 1 row; `Engine` 8 rows | **290** (29) | **1,900** (190) "
        "| 2026-01-02 10:00 `aaaa111` |",
        "| vLLM, bf16 | 210 (21) | 1,500 (150) | 2026-01-02 10:00 `aaaa111` |",
        "| **jllama**, bf16: `generate` | **280** (28) |  | 2026-01-01 10:00 `aaaa111` |",
        "| PyTorch, bf16 | 170 (17) |  | 2026-01-01 10:00 `aaaa111` |",
        "| vLLM, fp8 | **510** (51) |  | 2026-01-02 10:00 `aaaa111` |",
        "| **jllama**, int8: `Engine` | 500 (50) |  | 2026-01-02 10:00 `aaaa111` |",
    ]
    assert shown[-1].startswith("<sub>NVIDIA H200; ")
    assert shown[-1].endswith("`r1`, `r2`.</sub>")
    assert TABLES["glance-gpu"]([]) == "*nothing recorded yet*"


def test_the_chart_by_rows_is_of_one_run_that_held_both(tmp_path: Path) -> None:
    rows = [_rate("r1", i, b, 100.0 * b) for i in ("engine", "vllm") for b in (1, 8, 64)]
    short = [_rate("r2", i, b, 100.0 * b) for i in ("engine", "vllm") for b in (1, 8)]
    alone = [_rate("r3", "engine", b, 100.0 * b) for b in (1, 8, 64)]
    assert [p.name for p in plots.rows_plots(rows + short + alone, tmp_path)] == ["rows-7b-bf16-h200.png"]
    assert not list(plots.rows_plots(short + alone, tmp_path))


def _rate(run: str, impl: str, batch: int, value: float, **changes: object) -> Record:
    (record,) = a_run(run, **{impl: value})
    return record | dict(batch=batch, seq=128, context=384, floor=1000.0) | changes

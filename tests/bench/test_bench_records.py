"""Records of the benchmarks, and the tables and regressions that are computed from them."""

import json
import re
from pathlib import Path

import pytest
from bench_records import a_record

from bench import plots, record, regressions, report, rows, tables
from bench.tables import TABLES

# Records


def test_a_record_must_have_every_key_of_its_type() -> None:
    record.check(a_record())
    for key in record.KEYS:
        broken = a_record()
        del broken[key]
        with pytest.raises(ValueError, match=key):
            record.check(broken)
    for change in ({"suite": "speed"}, {"metric": "mph"}, {"batch": True}, {"value": "fast"}, {"samples": None}):
        with pytest.raises(ValueError, match=next(iter(change))):
            record.check(a_record(**change))


def test_a_record_without_a_value_says_why() -> None:
    with pytest.raises(ValueError, match="why"):
        record.check(a_record(value=None))
    record.check(a_record(value=None, samples=[], why="out of memory"))


def test_records_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    record.append(path, [a_record(run="one")])
    record.append(path, [a_record(run="two")])
    assert [r["run"] for r in record.read(tmp_path)] == ["one", "two"]
    path.write_text(path.read_text() + "{}\n")
    with pytest.raises(ValueError, match=r"r\.jsonl:3"):
        list(record.read(tmp_path))


def test_the_committed_records_are_valid() -> None:
    for found in record.read(record.RESULTS):
        assert found["value"] is None or found["value"] > 0


def test_a_run_knows_its_commit_and_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    run = record.start_run("some device", {"jax": "1"}, {})
    assert run.commit
    assert run.versions["python"]
    monkeypatch.setenv("JLLAMA_COMMIT", "abc123+")
    run = record.start_run("some device", {}, {})
    assert (run.commit, run.dirty) == ("abc123", True)


# Reports


def test_markers_are_filled_and_filled_again() -> None:
    text = "before\n<!-- bench:decode-gpu -->\nold\n<!-- /bench -->\nafter\n"
    rows = [
        a_record(),
        a_record(impl="hf-eager", value=50.0, samples=[50.0]),
        a_record(impl="pallas", run="r0", when="2025"),
    ]
    filled = report.fill(text, rows)
    assert "old" not in filled
    assert filled.startswith("before\n<!-- bench:decode-gpu -->\n|")
    assert filled.endswith("<!-- /bench -->\nafter\n")
    assert "| **jllama, XLA** | 100 |" in filled
    assert "`aaaa111`" in filled
    assert "Pallas" not in filled  # from an older run, so not side by side with the rest
    assert report.fill(filled, rows) == filled
    with pytest.raises(ValueError, match="bench:speed: expected one of"):
        report.fill(text.replace("decode-gpu", "speed"), rows)


def test_at_a_glance() -> None:
    """One row per implementation and dtype, one column per workload, the best of a column in bold, only the newest
    run."""
    long = dict(seq=3744, context=4000)
    found = [
        a_record(value=90.0, samples=[90.0]),
        a_record(impl="hf-eager", value=50.0, samples=[50.0]),
        a_record(batch=8, value=600.0, samples=[600.0]),
        a_record(case="prefill", seq=512, context=513, value=3e4, samples=[3e4], floor=None),
        a_record(dtype="int8", value=150.0, samples=[150.0], run="r2"),
        a_record(**long, value=80.0, samples=[80.0]),
        a_record(impl="pallas", value=999.0, samples=[999.0], run="r0", when="2025"),
        a_record(impl="vllm", value=None, samples=[], why="not installed"),
    ]
    rows = [r | {"device": "A CPU, 2 cores"} for r in found]
    shown = TABLES["glance-cpu"](rows).splitlines()
    assert shown[0] == "| tokens/s (% of floor) | batch 1 | batch 8 | batch 1, 4,000 tokens | prefill 512 |"
    assert shown[2:5] == [
        "| **jllama, XLA**, int8 | **150** (50) |  |  |  |",
        "| **jllama, XLA**, bf16 | 90.0 (30) | **600** (200) | **80.0** (27) | **30,000** |",
        "| HF transformers, eager, bf16 | 50.0 (17) |  |  |  |",
    ]
    assert "`r1`, `r2`" in shown[-1]
    assert "`r0`" not in shown[-1]
    assert TABLES["glance-cpu"](found).startswith("*nothing")


def test_charts_are_found_from_where_they_are_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in (report, tables):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    (tmp_path / "results" / "plots").mkdir(parents=True)
    (tmp_path / "results" / "plots" / "decode-7b-bf16-h200.png").touch()
    text = "<!-- bench:chart-decode-gpu -->\n<!-- /bench -->\n"
    for page, way in (("README.md", "results/plots"), ("docs/benchmarks.md", "../results/plots")):
        assert f"]({way}/decode-7b-bf16-h200.png)" in report.fill(text, [], str(tmp_path / page))


def test_pages_show_every_chart_that_is_kept_and_no_other() -> None:
    pages = "".join((record.ROOT / page).read_text() for page in report.FILES)
    shown = set(re.findall(r"bench/results/plots/([^)]*)\)", pages))
    assert shown == {path.name for path in (record.RESULTS / "plots").iterdir()}


def test_equal_charts_are_equal_files(tmp_path: Path) -> None:
    rows = [a_record(work={"bytes": 1e10, "flops": 1e10, "tokens": 1})]
    for name in ("a", "b"):
        list(plots.draw(rows, tmp_path / name))
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_every_chart_of_the_newest_runs(tmp_path: Path) -> None:
    more = dict(work={"bytes": 1e10, "flops": 1e10, "tokens": 1})
    op = more | dict(suite="ops", case="ffn", metric="ms", value=0.5, samples=[0.5], speedup={"xla": 1.0})
    rows = [a_record(**more), a_record(**more, batch=8), a_record(**op), a_record(**op, seq=16, context=32)]
    names = {path.name for path in plots.draw(rows, tmp_path)}
    assert names == {path.name for path in tmp_path.iterdir()}
    assert names == {
        "decode-7b-bf16-h200.png",
        "roofline-7b-bf16-h200.png",
        "speedup-ffn-7b-bf16-h200.png",
        "roofline-ops-bf16-h200.png",
    }


@pytest.mark.parametrize("name", sorted(TABLES))
def test_every_table_can_be_made_of_nothing_and_of_what_is_recorded(name: str) -> None:
    assert TABLES[name]([]) or name.startswith("chart")
    assert TABLES[name](list(record.read(record.RESULTS))) or name.startswith("chart")


def test_report_writes_files_and_checks_them(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    record.append(tmp_path / "r.jsonl", [a_record()])
    page = tmp_path / "page.md"
    page.write_text("<!-- bench:decode-gpu -->\n<!-- /bench -->\n")
    argv = [str(page), "--results", str(tmp_path)]
    for extra, code in ((["--check"], 1), ([], 0), (["--check"], 0)):
        with pytest.raises(SystemExit) as end:
            report.main([*argv, *extra])
        assert end.value.code == code
    assert "jllama, XLA" in page.read_text()


@pytest.mark.parametrize(
    ("value", "samples", "verdict"),
    [
        (90.0, [90.0, 89.5, 90.5, 90.0], "REGRESSION"),
        (98.0, [98.0, 97.8, 98.2, 98.0], None),  # within 3 %
        (90.0, [60.0, 75.0, 105.0, 120.0], None),  # within the noise
        (120.0, [120.0, 119.0, 121.0, 120.0], "better"),
    ],
)
def test_regressions_beyond_the_noise(value: float, samples: list[float], verdict: str | None) -> None:
    new = a_record(value=value, samples=samples, commit="bbbb222", when="2026-02-01T00:00:00")
    peer = a_record(impl="hf-eager", value=1.0, samples=[1.0, 1.0, 1.0], commit="bbbb222", when="2026-02-01T00:00:00")
    lines, worse = regressions.against([a_record(), new, a_record(impl="hf-eager"), peer], "aaaa")
    assert worse == (verdict == "REGRESSION")
    assert [line.split(":")[0] for line in lines[:-1]] == ([verdict] if verdict else [])
    assert lines[-1].startswith("1 figures compared")


def test_regressions_in_times_and_of_unknown_commits() -> None:
    old = a_record(metric="ms", value=1.0, samples=[1.0, 1.0, 1.0])
    new = a_record(metric="ms", value=2.0, samples=[2.0, 2.0, 2.0], commit="bbbb222", when="2026-02-01T00:00:00")
    assert regressions.against([old, new], "aaaa111")[1]
    assert not regressions.against([new, old], "bbbb222")[1]  # in the other direction it is an improvement
    assert regressions.against([old], "cccc")[0] == ["no records of commit cccc"]


def test_records_are_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        record.append(tmp_path / "r.jsonl", [a_record(floor=float("nan"))])
    record.append(tmp_path / "ok.jsonl", [a_record()])
    assert json.loads((tmp_path / "ok.jsonl").read_text())["impl"] == "xla"


# Which records a table shows


def test_a_line_of_the_terminals_table_is_of_one_dtype() -> None:
    stats = {"std": 0.0, "mean": 1.0}
    records = [
        a_record(case=case, metric=metric, value=value * size, dtype=dtype, stats=stats)
        for dtype, size in (("int8", 1.0), ("int4-g128", 2.0))
        for case, metric, value in (
            ("decode", "tokens_per_s", 3.0),
            ("ttft-warm", "s", 0.5),
            ("memory", "bytes_peak", 7e9),
        )
    ]
    _, first, second = rows.table(records).splitlines()
    assert first.split()[-2:] == ["0.5000", "7,000"]
    assert second.split()[-2:] == ["1.0000", "14,000"]


def test_starting_is_shown_of_every_workload() -> None:
    """One row per workload and implementation. Figures that only the first workload has are empty in the others."""
    some = [
        a_record(case=case, metric=metric, batch=batch, value=value, samples=[value])
        for batch, case, metric, value in (
            (1, "load", "s", 3.0),
            (1, "compile", "s", 2.0),
            (8, "compile", "s", 4.0),
            (8, "memory", "bytes_peak", 7e9),
        )
    ]
    first, second = ([c.strip() for c in row.split("|")[4:-2]] for row in TABLES["startup"](some).splitlines()[2:])
    assert first == ["1", str(some[0]["seq"]), "**jllama, XLA**", "3.000", "2.000", "", "", ""]
    assert second == ["8", str(some[0]["seq"]), "**jllama, XLA**", "", "4.000", "", "", "7,000"]


def test_a_ratio_beside_a_published_one_is_of_one_device_and_says_its_lengths() -> None:
    def ffn(seq: int, ratio: float, device: str, when: str) -> record.Record:
        base = a_record(suite="ops", case="ffn", impl="pallas", metric="ms", value=1.0, device=device, when=when)
        return base | dict(seq=seq, context=seq, speedup={"torch": ratio})

    old = [ffn(n, 9.0, "an old GPU", "2026-01") for n in (512, 1024)]
    new = [ffn(n, r, "a new GPU", "2026-02") for n, r in ((512, 1.5), (1024, 1.2), (8192, 3.0))]
    row = TABLES["published"](old + new).splitlines()[-1]
    assert "1.20 to 1.50 times, at 512 to 1024 | a new GPU" in row
    assert "1.50 times, at 512 |" in TABLES["published"](new[:1]).splitlines()[-1]

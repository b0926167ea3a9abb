"""The table of mixed traffic, and the chart of the time by kernel."""

from pathlib import Path
from typing import Any

import pytest
from bench_records import a_record

from bench import kernel_plots
from bench.record import Record
from bench.tables import TABLES
from bench.trace import OTHER, Span, busy, per


def under_traffic(run: str, impl: str, case: str, rate: float, load: float | None = None) -> list[Record]:
    traffic = {"requests": 1000, "rate": load}
    shared: dict[str, Any] = dict(suite="traffic", run=run, impl=impl, batch=256, floor=None, traffic=traffic)
    shared["when"] = f"2026-01-0{run[1]}T00:00:00"
    made = [a_record(case=case, value=rate, **shared)]
    for i, figure in enumerate(("first", "between")):
        made.append(a_record(case=f"{case}, {figure}", metric="s", value=0.01 * (i + 1), p99=0.05 / (i + 1), **shared))
    nothing = dict(metric="s", value=None, samples=[], why="all tokens came together")
    return [*made, a_record(case=f"{case}, longest", **shared | nothing)]


def test_the_table_of_mixed_traffic() -> None:
    records = [
        *under_traffic("r1", "engine", "mixed", 9000.0),
        *under_traffic("r2", "engine", "mixed", 9500.0),
        *under_traffic("r2", "vllm", "mixed", 8000.0),
        *under_traffic("r3", "engine", "mixed", 9900.0),  # newer, but alone: beside the others, not in their place
        *under_traffic("r2", "engine", "mixed-poisson", 7000.0, load=21.04),
        a_record(suite="traffic", impl="vllm", case="shared", value=None, why="not installed", traffic={"rate": None}),
        a_record(),
    ]
    start = "| NVIDIA H200 | 7b | bf16 |"
    times = "10.0 / 50.0 | 20.0 / 25.0 |  | 2026-01-02 `aaaa111` |"
    later = times.replace("01-02", "01-03")
    assert TABLES["traffic"](records).splitlines()[2:] == [
        f"{start} mixed | at once | 1000 | 256 | **jllama, engine** | 9,900 | {later}",
        f"{start} mixed | at once | 1000 | 256 | **jllama, engine** | 9,500 | {times}",
        f"{start} mixed | at once | 1000 | 256 | vLLM | 8,000 | {times}",
        f"{start} mixed-poisson | 21.0 | 1000 | 256 | **jllama, engine** | 7,000 | {times}",
    ]
    assert TABLES["traffic"]([a_record()]) == "*nothing recorded yet*"


def kernels(case: str, batch: int, seq: int, when: int) -> Record:
    spans = [Span(i * 1000, i * 1000 + 900, f"gemm_{i % 10}_mosaic_gpu_kernel") for i in range(40)]
    fields = dict(suite="load", case=case, batch=batch, seq=seq, impl="auto", floor=None, run=f"r{when}")
    made = a_record(**fields, when=f"2026-01-0{when}T00:00:00", **per(busy(spans), 4))
    return made | {"value": made["samples"][0]}


def test_the_time_by_kernel_is_of_a_step_and_complete() -> None:
    record = kernels("engine-step-kernels", 64, 128, 1)
    assert record["value"] == pytest.approx(40 * 0.9e-3 / 4)
    assert record["kernels_ms"][OTHER] == pytest.approx(2 * 4 * 0.9e-3 / 4)
    assert record["idle_ms"] == pytest.approx(39 * 0.1e-3 / 4)


def test_the_chart_by_kernel_has_the_newest_run_of_each_shape(tmp_path: Path) -> None:
    records = [kernels("engine-step-kernels", rows, 128, when) for rows in (1, 64) for when in (1, 2)]
    records += [kernels("engine-prefill-kernels", 8, 512, 1), a_record()]
    nothing = dict(suite="load", case="engine-step-kernels", metric="ms", value=None, samples=[], why="no GPU")
    (chart,) = kernel_plots.draw_kernels([*records, a_record(**nothing)], tmp_path)
    assert chart.name == "kernels-7b-bf16-h200.png"
    shown = kernel_plots.by_kernel([records[1], records[3], records[4]])
    assert [[t.get_text() for t in ax.get_yticklabels()] for ax in shown.axes] == [
        ["64 rows", "1 row"],
        ["8 x 512 tokens"],
    ]
    names = [text.get_text() for text in shown.axes[-1].get_legend().get_texts()]
    assert names[0] == "gemm_0"
    assert names[-2:] == [OTHER, kernel_plots.IDLE]

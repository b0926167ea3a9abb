"""Comparisons on several devices: which meshes, their floors, who is left out, the table and the chart. `tests/mesh`
shows that they run."""

from pathlib import Path
from typing import Any

import pytest
from bench_records import CEILINGS, a_record

from bench import compare, roofline, scaling
from bench.entries import Entry
from bench.meshes import Shape
from bench.record import Record
from bench.rows import table
from bench.tables import TABLES
from jllama.config import preset


def test_the_meshes_of_a_command() -> None:
    assert compare.meshes(None, None) == [None]
    assert compare.meshes("1,2,4", None) == [Shape(1), Shape(2), Shape(4)]
    assert compare.meshes("4,1", "2,1") == [Shape(1, 1), Shape(1, 2), Shape(4, 1), Shape(4, 2)]
    assert [shape.name for shape in (Shape(), Shape(2), Shape(1, 3), Shape(2, 2))] == [
        "one device", "--tp 2", "--dp 3", "--tp 2 --dp 2"
    ]  # fmt: skip


def test_the_floor_of_a_mesh() -> None:
    dims, ceilings = roofline.dims(preset("7b")), roofline.of_dict(CEILINGS)

    def floor(shape: Shape, rows: int) -> float:
        return shape.floor(ceilings, "decode", dims, "bf16", rows, 256)

    assert floor(Shape(4), 1) == pytest.approx(4 * floor(Shape(), 1))  # a part of the weights each
    assert floor(Shape(1, 4), 32) == pytest.approx(4 * floor(Shape(), 8))  # all weights for a part of the rows
    assert floor(Shape(2, 2), 2) == pytest.approx(4 * floor(Shape(), 1))


def test_peers_that_cannot_divide_a_model_are_left_out_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    ours, one, divides = (Entry(*names, "", "") for names in (("xla", "ours"), ("torch-graph",) * 2, ("vllm",) * 2))
    divides.divides = True
    whys = {shape: [e.fresh(shape).why for e in (ours, one, divides)] for shape in (Shape(), Shape(2), Shape(1, 2))}
    rows = "it has no data parallel here"
    assert whys == {
        Shape(): [None] * 3,
        Shape(2): [None, "it has no tensor parallel", None],
        Shape(1, 2): [None, rows, rows],
    }
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "  torch-graph: it has no tensor parallel: left out with --tp 2"
    assert len(said) == 3


def a_rate(value: float, tp: int = 1, dp: int = 1, **changes: Any) -> Record:
    figures = dict(value=value, samples=[0.9 * value, value, 1.1 * value], stats={"std": 1, "mean": 9})
    mesh = dict(tp=tp, dp=dp, devices=tp * dp, floor=300.0 * tp * dp)
    return a_record(suite="mesh", impl="auto", **figures, **mesh) | changes


RATES = [
    a_rate(200, 1), a_rate(1, 2, when="2025-01-01T00:00:00", run="old"), a_rate(350, 2), a_rate(500, 4),
    a_rate(1500, 1, 1, batch=8), a_rate(5900, 1, 4, batch=32), a_rate(700, 2, 2, batch=2),
    a_record(value=77.0),
]  # fmt: skip


def test_the_table_of_meshes() -> None:
    rows = {tuple(line.split(" | ")[3:5]): line.split(" | ") for line in scaling.table(RATES).splitlines()[2:]}
    assert {key: (row[6], row[9], row[10]) for key, row in rows.items()} == {
        ("one device", "1"): ("200", "67", ""),
        ("--tp 2", "1"): ("350", "58", "1.75"),
        ("--tp 4", "1"): ("500", "42", "2.50"),
        ("one device", "8"): ("1,500", "500", ""),
        ("--dp 4", "32"): ("5,900", "492", "3.93"),
        ("--tp 2 --dp 2", "2"): ("700", "58", ""),
    }
    assert "4 × NVIDIA H200" in rows["--tp 4", "1"][0]
    other = scaling.table([*RATES, a_rate(100, 4, model="70b")]).splitlines()
    assert [line.split(" | ")[10] for line in other if "| 70b |" in line] == [""]  # one device had another model
    assert "500" not in TABLES["published"](RATES)  # others publish rates of one device
    assert "7b, --tp 4 " in table(RATES[:-1])


def test_the_chart_of_meshes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    lines = scaling.series(scaling.rates(RATES))
    assert {key: [r["devices"] for r in line] for key, line in lines.items()} == {
        ("tp", "auto", "bf16", 1): [1, 2, 4],
        ("dp", "auto", "bf16", 8): [1, 4],
    }
    (path,) = scaling.draw(RATES, tmp_path)
    assert path.name == "mesh-7b-h200.png"
    assert path.stat().st_size > 10_000
    assert list(scaling.draw(RATES[-1:], tmp_path)) == []

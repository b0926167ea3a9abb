"""The table of the two ways of a decode step, and that what runs follows it."""

import jax
import pytest
from h200 import H200

from jllama.config import preset
from jllama.engine import tuning
from jllama.kernels import Choice
from jllama.step import step_choice
from jllama.ways import LAUNCH_ROWS, TABLE, way_of
from pallas_kernels.hopper.decode_step.plan import MAX_TOKENS


def test_the_table_has_a_way_for_every_number_of_rows() -> None:
    limits = [way.rows for way in TABLE]
    assert limits[-1] is None
    assert limits[:-1] == sorted({*limits[:-1]} - {None})
    assert [way_of(rows).name for rows in (1, LAUNCH_ROWS, LAUNCH_ROWS + 1, 256)] == ["launch", "launch", "ops", "ops"]
    assert LAUNCH_ROWS <= MAX_TOKENS  # the kernel can do it


def test_no_engine_pads_rows_from_one_way_to_the_other() -> None:
    assert {way.rows for way in TABLE} - {None} <= {*tuning._GPU.rows}


@pytest.mark.parametrize(("model", "quant"), [("7b", "none"), ("7b", "int4"), ("tinyllama-1.1b", "int8")])
def test_steps_follow_the_table(model: str, quant: str) -> None:
    def choice(rows: int) -> Choice:
        return step_choice(preset(model), "bfloat16", quant, batch=rows)  # type: ignore[arg-type]

    assert choice(1) == Choice("ops", "needs an NVIDIA Hopper GPU, found platform 'cpu'")
    with jax.sharding.use_abstract_mesh(H200):
        found = {rows: choice(rows) for rows in tuning._GPU.rows}
    for rows, how in found.items():
        way = way_of(rows)
        assert how == (
            Choice("pallas", "kernel runs here") if way.name == "launch" else Choice("ops", f"{rows} rows: {way.why}")
        )

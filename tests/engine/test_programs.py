"""The programs of an engine: how many there are, what compiles them, and how pieces are divided over them."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import jax
import pytest
import tiny
from reference_engine import assert_same

from jllama import Engine, Request, SamplingSettings
from jllama.engine import steps
from jllama.engine.launch import cut, launches
from jllama.engine.tuning import _CPU, _GPU


@contextlib.contextmanager
def events_of_compilation(names: Counter[str]) -> Iterator[None]:
    """Count what is compiled inside the ``with`` block, by the function's name."""

    def count(event: str, _: float, **about: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names[str(about.get("fun_name", "")).removeprefix("jit(").removesuffix(")")] += 1

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(count)


def test_the_number_of_programs_is_bounded_and_warm_up_makes_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = dict(slots=4, pages=16, max_len=256)  # as in test_engine.py, so that nothing is compiled twice
    e, compiled_names = Engine(tiny.model(), budget=64, **sizes), Counter[str]()
    with events_of_compilation(compiled_names):
        e.warm_up(progress=True)
    assert "18/18" in capsys.readouterr().err
    made = Counter(name for name, *_ in e.programs)
    assert not {name: n for name, n in compiled_names.items() if n > made[name] and name in made}  # none twice
    programs, compiled = set(e.programs), [f._cache_size() for f in (steps.jit_decode, steps.jit_feed, steps.jit_score)]
    # copy, join; feed and score of 1, 2; the draw of first tokens after these, and decode of 1, 4, in three kinds
    assert len(programs) == 2 + 2 * 2 + 2 * 2 * 3
    assert {rows: way.impl for rows, way in e.ways.items()} == {1: "ops", 4: "ops"}
    kinds = [SamplingSettings(), SamplingSettings(1.0), SamplingSettings(0.8, top_k=20)]
    asked = [Request(tiny.prompt(5 + 23 * i), 9, kinds[i % 3], ()) for i in range(9)]
    handles = [e.submit(request) for request in asked]
    while e.busy:
        e.step()
    e.score([[5]], [[6]])
    for h in handles:
        assert_same(tiny.model(), h.request, h.completion.ids, h.completion.logprobs)
    assert e.programs == programs
    assert [f._cache_size() for f in (steps.jit_decode, steps.jit_feed, steps.jit_score)] == compiled


def test_a_long_turn_of_few_rows_is_one_program() -> None:
    tuning = replace(_CPU, steps=(1, 2, 8), rows=(2, 4), whole=2)
    e = Engine(tiny.model(), slots=4, pages=16, max_len=256, tuning=tuning)
    e.warm_up(["greedy"], scores=False)
    programs = set(e.programs)
    assert {rows: {name for name, n, _ in programs if n == rows and "decode" in name} for rows in (2, 4)} == {
        2: {"decode", "decode_long"},
        4: {"decode"},
    }
    for rows in (1, 3):
        for request in (asked := [Request(tiny.prompt(5, i), 12, stop_ids=()) for i in range(rows)]):
            handle = e.submit(request)
        while e.busy:
            e.step()
        assert_same(tiny.model(), asked[-1], handle.completion.ids, handle.completion.logprobs)
    assert e.programs == programs


@pytest.mark.parametrize(
    ("count", "sizes"),
    [
        (1, (1,)),
        (3, (4,)),
        (5, (4, 1)),
        (12, (8, 4)),
        (15, (16,)),
        (16, (16,)),
        (20, (16, 4)),
        (32, (16, 16)),  # 8 prompts of 512 tokens, or one of 4,096
        (65, (16, 16, 16, 16, 1)),
    ],
)
def test_pieces_are_divided_over_few_launches_with_little_padding(count: int, sizes: tuple[int, ...]) -> None:
    assert launches(_GPU.pieces, count) == sizes


def test_launches_hold_every_piece_of_every_part_in_order() -> None:
    for known in (_CPU.pieces, _GPU.pieces, (1, 3)):
        for count in range(1, 70):
            parts = [list(range(count)), list(range(count // 2)), []]
            found = list(cut(known, parts))
            assert all(len(items) <= size for size, chunk in found for items in chunk)
            assert [[x for _, chunk in found for x in chunk[i]] for i in range(3)] == parts

"""The tokens of prompts that a turn of ``jllama serve`` feeds: enough of them that slots do not stay empty."""

from types import SimpleNamespace
from typing import Any

import pytest

from jllama.cli import serve
from jllama.engine import engine, tuning
from jllama.engine.pages import Pages
from jllama.engine.scheduler import Scheduler, Sequence
from jllama.kernels import PAGE

SLOTS = 256


def budget_on(monkeypatch: pytest.MonkeyPatch, *flags: str, platform: str) -> int:
    """What the command gives its engine on a device."""
    found: list[dict[str, Any]] = []
    lm = SimpleNamespace(params=None, max_len=64, backend="auto")
    monkeypatch.setattr("jllama.cli.runtime.open_model", lambda args, **how: SimpleNamespace(lm=lm))
    device: Any = SimpleNamespace(platform=platform)
    monkeypatch.setattr(engine, "Engine", lambda params, **how: found.append(how))
    serve._engine(serve.parser().parse_args(["--slots", str(SLOTS), *flags]))
    given = found[0]["budget"]
    return tuning.tuning_for(device).budget if given is None else given


def test_the_budget_of_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    assert budget_on(monkeypatch, platform="cpu") == 512
    assert budget_on(monkeypatch, platform="gpu") == 4096
    assert budget_on(monkeypatch, "--budget", "640", platform="gpu") == 640


def test_requests_that_wait_get_the_slots_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts as long as their texts, three for each slot. With a budget of 512, two prompts join in the four steps of
    a turn, so that half of the slots stay empty."""
    gpu: Any = SimpleNamespace(platform="gpu")
    sizes = tuning.tuning_for(gpu)
    pieces = budget_on(monkeypatch, platform="gpu") // sizes.piece
    how: dict[str, Any] = dict(piece=sizes.piece, pieces=pieces, alone=sizes.alone // sizes.piece, steps=sizes.steps)
    scheduler = Scheduler(Pages(9 * SLOTS, PAGE), slots=SLOTS, max_len=1024, **how)
    for i in range(3 * SLOTS):
        scheduler.add(Sequence([i] * 256, 256))
    before, rows = scheduler.plan(), []
    while scheduler.waiting:
        plan = scheduler.plan()
        rows.append(len(plan.rows))
        drawn = dict.fromkeys(before.firsts, 1)
        drawn |= {s: drawn.get(s, 0) + min(before.steps, s.limit) for s in before.rows}
        for s, count in drawn.items():
            scheduler.read(s, [1] * min(count, s.prompt + s.limit - len(s.tokens)))
        before = plan
    assert sum(rows) / len(rows) > 0.8 * SLOTS

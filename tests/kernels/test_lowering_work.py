"""Bounds Mosaic's work to lower a kernel, in operations and solver steps, because seconds depend on the machine.

Mosaic infers layouts with a constraint solver in Python. After each layout that it guesses, it goes through all
equations of the kernel. So a kernel without explicit layouts may take minutes: the step of the 70B in int4 took a
minute and 1,456,000 visits of an equation. Now it takes 7,200.
"""

import pytest

from bench.lowered_modules import CASES, Case, Lowered, decode_step_case

pytestmark = pytest.mark.timeout(240)  # ten times the time on a slow machine with two cores

LARGE = {
    "matmul": "70b",
    "ffn": "70b",
    "qkv": "70b",
    "attention": "70b",
    "decode_attention": "70b",
    "paged_attention": "70b",
    "attend_and_write": "70b",
}


def work(case: Case) -> Lowered:
    """All kernels of a call together."""
    kernels = case.lower(hashes=False)
    assert kernels
    return Lowered(*(sum(getattr(k, name) for k in kernels) for name in ("ops", "equations", "tries", "printed")))


@pytest.mark.parametrize(("fmt", "queries"), [("bf16", 1), ("int4-g128", 8)])
@pytest.mark.parametrize("model", ["7b", "70b", "tinyllama"])
def test_decode_step(model: str, fmt: str, queries: int) -> None:
    found = work(decode_step_case(model, fmt, 1, queries))
    assert found.ops < 5_000
    assert found.equations < 10_000
    assert found.printed < 3_000_000  # 70B, int4: 12,300,000 while every load was an operation of its own


@pytest.mark.parametrize("op", sorted(CASES.keys() - {"decode_step"}))
def test_other_kernels(op: str) -> None:
    for case in CASES[op]():
        if not case.name.startswith(LARGE.get(op, "")):
            continue
        found = work(case)
        assert found.ops < 6_000, case.name
        assert found.equations < 30_000, case.name

"""Records of the benchmarks, for tests."""

from bench.record import Record

CEILINGS = {"copy": 4e12, "read": 4e12, "matrix": 7e14, "launch": 1e-5, "kernel": 1e-6}


def a_record(**changes: object) -> Record:
    """A record of a decode of one row, with ``changes``."""
    base = dict(suite="compare", case="decode", impl="xla", model="7b", dtype="bf16", batch=1, seq=8, context=16)
    base |= dict(metric="tokens_per_s", value=100.0, samples=[99.0, 100.0, 101.0, 100.0], floor=300.0)
    base |= dict(device="NVIDIA H200", versions={"jax": "0"}, commit="aaaa111", dirty=False, when="2026-01-01T00:00:00")
    base |= dict(run="r1", ceilings=CEILINGS, load_average=[0.5], agreement=1.0)
    return base | changes

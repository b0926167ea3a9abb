"""`bench.http_cost`: the real engine and server over a clock. No test asserts a time."""

import subprocess
import sys

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")


def test_every_token_comes_with_and_without_http() -> None:
    flags = ["--streams", "3", "--new", "5", "--prompt", "8", "--step-ms", "1", "--piece-ms", "1"]
    # In a process of its own, because it changes settings of the interpreter.
    ran = subprocess.run([sys.executable, "-m", "bench.http_cost", *flags], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr  # a text with too few tokens is an error
    engine, http, cost = ran.stdout.splitlines()
    assert engine.startswith("engine: ")
    assert http.startswith("http: ")
    assert "us an event" in http
    assert cost.endswith("% at 3 streams")

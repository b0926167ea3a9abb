"""Runs ``on_eight_devices.py`` with eight CPU devices: they are counted when jax starts, so it needs a process of its
own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import quick

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(280)
def test_on_eight_devices() -> None:
    flags = quick.xla_flags("--xla_force_host_platform_device_count=8")
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "--durations=5", "-p", "no:cacheprovider"]
    file = str(Path(__file__).with_name("on_eight_devices.py"))
    done = subprocess.run([*command, file], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=270)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr

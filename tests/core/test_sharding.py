"""The example of docs/sharding.md, run on four CPU devices."""

import os
import subprocess
import sys
from pathlib import Path

import quick

ROOT = Path(__file__).parents[2]


def test_the_example_trains_and_samples_on_four_devices() -> None:
    # Devices are counted when jax starts, so this needs a process of its own.
    flags = quick.xla_flags("--xla_force_host_platform_device_count=4")
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "examples" / "sharding.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert "mesh: {'data': 2, 'model': 2}" in done.stdout
    assert float(done.stdout.split("steps: ")[1].split()[0]) < 1
    assert int(done.stdout.split("as they began: ")[1].split("%")[0]) >= 80
    assert "the engine says the same: True" in done.stdout
    assert "and so does one device: True" in done.stdout

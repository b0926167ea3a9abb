"""Shared by all tests: the folders of data, and which tests this machine can run."""

import os
import re
from pathlib import Path

import jax
import pytest

# The warpgroups of Pallas's GPU interpreter wait for one another in the CPU client's thread pool, which has one thread
# per core. On two cores all threads may wait at once. jax reads this when it makes its first device.
os.environ.setdefault("PJRT_NPROC", "32")
# Several test processes share a GPU, so none may reserve most of its memory at start.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

ROOT = Path(__file__).parents[1]


def _gpu_missing() -> str | None:
    device = jax.devices()[0]
    if device.platform != "gpu":
        return f"needs a Hopper GPU, found platform {device.platform}"
    if getattr(device, "compute_capability", "") != "9.0":
        return f"needs a Hopper GPU, found {device.device_kind}"
    return None


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _gpu_missing()
    for item in items:
        if re.search(r"_lowers?(_|\[|$)", item.name):
            item.add_marker("lowering")
        if reason and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real checkpoints and golden outputs, which are not part of the project."""
    path = Path(os.environ.get("JLLAMA_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no test data at {path} (set JLLAMA_TEST_DATA)")
    return path

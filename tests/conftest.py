"""Shared by all tests: the folders of data, and which tests this machine can run."""

import gc
import os
import re
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

import interpreter
import jax
import pytest
import quick

# The warpgroups of Pallas's GPU interpreter wait for one another in the CPU client's thread pool, which has one thread
# per core. On two cores all threads may wait at once. jax reads this when it makes its first device.
os.environ.setdefault("PJRT_NPROC", "32")
# Several test processes share a GPU, so none may reserve most of its memory at start.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

# XLA reads its flags once, for the first device. Processes that tests start do not inherit these: most compute longer
# than they compile.
with pytest.MonkeyPatch.context() as patch:
    patch.setenv("XLA_FLAGS", quick.xla_flags())
    PLATFORM = jax.default_backend()

# Processes that tests start compile the same programs, and read these variables. Every worker has a cache of its own,
# because JAX does not write entries atomically. This process has no cache on disk: of the 2,600 programs
# that it compiles, it would have found only 26 there.
CACHE = tempfile.mkdtemp(prefix="jllama-tests-xla-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
# A test compiles far longer than it computes: LLVM does not optimise, except for a GPU.
if PLATFORM == "cpu":
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    jax.config.update("jax_disable_most_optimizations", True)
# Tracing makes many small objects that live on: the collector would go through all of them again and again.
gc.set_threshold(100_000, 50, 50)

ROOT = Path(__file__).parents[1]
LONGEST = ("tests/mesh/", "tests/cli/test_readme_commands.py")
interpreter.install()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where pytest-timeout is not installed, as on a borrowed GPU machine, limits of time are known and do nothing."""
    if find_spec("pytest_timeout") is None:
        parser.addini("timeout", "seconds that a test may take")


def pytest_configure(config: pytest.Config) -> None:
    if find_spec("pytest_timeout") is None:
        config.addinivalue_line("markers", "timeout(seconds): seconds that a test may take")


def pytest_unconfigure() -> None:
    shutil.rmtree(CACHE, ignore_errors=True)


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
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))  # the last test to begin should not be a long one
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

"""The cache of compiled programs on disk, and a clock that separates compile time from run time."""

import os
from pathlib import Path

import jax

_seconds = 0.0
_listening = False


def enable_cache(directory: str | Path | None = None) -> Path:
    """Keep compiled programs in ``directory`` (default: the user's cache folder), so that later processes reuse
    them."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jllama" / "xla"
    path = Path(directory) if directory else default
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return path


def start_clock() -> None:
    """Start to count the seconds that this process spends on tracing and compiling."""
    global _listening
    if not _listening:
        jax.monitoring.register_event_duration_secs_listener(_count)
        _listening = True


def compile_seconds() -> float:
    """Seconds of tracing and compiling since `start_clock`; 0 if it was not called."""
    return _seconds


def _count(event: str, duration_secs: float, **kwargs: str | int) -> None:
    global _seconds
    if event.startswith("/jax/core/compile/"):
        _seconds += duration_secs

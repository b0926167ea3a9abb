"""How busy a device is, from a profile that jax records."""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHOWN = 8  # gaps, and names of kernels, that a figure keeps
OTHER = "other"  # the sum of those that it does not


@dataclass(frozen=True)
class Busy:
    """How a device spent the time from its first operation to its last."""

    span_ms: float
    share: float  # of the span in which at least one operation ran
    gaps_us: list[float]  # the longest times without one
    kernels_us: dict[str, float]  # the operations that took longest, by name, and the sum of all others


@dataclass(frozen=True)
class Span:
    """An operation on a device, in nanoseconds."""

    begin: float
    end: float
    name: str = ""


def busy(spans: Sequence[Span]) -> Busy:
    """The figures of some operations. Those of several streams may overlap."""
    ordered = sorted(spans, key=lambda span: span.begin)
    begin = end = ordered[0].begin
    gaps = []
    for span in ordered:
        if span.begin > end:
            gaps.append(span.begin - end)
        end = max(end, span.end)
    by_name = Counter[str]()
    for span in spans:
        by_name[span.name] += span.end - span.begin  # pyright: ignore[reportArgumentType]  (a counter of floats)
    longest = dict(by_name.most_common(SHOWN))
    if len(by_name) > SHOWN:
        longest[OTHER] = sum(by_name.values()) - sum(longest.values())
    return Busy(
        span_ms=(end - begin) / 1e6,
        share=1 - sum(gaps) / (end - begin),
        gaps_us=[round(gap / 1e3, 1) for gap in sorted(gaps, reverse=True)[:SHOWN]],
        kernels_us={name: round(time / 1e3, 1) for name, time in longest.items()},
    )


def per(found: Busy | None, steps: int) -> dict[str, Any]:
    """The fields of a record of the time by kernel, of one of so many steps: ``value`` is that of all kernels, and
    ``idle_ms`` that without any."""
    if found is None:
        return dict(metric="ms", samples=[], why="only a GPU's operations are traced")
    kernels = {name: us / 1e3 / steps for name, us in found.kernels_us.items()}
    idle = found.span_ms * (1 - found.share) / steps
    return dict(metric="ms", samples=[sum(kernels.values())], kernels_ms=kernels, idle_ms=idle, gaps_us=found.gaps_us)


def traced(work: Callable[[], object]) -> Busy | None:
    """Run ``work``, which must wait for the device. Returns the figures of the first GPU; None without a GPU, whose
    operations alone are on streams."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            work()
        spans = [span for file in Path(folder).rglob("*.xplane.pb") for span in _of_first_gpu(file)]
    return busy(spans) if spans else None


def _of_first_gpu(file: Path) -> Iterator[Span]:
    import jax

    planes = [plane for plane in jax.profiler.ProfileData.from_file(str(file)).planes if "GPU:0" in plane.name]
    for line in (line for plane in planes for line in plane.lines if "Stream" in line.name):
        for event in line.events:
            yield Span(event.start_ns, event.start_ns + event.duration_ns, event.name)

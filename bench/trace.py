"""How busy a device is, from a profile that jax records."""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SHOWN = 8  # gaps, and names of kernels, that a figure keeps


@dataclass(frozen=True)
class Busy:
    """How a device spent the time from its first operation to its last."""

    span_ms: float
    share: float  # of the span in which at least one operation ran
    gaps_us: list[float]  # the longest times without one
    kernels_us: dict[str, float]  # the operations that took longest, by name


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
    return Busy(
        span_ms=(end - begin) / 1e6,
        share=1 - sum(gaps) / (end - begin),
        gaps_us=[round(gap / 1e3, 1) for gap in sorted(gaps, reverse=True)[:SHOWN]],
        kernels_us={name: round(time / 1e3, 1) for name, time in by_name.most_common(SHOWN)},
    )


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

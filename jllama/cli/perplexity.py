"""``jllama perplexity --model M --text FILE``: measure how well a model predicts a text.

The text is split into windows, which an `Engine` scores. Each window starts with a beginning-of-sequence token. Every
token is scored exactly once. If ``--stride`` is smaller than the window, windows overlap, so that a token has more
context. Adjacent tokens are not independent, but windows nearly are. So the confidence interval is computed from
windows.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jllama.cli.inputs import read_text
from jllama.cli.options import Parser, add_model_flags, add_process_flags
from jllama.cli.progress import Progress
from jllama.errors import InputError, reported

if TYPE_CHECKING:
    from jllama.config import Backend
    from jllama.params import Params

SLOTS = 16  # windows at a time
_Z = 1.959964  # 95 %


@dataclass(frozen=True)
class Perplexity:
    """The result: the mean negative log-likelihood in nats, the perplexity, and the 95 % confidence interval of each.
    The intervals are None if there is only one window."""

    mean_nll: float
    perplexity: float
    nll_interval: tuple[float, float] | None
    perplexity_interval: tuple[float, float] | None
    tokens: int
    windows: int


@dataclass(frozen=True)
class Window:
    """A window of the text."""

    ids: tuple[int, ...]  # without the beginning-of-sequence id
    counted: int  # number of ids at the end that are scored


def cut(ids: list[int], window: int, stride: int | None = None, limit: int | None = None) -> list[Window]:
    """Split ids into windows of ``window`` tokens, including bos. They start ``stride`` tokens apart (default: windows
    do not overlap)."""
    room = window - 1
    step = room if stride is None else stride
    if room < 1 or not 1 <= step <= room:
        raise InputError(f"--stride: expected 1 to {room}, one less than the window, found {step}")
    windows, done = [], 0
    for begin in range(0, len(ids), step):
        end = min(begin + room, len(ids))
        if end <= done or len(windows) == limit:
            break
        windows.append(Window(tuple(ids[begin:end]), end - done))
        done = end
    return windows


def measure(
    params: "Params",
    windows: list[Window],
    bos_id: int,
    *,
    slots: int = SLOTS,
    backend: "Backend" = "auto",
    progress: Callable[[int], None] = lambda finished: None,
) -> Perplexity:
    """The perplexity of ``windows``, of which ``slots`` run at a time. ``progress`` is told how many more are
    finished."""
    from jllama.engine.engine import Engine
    from jllama.engine.request import Request
    from jllama.paged import pages_for

    if not windows:
        raise InputError("text: expected at least one token, found none")
    longest, slots = 1 + max(len(window.ids) for window in windows), min(slots, len(windows))
    pages = slots * pages_for(longest)
    engine = Engine(params, slots=slots, max_pages=pages, max_len=longest, backend=backend)
    requests = [Request([bos_id, *w.ids], score_from=1 + len(w.ids) - w.counted) for w in windows]
    handles = engine.submit_all(requests)
    for events in engine.follow(handles):
        progress(len(events))  # a window has one event, at its end
    sums = [-math.fsum(handle.completion.logprobs) for handle in handles]
    return summary(sums, [window.counted for window in windows])


def summary(sums: list[float], counts: list[int]) -> Perplexity:
    """The mean and its confidence interval. The windows are the independent samples."""
    total, n = sum(counts), len(sums)
    mean = math.fsum(sums) / total
    interval = None
    if n > 1:
        # Windows differ in length, so this is the standard error of a ratio of sums, not of a mean of means.
        spread = math.fsum((s - mean * c) ** 2 for s, c in zip(sums, counts, strict=True))
        half = _student(n - 1) * math.sqrt(spread * n / (n - 1)) / total
        interval = (mean - half, mean + half)
    bounds = None if interval is None else (_exp(interval[0]), _exp(interval[1]))
    return Perplexity(mean, _exp(mean), interval, bounds, total, n)


def _student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t-distribution, from the expansion around the normal quantile."""
    z, v = _Z, freedom
    return z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def parser() -> Parser:
    """The command's flags."""
    parser = Parser(prog="jllama perplexity", description="Measure how well a model predicts a text.")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="the text, UTF-8")
    parser.add_argument("--window", type=int, metavar="N", help="tokens per window, including bos (default: 512)")
    parser.add_argument("--stride", type=int, metavar="N", help="tokens between window starts (default: no overlap)")
    parser.add_argument("--windows", type=int, metavar="N", help="maximum number of windows (default: all)")
    help_slots = "windows that run at a time (default: 16)"
    parser.add_argument("--slots", "--batch-size", type=int, default=SLOTS, metavar="N", help=help_slots)
    add_model_flags(parser)
    add_process_flags(parser)
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit code."""
    args = parser().parse_args(argv)
    with reported("jllama perplexity"):
        for name in ("windows", "slots"):
            if (value := getattr(args, name)) is not None and value < 1:
                raise InputError(f"--{name}: expected at least 1, found {value}")
        text = read_text(args.text) if args.coordinator is None else None  # before anything slow is imported
        from jllama.cli.processes import from_first, together
        from jllama.cli.runtime import as_input_error

        with together(args):
            given = from_first(lambda: read_text(args.text)) if text is None else text
            as_input_error(lambda: print(run(args, given)))
    return 0


def run(args: argparse.Namespace, text: str) -> str:
    """Load the model and measure. Returns the text to print."""
    from jllama.cli.runtime import open_model

    lm = open_model(args, quiet=args.quiet).lm
    window = min(512, lm.max_len) if args.window is None else args.window
    if not 2 <= window <= lm.max_len:
        raise InputError(f"--window: expected 2 to {lm.max_len} (the model's context), found {window}")
    windows = cut(lm.tokenizer.encode(text, bos=False), window, args.stride, args.windows)
    if not windows:
        raise InputError(f"{args.text}: expected at least one token of text, found none")
    bar = Progress(len(windows), "window", quiet=args.quiet)
    try:
        bos_id = lm.tokenizer.bos_id
        result = measure(lm.params, windows, bos_id, slots=args.slots, backend=args.backend, progress=bar.add)
    finally:
        bar.close()
    if args.json:
        # JSON has no inf and nan, so they become null.
        values = {key: _finite(value) for key, value in asdict(result).items()}
        return json.dumps({"model": args.model, "text": str(args.text), "window": window, **values})
    spread = result.perplexity_interval
    interval = f" (95 % confidence: {spread[0]:.4f} to {spread[1]:.4f})" if spread else ""
    return (
        f"perplexity {result.perplexity:.4f}{interval}\n"
        f"mean negative log-likelihood {result.mean_nll:.6f} over {result.tokens} tokens in {result.windows} windows"
    )


def _finite(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())

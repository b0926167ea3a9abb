"""``jllama perplexity --model M --text FILE``: measure how well a model predicts a text.

The text is split into windows, which run in batches. Each window starts with a beginning-of-sequence token. Every token
is scored exactly once. If ``--stride`` is smaller than the window, windows overlap, so that a token has more context.
Adjacent tokens are not independent, but windows nearly are. So the confidence interval is computed from windows.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jllama.cli.inputs import read_text
from jllama.cli.options import Parser, add_model_flags
from jllama.errors import InputError, reported

if TYPE_CHECKING:
    from jllama.config import Backend
    from jllama.params import Params

_LOGITS_BYTES = 256 << 20  # limit for the logits of one batch
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
    batch: int | None = None,
    backend: "Backend" = "auto",
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda batches, _: batches,
) -> Perplexity:
    """The perplexity of ``windows``, which are run in batches."""
    if not windows:
        raise InputError("text: expected at least one token, found none")
    width = max(len(window.ids) for window in windows)
    batch = batch or max(1, min(16, len(windows), _LOGITS_BYTES // (4 * width * params.config.vocab_size)))
    groups = [windows[i : i + batch] for i in range(0, len(windows), batch)]
    sums: list[float] = []
    for group in progress(groups, len(groups)):
        sums += _sums(params, group, batch, width, bos_id, backend)
    return summary(sums, [window.counted for window in windows])


def _sums(
    params: "Params", group: list[Window], batch: int, width: int, bos_id: int, backend: "Backend"
) -> Iterator[float]:
    """The summed negative log-likelihood of each window. The batch is padded, so that one program is compiled."""
    import numpy as np

    from jllama.scoring import token_logprobs

    tokens = np.full((batch, width + 1), bos_id, np.int32)
    for row, window in zip(tokens, group, strict=False):
        row[1 : 1 + len(window.ids)] = window.ids
    logprobs = np.asarray(token_logprobs(params, tokens, backend=backend), np.float64)
    for row, window in zip(logprobs, group, strict=False):
        end = len(window.ids)
        yield -float(row[end - window.counted : end].sum())


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
    help_batch = "windows per batch (default: as many as 256 MB of logits allow, at most 16)"
    parser.add_argument("--batch-size", type=int, metavar="B", help=help_batch)
    add_model_flags(parser)
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit code."""
    args = parser().parse_args(argv)
    with reported("jllama perplexity"):
        for name in ("windows", "batch_size"):
            if (value := getattr(args, name)) is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')}: expected at least 1, found {value}")
        text = read_text(args.text)
        from jllama.cli.runtime import as_input_error

        as_input_error(lambda: print(run(args, text)))
    return 0


def run(args: argparse.Namespace, text: str) -> str:
    """Load the model and measure. Returns the text to print."""
    from tqdm import tqdm

    from jllama.cli.runtime import open_model

    lm = open_model(args, quiet=args.quiet).lm
    window = min(512, lm.max_len) if args.window is None else args.window
    if not 2 <= window <= lm.max_len:
        raise InputError(f"--window: expected 2 to {lm.max_len} (the model's context), found {window}")
    windows = cut(lm.tokenizer.encode(text, bos=False), window, args.stride, args.windows)
    if not windows:
        raise InputError(f"{args.text}: expected at least one token of text, found none")
    result = measure(
        lm.params,
        windows,
        lm.tokenizer.bos_id,
        batch=args.batch_size,
        backend=args.backend,
        progress=lambda groups, total: tqdm(groups, total=total, unit="batch", disable=True if args.quiet else None),
    )
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

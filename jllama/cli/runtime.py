"""A model made ready from command-line flags: opened, checked, loaded, with a progress bar."""

import argparse
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import jax

from jllama.compilation import enable_cache, start_clock
from jllama.device import bandwidth, default_device
from jllama.errors import InputError
from jllama.formats import open_source
from jllama.formats.checkpoint import load
from jllama.kernels import Unsupported, require_kernels
from jllama.params import Params, weight_bytes
from jllama.stream import Timings
from jllama.text.tokenizer import Tokenizer, tokenizer_for


@dataclass(frozen=True)
class Model:
    """What the command lines work with."""

    params: Params
    tokenizer: Tokenizer
    max_len: int
    load_seconds: float


def open_model(args: argparse.Namespace, *, batch: int = 1, quiet: bool = False) -> Model:
    """Load what the flags of `add_model_flags` name."""
    began = time.perf_counter()
    if not args.no_compilation_cache:
        enable_cache(args.compilation_cache)
    start_clock()
    if args.backend == "pallas":
        require_kernels()  # before anything is loaded
    source = open_source(args.model)
    context = source.config.max_seq_len
    if args.max_seq_len is not None and not 2 <= args.max_seq_len <= context:
        raise InputError(f"--max-seq-len: expected 2 to {context} (the model's context), found {args.max_seq_len}")
    max_len = args.max_seq_len or context
    tokenizer = tokenizer_for(source, args.tokenizer)
    params = load(
        source,
        dtype=args.dtype,
        quant=args.quant,
        batch=batch,
        max_len=max_len,
        stacked=False if args.backend == "xla" else None,
        progress=None if quiet else progress_bar,
    )
    jax.block_until_ready(params)
    return Model(params, tokenizer, max_len, time.perf_counter() - began)


def progress_bar(names: Iterable[str], total: int) -> Iterable[str]:
    """A bar on stderr, where that is a terminal."""
    from tqdm import tqdm

    return tqdm(names, total=total, desc="loading", unit="tensor", disable=None, leave=False, file=sys.stderr)


def figures(params: Params, timings: Timings) -> str:
    """The line of figures: how fast, and how near to what the memory allows."""
    if timings.decode_steps == 0 or timings.decode <= 0:
        return f"{timings.new_tokens} tokens"
    rate = weight_bytes(params, per_token=True) * timings.decode_steps / timings.decode
    device = default_device()
    peak = bandwidth(device)
    share = f" ({100 * rate / peak:.0f} % of {device.device_kind})" if peak else ""
    return (
        f"{timings.new_tokens} tokens, {timings.decode_rate:.1f} tokens/s, "
        f"{rate / 1e9:.1f} GB/s of weights{share}; prefill {timings.prompt_tokens} tokens in {timings.prefill:.3f} s"
    )


def as_input_error(run: Callable[[], None]) -> None:
    """Run a command's body; a kernel that refuses (`--backend pallas`) is bad input, with its reason."""
    try:
        run()
    except Unsupported as reason:
        raise InputError(f"--backend pallas: {reason}") from None

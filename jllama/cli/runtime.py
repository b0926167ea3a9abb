"""Loads the model that the command-line flags name, and describes how it runs."""

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax

from jllama.cli.mesh import mesh_of
from jllama.cli.progress import loading_bar
from jllama.compilation import enable_cache, start_clock
from jllama.config import Backend
from jllama.device import bandwidth, default_device, quicker_format
from jllama.errors import InputError
from jllama.formats import open_source
from jllama.formats.lora import lora_spec, with_lora
from jllama.formats.source import Source
from jllama.kernels import QuantizedTensor, Unsupported, require_kernels
from jllama.mesh.layout import DATA, MODEL, axis_size
from jllama.params import Params, weight_bytes
from jllama.stream import Timings
from jllama.text.lm import LM


@dataclass(frozen=True)
class Opened:
    """A loaded model, its checkpoint, and the time that it took to load."""

    lm: LM
    source: Source
    load_seconds: float


def open_model(args: argparse.Namespace, *, quiet: bool = False) -> Opened:
    """Load the model that the flags of `add_model_flags` name."""
    began = time.perf_counter()
    set_up(args, quiet=quiet)
    if args.backend == "pallas":
        require_kernels()  # fail before anything is loaded
    source = open_source(args.model, links=args.follow_links)
    if args.lora:
        source = with_lora(source, [lora_spec(text) for text in args.lora])
    context = source.config.max_seq_len
    if args.max_seq_len is not None and not 2 <= args.max_seq_len <= context:
        raise InputError(f"--max-seq-len: expected 2 to {context} (the model's context), found {args.max_seq_len}")
    lm = LM.load(
        source,
        dtype=args.dtype,
        quant=args.quant,
        max_len=args.max_seq_len,
        tokenizer=args.tokenizer,
        chat_template=getattr(args, "chat_template", None),
        backend=args.backend,
        mesh=mesh_of(args),
        progress=None if quiet else loading_bar,
    )
    jax.block_until_ready(lm.params)
    return Opened(lm, source, time.perf_counter() - began)


def set_up(args: argparse.Namespace, *, quiet: bool = False) -> None:
    """Apply the flags that affect the process. This must happen before jax initialises its devices."""
    if args.threads is not None:
        _use_cores(args.threads)
    if args.gpu_layers is not None and not quiet:
        print(
            "-ngl: has no effect: the whole model runs on the device that JAX finds "
            "(JAX_PLATFORMS=cpu in the environment keeps it off a GPU)",
            file=sys.stderr,
        )
    if args.tp * args.dp > 1:  # CPU devices wait for one another in one pool of threads, which may be too small
        os.environ.setdefault("PJRT_NPROC", "32")
    if not args.no_compilation_cache:
        enable_cache(args.compilation_cache)
    start_clock()


def _use_cores(count: int) -> None:
    if count < 1:
        raise InputError(f"--threads: expected at least 1, found {count}")
    if not hasattr(os, "sched_setaffinity"):
        raise InputError("--threads: expected Linux, where a process can be kept to some cores, found another system")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def device_line(backend: Backend, params: Params) -> str:
    """What runs the model, for the banner: kernels or XLA, and the device."""
    mesh = params.mesh
    kind = _times(1 if mesh is None else mesh.size) + default_device().device_kind
    if backend == "xla":
        return f"XLA on {kind}"
    try:
        require_kernels()
    except Unsupported:
        return f"XLA on {kind}"
    whole = params.stacked and 1 in (axis_size(mesh, MODEL), axis_size(mesh, DATA))
    return f"kernels on {kind}" + (", one launch a step" if whole else "")


def _times(devices: int) -> str:
    return f"{devices} x " if devices > 1 else ""


def figures(params: Params, timings: Timings) -> str:
    """One line with the speed of a run, also as a percentage of the memory bandwidth."""
    if timings.decode_steps == 0 or timings.decode <= 0:
        return _tokens(timings.new_tokens)
    rate = weight_bytes(params, per_token=True) * timings.decode_steps / timings.decode
    device, shards = default_device(), axis_size(params.mesh, MODEL)
    peak = bandwidth(device)
    percent = f" ({100 * rate / peak / shards:.0f} % of {_times(shards)}{device.device_kind})" if peak else ""
    speed = f"{timings.decode_rate:.1f} tokens/s, {rate / 1e9:.1f} GB/s of weights{percent}"
    prefill = f"prefill {_tokens(timings.prompt_tokens)} in {timings.prefill:.3f} s"
    return f"{_tokens(timings.new_tokens)}, {speed}; {prefill}"


def _tokens(count: int) -> str:
    return f"{count} token" if count == 1 else f"{count} tokens"


def quicker(params: Params) -> str:
    """What to add to the figures where other weights would have been quicker on this device; else nothing."""
    weight = params.layer(0).wqkv
    stored = weight.data if isinstance(weight, QuantizedTensor) else weight
    found = quicker_format(default_device(), stored.dtype.name)
    return f"; --quant {found} would have been quicker here than {stored.dtype.name}" if found else ""


def as_input_error(run: Callable[[], None]) -> None:
    """Run the body of a command. `Unsupported` (from ``--backend pallas``) becomes an `InputError` with its reason."""
    try:
        run()
    except Unsupported as reason:
        raise InputError(f"--backend pallas: {reason}") from None

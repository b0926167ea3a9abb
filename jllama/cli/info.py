"""``jllama info PATH``: describe a checkpoint and how it would run on this machine. No weight is read."""

import argparse
import functools
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jllama.cli.options import Parser
from jllama.demo_model import DEMO
from jllama.errors import InputError, reported

if TYPE_CHECKING:
    from jllama.config import Quant
    from jllama.formats.source import Source
    from jllama.kernels import Choice


def parser() -> Parser:
    """The command's flags."""
    parser = Parser(prog="jllama info", description="Describe a checkpoint and how it would run on this machine.")
    parser.add_argument("model", nargs="?", default=str(DEMO), metavar="PATH", help="checkpoint (default: the demo)")
    parser.add_argument(
        "-c", "--max-seq-len", "--ctx-size", type=int, metavar="N", help="context length (default: the model's)"
    )
    parser.add_argument(
        "--follow-links", action="store_true", help="links may point outside the checkpoint's directory"
    )
    parser.add_argument("--batch-size", type=int, default=1, metavar="B", help="prompts per batch (default: 1)")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit code."""
    args = parser().parse_args(argv)
    with reported("jllama info"):
        found = describe(args)
        print(json.dumps(found) if args.json else as_text(found))
    return 0


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """The description of a checkpoint, without reading its weights."""
    from jllama.device import default_device, free_bytes
    from jllama.formats import open_source

    source = open_source(args.model, links=args.follow_links)
    config = source.config
    context = config.max_seq_len if args.max_seq_len is None else args.max_seq_len
    if not 2 <= context <= config.max_seq_len:
        raise InputError(f"--max-seq-len: expected 2 to {config.max_seq_len} (the model's context), found {context}")
    if args.batch_size < 1:
        raise InputError(f"--batch-size: expected at least 1, found {args.batch_size}")
    device = default_device()
    return {
        "path": str(source.path),
        "format": source.form,
        "bytes": size_on_disk(source.path),
        "dtype": source.dtype,
        "quant": None if source.quant is None else asdict(source.quant),
        "weights": config.n_params,
        "config": asdict(config),
        "tokenizer": tokenizer_of(source),
        "chat": chat_of(source),
        "device": {"name": device.device_kind, "platform": device.platform, "free": free_bytes(device)},
        "context": context,
        "batch": args.batch_size,
        "memory": memory(source, args.batch_size, context, free_bytes(device)),
        "kernels": kernels(source, args.batch_size, context),
        "ways": ways(source, context),
    }


def size_on_disk(path: Path) -> int:
    """The total size of a checkpoint's files in bytes."""
    return sum(p.stat().st_size for p in path.iterdir() if p.is_file()) if path.is_dir() else path.stat().st_size


def tokenizer_of(source: "Source") -> dict[str, Any] | None:
    """The checkpoint's own tokenizer, or the error that it cannot be loaded; None if it has none."""
    from jllama.text.tokenizer import tokenizer_for

    if source.tokenizer is None:
        return None
    where = str(source.tokenizer) if isinstance(source.tokenizer, Path) else "in the file"
    try:
        tokenizer = tokenizer_for(source)
    except InputError as error:
        return {"where": where, "error": str(error)}
    return {"where": where, "pieces": tokenizer.n_ids, "bos": tokenizer.bos_id, "eos": list(source.config.eos_ids)}


def chat_of(source: "Source") -> str:
    """The chat format that `jllama chat` would use, or the error that prevents it."""
    from jllama.text.templates import Llama2Chat, PlainChat, chat_for

    try:
        chat = chat_for(source)
    except InputError as error:
        return str(error)
    names = {Llama2Chat: "Llama-2's format, by the model's name", PlainChat: "none: a chat would be plain text"}
    return names.get(type(chat), "the model's own template")


def memory(source: "Source", batch: int, context: int, free: int | None) -> list[dict[str, Any]]:
    """The memory for weights, cache and workspace in every form in which the checkpoint can be loaded, and whether it
    fits."""
    from jllama.formats.checkpoint import DTYPES, default_dtype
    from jllama.formats.memory import QUANTS, memory_of, stored

    quant, group = stored(source)
    forms: list[tuple[str, Quant, int | None]] = [(dtype, quant, group) for dtype in DTYPES]
    if quant == "none":
        plain = default_dtype(source)
        forms.extend((plain, name, None) for name in QUANTS[1:])
    rows = []
    for dtype, name, size in forms:
        need = memory_of(source.config, dtype, name, size, batch, context)
        fits = None if free is None else need.total <= free
        rows.append({"dtype": dtype, "quant": name, **asdict(need), "total": need.total, "fits": fits})
    return rows


def kernels(source: "Source", batch: int, context: int) -> dict[str, dict[str, dict[str, str]]]:
    """The implementation of every op with the default dtype on this machine. Only shapes are traced."""
    import jax
    import jax.numpy as jnp

    from jllama.backends import backends
    from jllama.formats.checkpoint import default_dtype, stored
    from jllama.params import init
    from jllama.step import runs_whole

    dtype, (quant, group) = default_dtype(source), stored(source)
    whole = runs_whole(source.config, dtype, quant, group, batch=batch, max_len=context)
    make = functools.partial(init, source.config, dtype=jnp.dtype(dtype), quant=quant, group=group, stacked=whole)
    params = jax.eval_shape(make, jax.random.key(0))
    prompt = min(128, context // 2)
    choices: dict[str, dict[str, Choice]] = backends(params, batch=batch, prompt=prompt, max_len=context)
    return {phase: {op: asdict(choice) for op, choice in ops.items()} for phase, ops in choices.items()}


def ways(source: "Source", context: int) -> dict[int, dict[str, str]]:
    """How a decode step runs for each number of rows that an engine compiles on this machine. Only shapes are
    traced."""
    from jllama.device import default_device
    from jllama.engine.tuning import tuning_for
    from jllama.formats.checkpoint import default_dtype, stored
    from jllama.step import step_choice

    form = default_dtype(source), *stored(source)
    of = functools.partial(step_choice, source.config, *form, max_len=context)
    return {rows: asdict(of(batch=rows)) for rows in tuning_for(default_device()).rows}


def as_text(found: dict[str, Any]) -> str:
    """The description as text."""
    config, device = found["config"], found["device"]
    stored = found["dtype"] if found["quant"] is None else found["quant"]["format"]
    heads = f"{config['n_heads']} heads of {config['head_dim']}, {config['n_kv_heads']} of them with keys of their own"
    lines = [
        f"{found['path']}",
        f"format     {found['format']}, {stored}, {_gb(found['bytes'])} on disk",
        f"model      {found['weights'] / 1e6:,.1f} M weights, {config['n_layers']} layers, width {config['dim']}, "
        f"hidden {config['hidden_dim']}",
        f"           {heads}, vocabulary {config['vocab_size']:,}, context {config['max_seq_len']:,}",
        f"tokenizer  {_tokenizer_line(found['tokenizer'])}",
        f"template   {found['chat']}",
        f"memory     {device['name']}: {'unknown' if device['free'] is None else _gb(device['free'])} free; "
        f"context {found['context']:,}, batch {found['batch']}",
    ]
    for row in found["memory"]:
        form = row["dtype"] if row["quant"] == "none" else f"{row['quant']} with {row['dtype']}"
        fits = {True: "fits", False: "does not fit", None: ""}[row["fits"]]
        parts = f"weights {_gb(row['weights'])}, cache {_gb(row['cache'])}, workspace {_gb(row['workspace'])}"
        lines.append(f"           {form:<20} {_gb(row['total']):>10}  {fits:<12}  ({parts})")
    for phase, ops in found["kernels"].items():
        by_choice: dict[str, list[str]] = {}
        for op, choice in ops.items():
            by_choice.setdefault(f"{choice['impl']}: {choice['why']}", []).append(op)
        for choice, names in by_choice.items():
            lines.append(f"{phase:<10} {', '.join(names)}: {choice}")
    by_way: dict[str, list[str]] = {}
    for rows, way in found["ways"].items():
        how = "one launch" if way["impl"] == "pallas" else "one launch for each op"
        by_way.setdefault(f"{how}: {way['why']}", []).append(str(rows))
    lines += [f"{'step':<10} of {', '.join(rows)} rows: {way}" for way, rows in by_way.items()]
    return "\n".join(lines)


def _tokenizer_line(tokenizer: dict[str, Any] | None) -> str:
    if tokenizer is None:
        return "none: name one with --tokenizer FILE"
    if "error" in tokenizer:
        return tokenizer["error"]
    ends = " or ".join(map(str, tokenizer["eos"]))
    return f"{tokenizer['pieces']:,} pieces, {tokenizer['where']}; texts begin with {tokenizer['bos']}, end with {ends}"


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 5e6 else f"{count / 1e6:.2f} MB"


if __name__ == "__main__":
    sys.exit(main())

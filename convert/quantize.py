"""``python -m convert.quantize SRC DST``: quantise a checkpoint of any format to a native one (int8 or int4 weights).

Tensors are processed in blocks of rows, so neither the source nor the result is in memory as a whole. The result is the
same as that of ``--quant`` at load. As there, the norms stay floats, and so does the embedding. One that is the head,
too, becomes int8.
"""

import dataclasses
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jllama.cli.options import Parser
from jllama.errors import InputError, reported

if TYPE_CHECKING:
    from jllama.config import Quant
    from jllama.formats.source import Source, Tensor

DEFAULT_GROUP = {"int8": None, "int4": 128}
_BLOCK_BYTES = 64 << 20


@dataclass
class TensorError:
    """The quantisation error of a tensor, summed over its blocks."""

    name: str
    group: int
    squared: float = 0.0
    signal: float = 0.0
    largest: float = 0.0

    @property
    def relative(self) -> float:
        """Root mean squared error, relative to the root mean square of the weights."""
        return math.sqrt(self.squared / self.signal) if self.signal else 0.0


def quantised(
    source: "Source", quant: "Quant", group: int | None = None, errors: dict[str, TensorError] | None = None
) -> "Source":
    """The checkpoint with its matrices quantised when they are read. Their errors are then added to ``errors``."""
    if source.quant is not None:
        raise InputError(f"{source.path}: expected float weights, found {source.quant.format} already")
    from jllama.params import check_group

    check_group(source.config, quant, group)
    group = DEFAULT_GROUP[quant] if group is None else group

    def one(name: str, tensor: "Tensor") -> "Tensor":
        if len(tensor.shape) == 1 or (name == "embed" and not source.config.tie_embeddings):
            return tensor
        form = ("int8", None) if name == "embed" else (quant, group)  # as `jllama.params.field_format`
        return _quantised(name, tensor, *form, errors)

    return dataclasses.replace(source, tensors={name: one(name, t) for name, t in source.tensors.items()})


def _quantised(
    name: str, tensor: "Tensor", quant: "Quant", group: int | None, errors: dict[str, TensorError] | None
) -> "Tensor":
    import jax.numpy as jnp
    import numpy as np

    from jllama.device import trim_heap
    from jllama.formats.source import Integers, Quantization, Tensor
    from jllama.kernels import group_size

    width = tensor.shape[1]
    size = width if group is None else group_size(width, group)
    error = TensorError(name, size)
    if errors is not None:
        errors[name] = error
    rounded = _rounder(quant, group)

    def rows(begin: int, end: int) -> Integers:
        # Each row is quantised independently, so the result does not depend on the blocks.
        blocks = [quantised_block(*block) for block in _row_blocks(begin, end, width)]
        trim_heap()
        if len(blocks) == 1:
            return blocks[0]
        return Integers(np.concatenate([b.data for b in blocks]), np.concatenate([b.scale for b in blocks]))

    def quantised_block(begin: int, end: int) -> Integers:
        data, scale, (squared, signal, largest) = rounded(jnp.asarray(tensor.floats(begin, end)))
        error.squared += float(squared)
        error.signal += float(signal)
        error.largest = max(error.largest, float(largest))
        return Integers(np.asarray(data), np.asarray(scale))

    dtype = "float32" if size == width else "float16"
    return Tensor(tensor.shape, dtype, tensor.where, rows, Quantization(quant, None if size == width else size))


def _row_blocks(begin: int, end: int, width: int) -> list[tuple[int, int]]:
    step = max(1, _BLOCK_BYTES // (4 * width))
    return [(at, min(at + step, end)) for at in range(begin, end, step)]


def _rounder(quant: "Quant", group: int | None) -> Callable:
    """A function that quantises a block and measures its error on the device."""
    import jax
    import jax.numpy as jnp

    from jllama.kernels import QuantizedTensor, dequantize
    from jllama.params import quantizer

    @jax.jit
    def measure(w: jax.Array, q: jax.Array) -> tuple[jax.Array, ...]:
        difference = w.astype(jnp.float32) - q
        return jnp.sum(difference**2), jnp.sum(w.astype(jnp.float32) ** 2), jnp.max(jnp.abs(difference))

    def rounded(w: jax.Array) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
        q = quantizer(quant, group)(w)
        assert isinstance(q, QuantizedTensor)
        return q.data.astype(jnp.int8), q.scale, measure(w, dequantize(q))

    return rounded


def parser() -> Parser:
    """The command's flags."""
    parser = Parser(
        prog="jllama quantize",
        description="Quantise a checkpoint of any format to a native one with int8 or int4 weights.",
    )
    parser.add_argument("source", type=Path, metavar="SRC", help="checkpoint to read")
    parser.add_argument("destination", type=Path, metavar="DST", help="directory to write")
    parser.add_argument("--format", choices=tuple(DEFAULT_GROUP), default="int8", help="weight format (default: int8)")
    help_group = "number of inputs that share a scale (default: the whole row for int8, 128 for int4)"
    parser.add_argument("--group", type=int, choices=(128, 64, 32), help=help_group)
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="tokenizer (default: the checkpoint's own)")
    parser.add_argument("--force", action="store_true", help="replace DST if it exists")
    parser.add_argument("-q", "--quiet", action="store_true", help="print no progress bar and no report")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit code."""
    args = parser().parse_args(argv)
    with reported("jllama quantize"):
        from convert.progress import watched
        from jllama.formats import open_source
        from jllama.formats.native import directory, save
        from jllama.formats.replaceable import HF, check_place
        from jllama.text.tokenizer import with_tokenizer

        errors: dict[str, TensorError] = {}
        source = with_tokenizer(open_source(args.source), args.tokenizer)
        replaced = check_place(args.destination, HF, reads=[args.source], force=args.force)
        export = directory(quantised(source, args.format, args.group, errors))
        if replaced and not args.quiet:
            print(f"jllama quantize: replaces {args.destination}, {replaced}", file=sys.stderr)
        with watched(export.nbytes, "jllama quantize", quiet=args.quiet) as watch:
            save(export, args.destination, reads=[args.source], force=args.force, watch=watch)
        if not args.quiet:
            print("\n".join(report(errors)))
    return 0


def report(errors: dict[str, TensorError]) -> list[str]:
    """The lines of a table with the error of every tensor and of all tensors together."""
    width = max(map(len, errors), default=6)
    lines = [f"{'tensor':<{width}}  group  relative error  largest error"]
    lines += [f"{e.name:<{width}}  {e.group:5}  {e.relative:14.6f}  {e.largest:13.3g}" for e in errors.values()]
    total = TensorError("all", 0, *(sum(getattr(e, f) for e in errors.values()) for f in ("squared", "signal")))
    largest = max((e.largest for e in errors.values()), default=0.0)
    return [*lines, f"{'all':<{width}}         {total.relative:14.6f}  {largest:13.3g}"]


if __name__ == "__main__":
    sys.exit(main())

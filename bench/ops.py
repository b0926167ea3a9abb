"""``python -m bench.ops``: single operations at the sizes of real models, ours and other libraries' on one device.

Every implementation gets the same inputs, and its result is compared with a float32 reference before it is timed.
"""

import argparse
import sys
from pathlib import Path

from bench.compare import DTYPES, add_result_flags, integers, names, peers_of, pythons
from jllama.errors import InputError, reported

OPS = ("attention", "decode-attention", "paged-decode-attention", "ffn", "layer", "matmul", "draw")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser("python -m bench.ops", description=(__doc__ or "").split("\n")[0])
    p.add_argument(
        "--op", default="all", help=f"any of {','.join(OPS)}, or all (default); ffn:512/2048 overrides --seq for ffn"
    )
    p.add_argument("--model", default="7b", help="presets whose sizes to use: 7b,13b,70b,... (default: 7b)")
    p.add_argument(
        "--seq",
        default=None,
        help="numbers of rows, or of keys for attention (default: 512,1024,2048,4096; on a CPU 128,256); draw has its "
        "own vocabularies, or those of draw:32000/128256",
    )
    p.add_argument("--batch", default="1", help="batch sizes (default: 1)")
    p.add_argument("--dtype", default=None, help=f"any of {','.join(DTYPES)} (default: f32 on a CPU, else bf16)")
    p.add_argument("--backends", default="xla,pallas", help="our backends (default: xla,pallas)")
    p.add_argument("--peers", default="all", help="peers: names, all or none (default: all)")
    p.add_argument(
        "--peer-python", action="append", default=[], metavar="PEER=PATH", help="run a peer in another Python"
    )
    p.add_argument("--warmup", type=int, default=10, help="warm-up iterations (default: 10)")
    p.add_argument("--iterations", type=int, default=50, help="measured iterations (default: 50)")
    p.add_argument(
        "--time-limit", type=float, default=90, help="time limit in seconds for one case of one peer (default: 90)"
    )
    p.add_argument("--budget", type=float, default=None, metavar="S", help="skip the rest after S seconds")
    add_result_flags(p)
    return p


def main(argv: list[str] | None = None) -> None:
    """Run the command line; exits with 1 where one of our own backends failed."""
    with reported("bench.ops"):
        args = parser().parse_args(argv)
        args.seq = integers("--seq", args.seq) if args.seq else []
        args.op = sized(",".join(OPS) if args.op == "all" else args.op)
        args.batch = integers("--batch", args.batch)
        args.dtype = names("--dtype", args.dtype, DTYPES) if args.dtype else []
        args.backends = names("--backends", args.backends, ("xla", "pallas", "auto"))
        args.peers = peers_of(args.peers, "ops")
        args.peer_python = pythons(args.peer_python)
        for flag, value, low in (("--warmup", args.warmup, 0), ("--iterations", args.iterations, 2)):
            if value < low:
                raise InputError(f"{flag}: expected at least {low}, found {value}")
        if args.results:
            args.results = Path(args.results)
        from bench import ops_runner  # imported late, so that --help imports nothing heavy

        sys.exit(ops_runner.run(args))


def sized(text: str) -> list[tuple[str, list[int]]]:
    """Parse operations, each with its own numbers of rows or keys where they are given: ``ffn,matmul:1/2048``."""
    parts = [part.strip().partition(":") for part in text.split(",")]
    names("--op", ",".join(op for op, _, _ in parts), OPS)
    return [(op, integers("--op", sizes.replace("/", ",")) if colon else []) for op, colon, sizes in parts]


if __name__ == "__main__":
    main()

"""``python -m bench.compare``: the same model through our backends and every peer that is installed, side by side.

Every implementation runs in its own process and reads the same weights. Its greedy tokens are checked against our
reference before its speed counts. On a CPU the implementations take turns, run by run, so that other load on the
machine affects all alike. On a GPU they run one after the other, because they would share its memory.
"""

import argparse
import re
import sys
from pathlib import Path

from bench.meshes import Shape
from bench.names import OURS
from jllama.errors import InputError, reported

DEMO_S = 90  # budget of a run without arguments, which should end within two minutes on any machine
DTYPES = ("f32", "bf16", "f16", "int8", "int4")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser("python -m bench.compare", description=(__doc__ or "").split("\n")[0])
    model = p.add_mutually_exclusive_group()
    model.add_argument("--model", metavar="PATH", help="a checkpoint directory (default: the embedded demo model)")
    model.add_argument("--preset", metavar="NAME,...", help="random weights of these shapes, for example 7b")
    p.add_argument("--dtype", default=None, help=f"any of {','.join(DTYPES)} (default: f32 on a CPU, else bf16)")
    p.add_argument("--batch", default="1", help="batch sizes, for example 1,8,64 (default: 1)")
    p.add_argument("--prompt-len", default=None, help="prompt lengths in tokens, for example 128,1024 (default: 8)")
    p.add_argument("--new-tokens", type=int, default=129, help="tokens that every row generates (default: 129)")
    p.add_argument(
        "--prefill",
        default="",
        metavar="N,MxN,...",
        help="also time prefill of a prompt of N tokens, or of M such prompts at once, for example 512,2048,8x512",
    )
    p.add_argument("--context", default="", metavar="N,...", help="also decode one row up to these lengths")
    p.add_argument("--tp", metavar="N,...", help="devices that divide the model, for example 1,2,4: a run for each")
    p.add_argument("--dp", metavar="N,...", help="groups of devices that divide the rows: a run for each")
    p.add_argument("--sampled", action="store_true", help="also decode with temperature and top-p (our backends only)")
    p.add_argument(
        "--backends", default=None, help=f"ours: {','.join(OURS)} or none (default: xla, and pallas on a GPU)"
    )
    p.add_argument("--peers", default=None, help="peers: names, all or none (default: all)")
    p.add_argument(
        "--peer-python", action="append", default=[], metavar="PEER=PATH", help="run a peer in another Python"
    )
    p.add_argument("--runs", type=int, default=5, help="measured runs per workload (default: 5)")
    p.add_argument(
        "--time-limit", type=float, default=90, help="time limit in seconds for each step of a peer (default: 90)"
    )
    p.add_argument(
        "--budget",
        type=float,
        default=None,
        metavar="S",
        help=f"skip the rest after S seconds (default: {DEMO_S} for the embedded model, else no limit)",
    )
    p.add_argument("--share", type=float, default=None, metavar="S", help="the same limit for each peer alone")
    p.add_argument(
        "--wait-quiet", type=float, default=0, metavar="S", help="before each run, wait up to S seconds for idle CPUs"
    )
    orders = ("turns", "one-by-one", "warm-together")
    p.add_argument(
        "--order", choices=orders, default=None, help="order of runs (default: turns on a CPU, else one-by-one)"
    )
    p.add_argument("--cache-dir", default=None, help="folder for random weights (default: the user's cache folder)")
    p.add_argument(
        "--in-memory",
        action="store_true",
        help="make a preset's weights on the device, not on disk (ours, and peers that can: their tokens go unchecked)",
    )
    add_result_flags(p)
    p.add_argument("--list-peers", action="store_true", help="print which peers are installed, and exit")
    return p


def add_result_flags(p: argparse.ArgumentParser) -> None:
    """Add the flags that say where records and plots go."""
    p.add_argument(
        "--results",
        default=None,
        metavar="DIR",
        help="where records are appended (default: bench/results of a checkout, else bench-results)",
    )
    p.add_argument(
        "--plots", default=None, metavar="DIR", help="where plots go (default: plots/ in the results; - for none)"
    )


def main(argv: list[str] | None = None) -> None:
    """Run the command line; exits with 1 where one of our own backends failed."""
    with reported("bench.compare"):
        args = parser().parse_args(argv)
        settings = checked(args)
        from bench import entries, runner  # imported late, so that --help imports nothing heavy

        sys.exit(entries.list_peers(settings) if args.list_peers else runner.run(settings))


def checked(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments, checked, with their lists parsed."""
    if args.budget is None and not args.model and not args.preset:
        args.budget = DEMO_S
    args.batch = integers("--batch", args.batch)
    args.prompt_len = integers("--prompt-len", args.prompt_len) if args.prompt_len else []
    args.prefill = shapes("--prefill", args.prefill) if args.prefill else []
    args.context = integers("--context", args.context) if args.context else []
    if short := [c for c in args.context if c < args.new_tokens + 2]:
        raise InputError(f"--context: expected at least {args.new_tokens + 2} (the new tokens and 2), found {short[0]}")
    if args.in_memory and not args.preset:
        raise InputError("--in-memory: expected --preset, because the weights of a checkpoint are on disk")
    args.peers = peers_of(args.peers or ("none" if args.in_memory else "all"), "model")
    args.dtype = names("--dtype", args.dtype, DTYPES) if args.dtype else []
    if args.backends is not None:
        args.backends = [] if args.backends == "none" else names("--backends", args.backends, OURS)
    for flag, value, low in (("--new-tokens", args.new_tokens, 2), ("--runs", args.runs, 1)):
        if value < low:
            raise InputError(f"{flag}: expected at least {low}, found {value}")
    args.peer_python = pythons(args.peer_python)
    args.meshes = meshes(args.tp, args.dp)
    return args


def meshes(tp: str | None, dp: str | None) -> list[Shape | None]:
    """All meshes of ``--tp`` and ``--dp``, those of few devices first. Without both flags: None, the default device."""
    if tp is None and dp is None:
        return [None]
    both = [integers(flag, given or "1") for flag, given in (("--tp", tp), ("--dp", dp))]
    found: list[Shape] = sorted({Shape(t, d) for t in both[0] for d in both[1]}, key=lambda s: (s.devices, s))
    return [*found]


def peers_of(asked: str, kind: str) -> list[str]:
    """The file names of the requested peers."""
    from bench import peers

    try:
        return peers.wanted(asked, kind)
    except ValueError as error:
        raise InputError(f"--peers: {error}") from None


def pythons(given: list[str]) -> dict[str, str]:
    """The interpreter of each peer that has its own."""
    parts = [(item, *item.partition("=")) for item in given]
    if wrong := [item for item, _, equals, path in parts if not equals or not Path(path).exists()]:
        raise InputError(f"--peer-python: expected PEER=PATH with an existing path, found {wrong[0]!r}")
    return {name: path for _, name, _, path in parts}


def integers(flag: str, text: str) -> list[int]:
    """Parse numbers above zero, separated by commas."""
    parts = text.split(",")
    if not all(p.strip().isdigit() and int(p) > 0 for p in parts):
        raise InputError(f"{flag}: expected whole numbers above 0 separated by commas, found {text!r}")
    return [int(p) for p in parts]


def shapes(flag: str, text: str) -> list[tuple[int, int]]:
    """Parse prompts, separated by commas, each as its length or as ``ROWSxLENGTH``."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"([1-9]\d*x)?[1-9]\d*", part) for part in parts):
        raise InputError(f"{flag}: expected lengths as 512, or rows and lengths as 8x512, by commas, found {text!r}")
    return [(int(rows or 1), int(length)) for rows, _, length in (part.rpartition("x") for part in parts)]


def names(flag: str, text: str, known: tuple[str, ...]) -> list[str]:
    """Parse words of ``known``, separated by commas."""
    parts = [p.strip() for p in text.split(",")]
    if wrong := [p for p in parts if p not in known]:
        raise InputError(f"{flag}: expected any of {', '.join(known)}, found {wrong[0]!r}")
    return parts


if __name__ == "__main__":
    main()

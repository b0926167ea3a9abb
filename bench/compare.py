"""``python -m bench.compare``: the same model through our backends and every peer that is installed, side by side.

Every implementation runs in a process of its own and reads the same weights. Its greedy tokens are checked against
our reference before its speed counts. On a CPU the implementations take turns, run by run, so that whatever else the
machine does hits all alike; on a GPU, whose memory they would share, they run one after the other.
"""

import argparse
import sys
from pathlib import Path

from jllama.errors import InputError, reported

DEMO_S = 90  # of the run without arguments, which is to end within two minutes on any machine
DTYPES = ("f32", "bf16", "f16", "int8", "int4")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser("python -m bench.compare", description=(__doc__ or "").split("\n")[0])
    model = p.add_mutually_exclusive_group()
    model.add_argument("--model", metavar="PATH", help="a checkpoint directory (default: the embedded demo model)")
    model.add_argument("--preset", metavar="NAME,...", help="random weights of these shapes, for example 7b")
    p.add_argument("--dtype", default=None, help=f"any of {','.join(DTYPES)} (default: f32 on a CPU, else bf16)")
    p.add_argument("--batch", default="1", help="rows, for example 1,8,64 (default: 1)")
    p.add_argument("--prompt-len", default=None, help="tokens of every prompt, for example 128,1024 (default: 8)")
    p.add_argument("--new-tokens", type=int, default=129, help="tokens that every row draws (default: 129)")
    p.add_argument(
        "--prefill", default="", metavar="N,...", help="prompt lengths to time prefill at, for example 512,2048"
    )
    p.add_argument("--context", default="", metavar="N,...", help="decode one row up to these lengths, too")
    p.add_argument("--sampled", action="store_true", help="decode ours with temperature and top-p, too")
    p.add_argument("--backends", default=None, help="of ours: xla,pallas,auto (default: xla, and pallas on a GPU)")
    p.add_argument("--peers", default=None, help="names, all or none (default: all)")
    p.add_argument(
        "--peer-python", action="append", default=[], metavar="PEER=PATH", help="run a peer in another Python"
    )
    p.add_argument("--runs", type=int, default=5, help="measured runs of each (default: 5)")
    p.add_argument("--time-limit", type=float, default=90, help="seconds for any one step of a peer (default: 90)")
    p.add_argument(
        "--budget",
        type=float,
        default=None,
        metavar="S",
        help=f"skip what is left after so many seconds (default: {DEMO_S} for the embedded model, else none)",
    )
    p.add_argument("--share", type=float, default=None, metavar="S", help="likewise, for each peer alone")
    p.add_argument(
        "--wait-quiet", type=float, default=0, metavar="S", help="wait up to so long for idle CPUs, each run"
    )
    orders = ("turns", "one-by-one", "warm-together")
    p.add_argument("--order", choices=orders, default=None, help="default: turns on a CPU, else one-by-one")
    p.add_argument("--cache-dir", default=None, help="where random weights are kept (default: the user's cache folder)")
    p.add_argument(
        "--in-memory", action="store_true", help="draw a preset's weights on the device, unwritten: ours alone run them"
    )
    p.add_argument(
        "--results",
        default=None,
        metavar="DIR",
        help="where records are appended (default: bench/results of a checkout, else bench-results)",
    )
    p.add_argument(
        "--plots", default=None, metavar="DIR", help="where plots go (default: plots/ in the results; - for none)"
    )
    p.add_argument("--list-peers", action="store_true", help="say which peers are there, and leave")
    return p


def main(argv: list[str] | None = None) -> None:
    """Run the command line; exits with 1 where one of our own backends failed."""
    with reported("bench.compare"):
        args = parser().parse_args(argv)
        settings = checked(args)
        from bench import entries, runner  # after the arguments: nothing heavy for --help

        sys.exit(entries.list_peers(settings) if args.list_peers else runner.run(settings))


def checked(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments with their lists taken apart and held against what is known."""
    if args.budget is None and not args.model and not args.preset:
        args.budget = DEMO_S
    args.batch = integers("--batch", args.batch)
    args.prompt_len = integers("--prompt-len", args.prompt_len) if args.prompt_len else []
    args.prefill = integers("--prefill", args.prefill) if args.prefill else []
    args.context = integers("--context", args.context) if args.context else []
    if short := [c for c in args.context if c < args.new_tokens + 2]:
        raise InputError(f"--context: expected more than the {args.new_tokens} new tokens and 1, found {short[0]}")
    if args.in_memory and (not args.preset or args.peers not in (None, "none")):
        raise InputError("--in-memory: expected --preset and no --peers, for no peer can read what is not written")
    args.peers = peers_of(args.peers or ("none" if args.in_memory else "all"), "model")
    args.dtype = names("--dtype", args.dtype, DTYPES) if args.dtype else []
    args.backends = names("--backends", args.backends, ("xla", "pallas", "auto")) if args.backends else []
    for flag, value, low in (("--new-tokens", args.new_tokens, 2), ("--runs", args.runs, 1)):
        if value < low:
            raise InputError(f"{flag}: expected at least {low}, found {value}")
    args.peer_python = pythons(args.peer_python)
    return args


def peers_of(asked: str, kind: str) -> list[str]:
    """The files of the peers that are asked for."""
    from bench import peers

    try:
        return peers.wanted(asked, kind)
    except ValueError as error:
        raise InputError(f"--peers: {error}") from None


def pythons(given: list[str]) -> dict[str, str]:
    """Which peer runs in which interpreter."""
    parts = [(item, *item.partition("=")) for item in given]
    if wrong := [item for item, _, equals, path in parts if not equals or not Path(path).exists()]:
        raise InputError(f"--peer-python: expected PEER=PATH with an existing path, found {wrong[0]!r}")
    return {name: path for _, name, _, path in parts}


def integers(flag: str, text: str) -> list[int]:
    """Numbers above zero, separated by commas."""
    parts = text.split(",")
    if not all(p.strip().isdigit() and int(p) > 0 for p in parts):
        raise InputError(f"{flag}: expected whole numbers above 0 separated by commas, found {text!r}")
    return [int(p) for p in parts]


def names(flag: str, text: str, known: tuple[str, ...]) -> list[str]:
    """Known words, separated by commas."""
    parts = [p.strip() for p in text.split(",")]
    if wrong := [p for p in parts if p not in known]:
        raise InputError(f"{flag}: expected any of {', '.join(known)}, found {wrong[0]!r}")
    return parts


if __name__ == "__main__":
    main()

"""``jllama serve``: an HTTP server with OpenAI's API."""

import argparse
import ipaddress
import os
import sys
from typing import TYPE_CHECKING

from jllama.cli.options import Parser, add_model_flags, add_process_flags
from jllama.errors import InputError, reported

if TYPE_CHECKING:
    from jllama.cli.processes import Channel
    from jllama.cli.runtime import Opened
    from jllama.engine.engine import Engine

KEY = "JLLAMA_API_KEY"
EPILOG = f"""\
environment:
  {KEY}  the API key, where --api-key is not given: arguments of a process can be seen by others

A signal (Ctrl-C, SIGTERM) lets running requests finish; a second one ends the server at once.
"""


def parser() -> Parser:
    """The command's flags."""
    parser = Parser(
        prog="jllama serve",
        description="Serve a model over HTTP, with OpenAI's API.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group = parser.add_argument_group("network")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    group.add_argument("--port", type=int, default=8000, metavar="N", help="port; 0: any free one (default: 8000)")
    help_host = "name by which clients may address the server, beside addresses and localhost; may be repeated; *: any "
    help_host += "(default: none where it listens on a loopback address, else any)"
    group.add_argument("--allow-host", action="append", default=[], metavar="NAME", help=help_host)
    help_origin = "let web pages of this origin ask (CORS); may be repeated (default: none)"
    group.add_argument("--allow-origin", action="append", default=[], metavar="ORIGIN", help=help_origin)
    group = parser.add_argument_group("access")
    help_key = f"requests must carry this key; may be repeated, each is a tenant (default: {KEY}, else open to all)"
    group.add_argument("--api-key", action="append", default=[], metavar="KEY", help=help_key)
    group.add_argument("--no-access-log", action="store_true", help="print no JSON line for each request on stdout")
    group = parser.add_argument_group("engine")
    help_slots = "texts drawn at a time (default: 16 on a CPU, else 64)"
    group.add_argument("--slots", type=int, metavar="N", help=help_slots)
    help_queue = "texts that may wait for a slot; more are refused with 429 (default: 1024)"
    group.add_argument("--max-queue", type=int, default=1024, metavar="N", help=help_queue)
    help_pages = "pages of 64 tokens in the cache (default: as many as fit)"
    group.add_argument("--pages", type=int, metavar="N", help=help_pages)
    help_memory = "part of the device's free memory for the cache (default: 0.9)"
    group.add_argument("--memory", type=float, default=0.9, metavar="PART", help=help_memory)
    help_budget = "tokens of prompts fed at a time beside texts that are drawn; fewer: shorter pauses in these, but "
    help_budget += "slots fill more slowly (default: 512 on a CPU, else 4096)"
    group.add_argument("--budget", type=int, metavar="N", help=help_budget)
    help_interval = "where many streams share the server, each holds new text for half to all of this time after it "
    help_interval += "has sent some, so that the event loop does not delay the engine; with few streams, for less; 0: "
    help_interval += "each sends after every turn (default: 0.05)"
    group.add_argument("--stream-interval", type=float, default=0.05, metavar="SECONDS", help=help_interval)
    help_warm = "compile each program when a request first needs it, not before the server is ready"
    group.add_argument("--no-warm-up", action="store_true", help=help_warm)
    group = add_model_flags(parser)
    help_template = "llama-2, plain, or the file of a jinja template (default: the model's own)"
    group.add_argument("--chat-template", metavar="FORMAT", help=help_template)
    help_name = "name of the model for clients; may be repeated (default: the checkpoint's)"
    group.add_argument("--served-model-name", action="append", default=[], metavar="NAME", help=help_name)
    parser.add_argument("-q", "--quiet", action="store_true", help="print only errors and the ready line on stderr")
    add_process_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit code."""
    args = parser().parse_args(argv)
    with reported("jllama serve"):
        return run(args, check(args))
    return 0


def check(args: argparse.Namespace) -> tuple[str, ...]:
    """Raise `InputError` for flags that cannot be meant, before anything is loaded. Returns the keys."""
    for name, least in (("slots", 1), ("max_queue", 0), ("budget", 1)):
        if (found := getattr(args, name)) is not None and found < least:
            raise InputError(f"--{name.replace('_', '-')}: expected at least {least}, found {found}")
    if not 0 <= args.port < 2**16:
        raise InputError(f"--port: expected 0 to 65535, found {args.port}")
    if not 0 <= args.stream_interval <= 10:
        raise InputError(f"--stream-interval: expected 0 to 10 seconds, found {args.stream_interval:g}")
    keys = tuple(args.api_key or ([os.environ[KEY]] if KEY in os.environ else []))
    for key in keys:
        if not key.strip() or key != key.strip() or not key.isascii() or not key.isprintable():
            raise InputError(f"--api-key ({KEY}): expected printable ASCII without spaces around, found other")
    for origin in args.allow_origin:
        if origin != "*" and "://" not in origin:
            raise InputError(f"--allow-origin: expected an origin such as https://example.com, found {origin!r}")
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise InputError(f"serve: needs the package {error.name} (pip install 'jllama[serve]')") from None
    return keys


def hosts(host: str, allowed: list[str], *, local: bool) -> tuple[str, ...]:
    """The host names that a server on ``host`` accepts in requests, or nothing where it accepts every name.

    A ``local`` server is reached from this machine only. So it accepts ``host`` and the names that were ``allowed``,
    for example the name that a proxy passes on."""
    return tuple(dict.fromkeys((host, *allowed))) if local or allowed else ()


def run(args: argparse.Namespace, keys: tuple[str, ...]) -> int:
    """Load the model, compile, and serve; or run a part of the model for the process that serves."""
    from jllama.cli.processes import together
    from jllama.cli.runtime import as_input_error

    code = 0

    def go() -> None:
        nonlocal code
        code = _run(args, keys, channel)

    with together(args) as channel:
        as_input_error(go)
        if channel is not None and code:  # jax would wait for the others, which wait for this process
            channel.leave(code, "")
    return code


def _run(args: argparse.Namespace, keys: tuple[str, ...], channel: "Channel | None") -> int:
    import jax

    from jllama.cli.runtime import device_line
    from jllama.serve.server import bind, say
    from jllama.serve.settings import Settings
    from jllama.serve.start import compile_ahead, follow
    from jllama.serve.start import run as serve

    if channel is not None and jax.process_index() > 0:
        opened, engine = _engine(args)
        if not args.no_warm_up:
            compile_ahead(engine, progress=False)
        follow(opened.lm, engine, channel.hear)
        return 0
    with bind(args.host, args.port) as bound:
        local = ipaddress.ip_address(bound.getsockname()[0]).is_loopback
        opened, engine = _engine(args)
        lm, path = opened.lm, opened.source.path
        name = path.stem if path.is_file() else path.name
        settings = Settings(
            names=tuple(args.served_model_name) or (name,),
            api_keys=keys,
            hosts=hosts(args.host, args.allow_host, local=local),
            origins=tuple(args.allow_origin),
            queue=args.max_queue,
            access_log=not args.no_access_log,
            stream_interval=args.stream_interval,
        )
        slots = engine.slots
        if not args.quiet:
            pages, what = engine.statistics.pages, device_line(args.backend, lm.params)
            say(f"{settings.names[0]}, {what}, context {lm.max_len:,} tokens, {slots} slots, {pages:,} pages")
            if lm.chat_format.note:
                say(lm.chat_format.note)
            if not keys and not local:
                say(f"no API key is set, and {args.host} can be reached from other machines")
        if not args.no_warm_up:
            if not args.quiet:
                say("compiles all programs ahead")
            compile_ahead(engine, progress=not args.quiet and sys.stderr.isatty())
        return serve(lm, engine, settings, bound, slots=slots, tell=None if channel is None else channel.tell)


def _engine(args: argparse.Namespace) -> "tuple[Opened, Engine]":
    from jllama.cli.runtime import open_model
    from jllama.engine.engine import Engine
    from jllama.text.lm import default_slots

    opened = open_model(args, quiet=args.quiet)
    lm = opened.lm
    slots = default_slots() if args.slots is None else args.slots
    engine = Engine(
        lm.params,
        slots=slots,
        pages=args.pages,
        memory=args.memory,
        max_len=lm.max_len,
        budget=args.budget,
        backend=lm.backend,
    )
    return opened, engine


if __name__ == "__main__":
    sys.exit(main())

"""``python -m bench.engine``: `jllama.Engine` with all its slots in use, and how long the device waits for the host.

For each number of slots it records the tokens per second of a run of many prompts. Then it measures steady decode, in
which every slot draws: the time of a step, and from a trace the share of time in which the device is busy, and the time
by kernel. It does so twice: while no request waits, and while others wait, where a launch has fewer steps. With
``--prefill`` it also measures the time to the first token of prompts on the idle engine, and its time by kernel.
"""

import argparse
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.compare import DTYPES, integers, names, shapes
from bench.record import RESULTS, Record, Run, append, start_run
from jllama.errors import InputError, reported

if TYPE_CHECKING:
    from jllama.engine.engine import Engine
    from jllama.engine.tuning import Tuning

# Without it, XLA launches operations one by one while it profiles, and a trace shows gaps that a run does not have.
GRAPHS = "--xla_enable_command_buffers_during_profiling=true"
Prompts = Callable[[int], list[list[int]]]  # so many new ones


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser("python -m bench.engine", description=(__doc__ or "").split("\n")[0])
    model = p.add_mutually_exclusive_group()
    model.add_argument("--model", metavar="PATH", help="a checkpoint (default: the embedded demo model)")
    model.add_argument("--preset", metavar="NAME", help="random weights of this shape, for example 7b")
    p.add_argument("--dtype", help=f"any of {','.join(DTYPES)} (default: f32 on a CPU, else bf16)")
    p.add_argument("--slots", default="4", help="numbers of slots, for example 8,64,256 (default: 4)")
    p.add_argument("--requests", type=int, default=4, help="prompts of a run, for each slot (default: 4)")
    p.add_argument("--prompt-len", type=int, default=16, help="tokens of a prompt (default: 16)")
    p.add_argument("--new-tokens", type=int, default=16, help="new tokens for each prompt of a run (default: 16)")
    p.add_argument("--turns", type=int, default=3, help="timed turns, and as many traced ones (default: 3)")
    p.add_argument("--runs", type=int, default=3, help="runs (default: 3)")
    p.add_argument(
        "--prefill",
        default="",
        metavar="N,MxN,...",
        help="also prefill prompts of these shapes, for example 2048,8x512",
    )
    p.add_argument("--budget", type=int, help="tokens of prompts that a turn feeds (default: the engine's)")
    p.add_argument("--backend", default="auto", choices=("auto", "xla", "pallas"), help="default: auto")
    p.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where records are appended")
    return p


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    with reported("bench.engine"):
        args = parser().parse_args(argv)
        args.slots = integers("--slots", args.slots)
        args.prefill = shapes("--prefill", args.prefill) if args.prefill else []
        args.dtype = names("--dtype", args.dtype, DTYPES)[0] if args.dtype else None
        for flag in ("requests", "prompt_len", "new_tokens", "turns", "runs"):
            if getattr(args, flag) < 1:
                raise InputError(f"--{flag.replace('_', '-')}: expected at least 1, found {getattr(args, flag)}")
        if "jax" not in sys.modules:
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {GRAPHS}"
        run(args)


def run(args: argparse.Namespace) -> None:
    """Measure every number of slots; append the records, and print them."""
    import jax
    import numpy as np

    from bench.peers.ours import Ours
    from bench.workloads import DRAWN, SEED
    from jllama.demo_model import DEMO

    dtype = args.dtype or ("f32" if jax.devices()[0].platform == "cpu" else "bf16")
    model = DRAWN + args.preset if args.preset else args.model or str(DEMO)
    room = args.prompt_len + args.new_tokens
    ours = Ours({"model": model, "dtype": dtype, "backend": args.backend, "rooms": {"1": room}})
    params, hello, random = ours.params, ours.hello(), np.random.default_rng(SEED)
    assert params is not None
    vocab_size = params.config.vocab_size
    started = start_run(hello["device"], hello["versions"], {})

    def prompts(count: int) -> list[list[int]]:
        return random.integers(3, vocab_size, (count, args.prompt_len)).tolist()

    name = args.preset or Path(model).name
    shared = dict(impl=args.backend, model=name, dtype={"int4": "int4-g128"}.get(dtype, dtype), seq=args.prompt_len)
    for slots in args.slots:
        records = [shared | r for r in measured(params, slots, prompts, args)]
        made = [recorded(started, r) for r in records]
        append(args.results / "engine.jsonl", made)
        for record in made:
            print(f"{slots:4} slots  {line(record)}", flush=True)


def measured(params: Any, slots: int, prompts: Prompts, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The record fields of everything that is measured with one number of slots."""
    from bench.prefills import prefills
    from bench.trace import per
    from jllama import Engine
    from jllama.device import default_device
    from jllama.engine.tuning import tuning_for
    from jllama.paged import pages_for

    tuning = dataclasses.replace(tuning_for(default_device()), rows=(slots,))  # one program, whatever number draws
    budget = args.budget or tuning_for(default_device()).budget
    filling = steps_to_fill(slots, args.prompt_len, budget, tuning)
    _, waiting, alone = tuning.steps
    longest = args.prompt_len + max(args.new_tokens, waiting * filling + alone * (2 * args.turns + 4))
    longest = max(longest, *(length + 1 for _, length in args.prefill), 0)
    if longest > (context := params.config.max_seq_len):
        flags = "--slots, --prompt-len, --new-tokens, --turns, --prefill"
        raise InputError(f"{flags}: expected requests of at most {context} tokens (the context), found {longest}")
    pages = max(slots, *(rows for rows, _ in args.prefill), 0) * (pages_for(longest) + 1)
    sizes: dict[str, Any] = dict(slots=slots, pages=pages, max_len=longest, budget=budget)
    engine = Engine(params, tuning=tuning, backend=args.backend, **sizes)
    fields: dict[str, Any] = {"batch": slots, "budget": budget}
    many = {"requests": args.requests * slots, "context": args.prompt_len + args.new_tokens}
    complete(engine, prompts(many["requests"]), alone + 1)  # compiles
    rates = [complete(engine, prompts(many["requests"]), args.new_tokens) for _ in range(args.runs)]
    choices = {p: {op: [c.impl, c.why] for op, c in ops.items()} for p, ops in engine.backends.items()}
    made = [fields | many | {"case": "engine-run", "metric": "tokens_per_s", "samples": rates, "choices": choices}]
    for case, others, steps in (("engine-step", 0, alone), ("engine-step-waiting", slots, waiting)):
        samples, found = steady(engine, prompts(slots + others), longest - args.prompt_len, filling, args.turns)
        of_step = fields | {"case": case, "context": longest, "steps_a_launch": steps}
        made.append(of_step | {"metric": "ms", "samples": samples})
        trace = {"samples": [], "why": "only a GPU's operations are traced"} if found is None else of_trace(found)
        made.append(of_step | {"metric": "busy_share", **trace})
        made.append(of_step | {"case": f"{case}-kernels"} | per(found, steps * args.turns))
    return [*made, *prefills(engine, args.prefill, prompts(1)[0], args.runs, args.backend)]


def steps_to_fill(slots: int, prompt_len: int, budget: int, tuning: "Tuning") -> int:
    """After how many steps of the engine all slots draw. A turn in which prompts end has two results, and each is read
    by a step: first tokens, then those of its decode steps."""
    pieces, first = slots * -(-prompt_len // tuning.piece), max(budget, tuning.alone) // tuning.piece
    turns = 1 - (-max(0, pieces - first) // (budget // tuning.piece))
    return 2 * turns + 1


def complete(engine: "Engine", prompts: Sequence[Sequence[int]], new_tokens: int) -> float:
    """New tokens per second of a whole run."""
    begin = time.perf_counter()
    done = engine.generate(prompts, max_new_tokens=new_tokens, stop_ids=())
    return sum(len(completion.ids) for completion in done) / (time.perf_counter() - begin)


def steady(
    engine: "Engine", prompts: Sequence[Sequence[int]], new_tokens: int, filling: int, turns: int
) -> tuple[list[float], Any]:
    """Milliseconds of a step in each turn in which all slots draw, and what a trace of as many turns finds. Prompts
    beyond the slots wait."""
    from bench.trace import traced
    from jllama.engine.request import Request

    handles = engine.submit_all([Request(prompt, new_tokens, stop_ids=()) for prompt in prompts])
    try:
        for _ in range(filling):
            engine.step()
        samples = []
        for turn in range(turns + 1):
            before, begin = engine.statistics, time.perf_counter()
            drawing = len({event.handle for event in engine.step()})
            spent, steps = time.perf_counter() - begin, engine.statistics.decode_steps - before.decode_steps
            assert drawing == engine.slots, f"{drawing} of {engine.slots} slots draw"
            samples += [1e3 * spent / steps] if turn else []  # the first turn may read a smaller launch
        settle(engine)

        def launch() -> bool:
            for _ in range(turns):
                engine.step()
            settle(engine)
            return True

        return samples, traced(launch)  # all of these launches, and nothing of one before
    finally:
        for handle in handles:
            engine.abort(handle)
        engine.step()


def settle(engine: "Engine") -> None:
    """Read what has been launched, so that the device is idle."""
    engine.pause()
    engine.step()
    engine.resume()


def of_trace(found: Any) -> dict[str, Any]:
    """What a record says of a trace."""
    return {"samples": [found.share], **{k: v for k, v in dataclasses.asdict(found).items() if k != "share"}}


def recorded(run: Run, fields: dict[str, Any]) -> Record:
    """A record; its value is the median of the samples."""
    value = statistics.median(fields["samples"]) if fields["samples"] else None
    return run.record(suite="load", floor=None, value=value, **fields)


def line(record: Record) -> str:
    """One figure, for the terminal."""
    case, value = f"{record['case']:20}", record["value"]
    if record["metric"] == "tokens_per_s":
        shape = f", {record['batch']} x {record['seq']}" if "seconds" in record else ""
        return f"{case} {value:10,.0f} tokens/s{shape}"
    if record["metric"] == "ms" and value is not None:
        more = f", {record['steps_a_launch']} steps a launch" if "steps_a_launch" in record else ""
        by_kernel = "; ".join(f"{name} {ms:.3f}" for name, ms in record.get("kernels_ms", {}).items())
        return f"{case} {value:10.3f} ms a step{more}" + (f": {by_kernel}" if by_kernel else "")
    if value is None and record["metric"] == "ms":
        return f"{case} {'-':>10} ms by kernel: {record['why']}"
    if value is None:
        return f"{case} {'-':>10} device idle: {record['why']}"
    return f"{case} {100 * (1 - value):10.2f} % device idle, longest gaps {record['gaps_us'][:3]} us"


if __name__ == "__main__":
    main()

"""``python -m bench.two_trees OTHER``: this tree and another one measured in turns, in one run on one device.

For each weight format there is one worker process per tree. It loads random weights of a preset, compiles, and waits.
Then both measure in turns, so that a device that becomes warmer or slower affects both trees alike. The formats follow
one another, so a device need only hold two models. Every format's records are written as soon as they are complete.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.record import RESULTS, Record, append, package_versions, start_run
from jllama.errors import reported

PROMPT, NEW_TOKENS = 128, 129
# This program runs in each tree. It uses only names that both trees have. A decode's time is that of a whole `generate`
# less that of its first token.
WORKER = """
import json, statistics, sys, time
import jax, jax.numpy as jnp, numpy as np
import jllama

job = json.loads(sys.argv[1])
config = jllama.preset(job["preset"])
params = jllama.init(config, jax.random.key(0), dtype=jnp.bfloat16, quant=job["quant"], stacked=True)
jax.block_until_ready(params)
random = np.random.default_rng(0)
generate = jllama.generate
if not hasattr(jllama.decode, "_jit_generate"):  # an older tree, which would compile at every call
    generate = jax.jit(generate, static_argnames=("max_new_tokens", "stop_ids", "backend"))


def seconds(batch, length, new_tokens):
    prompts = jnp.asarray(random.integers(3, config.vocab_size, (batch, length)), jnp.int32)
    begin = time.perf_counter()
    made = generate(params, prompts, max_new_tokens=new_tokens, stop_ids=(), backend=job["backend"])
    jax.block_until_ready(made.tokens)
    return time.perf_counter() - begin


def measure():
    found = {}
    for batch in job["batches"]:
        first, whole = (
            statistics.median(seconds(batch, job["prompt"], new) for _ in range(3)) for new in (1, job["new_tokens"])
        )
        found[f"decode batch {batch}"] = batch * (job["new_tokens"] - 1) / (whole - first)
    for length in job["prefill"]:
        found[f"prefill {length}"] = length / statistics.median(seconds(1, length, 1) for _ in range(5))
    return found


measure()
print(json.dumps({"device": jax.devices()[0].device_kind}), flush=True)
for line in sys.stdin:
    print(json.dumps(measure()), flush=True)
"""


@dataclass
class Worker:
    """A process that measures one format of weights in one tree."""

    tree: Path
    quant: str
    process: subprocess.Popen[str]

    def answer(self) -> dict[str, Any]:
        """The worker's next line, decoded."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"bench.two_trees: the worker of {self.tree}, {self.quant} ended with an error, see above")
        return json.loads(line)

    def measure(self) -> dict[str, float]:
        """Run one turn of measurements."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.answer()


def start(tree: Path, quant: str, job: dict[str, Any]) -> Worker:
    """Start a worker. Its first line comes when it has compiled everything."""
    path = os.pathsep.join(filter(None, (str(tree), os.environ.get("PYTHONPATH"))))  # packages may lie on it
    environment = {**os.environ, "PYTHONPATH": path, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = [sys.executable, "-c", WORKER, json.dumps(job | {"quant": quant})]
    process = subprocess.Popen(
        command, cwd=tree, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    return Worker(tree, quant, process)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser("python -m bench.two_trees", description=(__doc__ or "").split("\n")[0])
    p.add_argument("other", type=Path, metavar="OTHER", help="the folder of another checkout")
    p.add_argument("--commit", required=True, metavar="NAME", help="the commit that OTHER holds, for the records")
    p.add_argument("--preset", default="7b", help="the shape of the model (default: 7b)")
    p.add_argument("--quant", default="none,int8,int4", help="formats of the weights (default: none,int8,int4)")
    p.add_argument("--batch", default="1,8", help="batch sizes of decode (default: 1,8)")
    p.add_argument("--prefill", default="512,2048", help="prompt lengths of prefill (default: 512,2048)")
    p.add_argument("--backend", default="pallas", help="default: pallas")
    p.add_argument("--turns", type=int, default=3, help="turns of every worker (default: 3)")
    p.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where records are appended")
    return p


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    with reported("bench.two_trees"):
        run(parser().parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Measure both trees, print the ratios, and append the records."""
    job = {
        "preset": args.preset,
        "backend": args.backend,
        "prompt": PROMPT,
        "new_tokens": NEW_TOKENS,
        "batches": [int(n) for n in args.batch.split(",")],
        "prefill": [int(n) for n in args.prefill.split(",") if n],
    }
    for quant in args.quant.split(","):
        one_format(args, quant, job)


def one_format(args: argparse.Namespace, quant: str, job: dict[str, Any]) -> None:
    """Measure both trees with weights of one format."""
    here = Path(__file__).resolve().parents[1]
    began = time.perf_counter()
    workers = [start(tree, quant, job) for tree in (here, args.other.resolve())]
    try:
        ready = [worker.answer() for worker in workers]
        print(f"{quant}: ready after {time.perf_counter() - began:.0f} s", flush=True)
        samples: list[dict[str, list[float]]] = [{}, {}]
        for turn in range(args.turns):
            for i in (0, 1) if turn % 2 == 0 else (1, 0):
                for name, value in workers[i].measure().items():
                    samples[i].setdefault(name, []).append(value)
    finally:
        for worker in workers:
            worker.process.kill()
    for line in compared(quant, *samples):
        print(line, flush=True)
    versions = package_versions(("jax", "jaxlib", "numpy", "jax-cuda13-plugin"))
    run = start_run(ready[0]["device"], versions, {})
    fields = [
        record_fields(args.preset, quant, name, values, commit)
        for commit, found in zip((run.commit, args.commit), samples, strict=True)
        for name, values in found.items()
    ]
    append(args.results / "two-trees.jsonl", [run.record(**f) | {"commit": f["of"]} for f in fields])


def record_fields(preset: str, quant: str, name: str, values: list[float], commit: str) -> Record:
    """The record fields of one figure."""
    kind, *_, size = name.split()
    return {
        "suite": "compare",
        "case": f"two-trees-{kind}",
        "impl": "pallas",
        "model": preset,
        "dtype": {"none": "bf16", "int4": "int4-g128"}.get(quant, quant),
        "batch": int(size) if kind == "decode" else 1,
        "seq": PROMPT if kind == "decode" else int(size),
        "context": PROMPT + NEW_TOKENS if kind == "decode" else int(size),
        "metric": "tokens_per_s",
        "value": statistics.median(values),
        "samples": values,
        "floor": None,
        "of": commit,
    }


def compared(quant: str, ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> Iterator[str]:
    """One line per figure: this tree, the other, and the ratio of the medians."""
    for name, values in ours.items():
        a, b = statistics.median(values), statistics.median(theirs[name])
        yield f"{quant:5} {name:16} {a:10.1f} {b:10.1f} tokens/s  {a / b:.3f}"


if __name__ == "__main__":
    main()

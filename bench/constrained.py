"""The engine's rate with a constraint on every row, beside the same engine's without one, in turns.

``python -m bench.constrained --shape llama-2-7b --rows 32``: random weights of a preset's shape with SmolLM2's
vocabulary, or that of ``--tokenizer``; without ``--shape``, SmolLM2 itself. Prints one JSON object.
"""

import argparse
import dataclasses
import json
import statistics

import jax
import jax.numpy as jnp

import jllama
from jllama import Engine, SamplingSettings
from jllama.compilation import enable_cache
from jllama.device import default_device
from jllama.engine.constraint import Constraint
from jllama.engine.tuning import tuning_for
from jllama.formats import open_source
from jllama.params import Params
from jllama.text.grammars import Grammars
from jllama.text.tokenizer import Tokenizer, load_tokenizer, tokenizer_for

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": PERSON, "minItems": 1000}  # no row ends before its limit
PROMPT = "People as JSON: "


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", help="a preset of jllama, with random weights")
    parser.add_argument("--tokenizer", metavar="PATH", help="with --shape: a tokenizer's file or folder")
    parser.add_argument("--compilation-cache", metavar="DIR", help="keep compiled programs there")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    if args.tokenizer and not args.shape:
        parser.error("--tokenizer: expected --shape with it")
    if args.compilation_cache:
        enable_cache(args.compilation_cache)
    params, tokenizer = model(args)
    prompt = tokenizer.encode(PROMPT)
    one_size = dataclasses.replace(tuning_for(default_device()), rows=(args.rows,), pieces=(args.rows,))
    sizes = dict(slots=args.rows, max_len=len(prompt) + args.tokens, budget=args.rows * one_size.piece)
    engine = Engine(params, **sizes, tuning=one_size)  # all rows begin in one turn
    engine.warm_up(("plain",), constraints=True, scores=False)
    grammars = Grammars(tokenizer, params.config.vocab_size, params.config.eos_ids)
    constraint = grammars.compile("json_schema", SCHEMA)
    rates: dict[str, list[float]] = {"free": [], "constrained": []}
    for turn in range(args.repeat + 1):  # the first compiles
        for name, of in (("free", None), ("constrained", constraint)):
            rate = measured(engine, prompt, args, of)
            if turn:
                rates[name].append(rate)
    free, bound = (statistics.median(rates[name]) for name in ("free", "constrained"))
    shape = args.shape or "smollm2"
    found = dict(shape=shape, rows=args.rows, ratio=round(bound / free, 3), tokens_per_s=rates, params=size(params))
    print(json.dumps(found | {"device": jax.devices()[0].device_kind}))


def model(args: argparse.Namespace) -> tuple[Params, Tokenizer]:
    """The weights and the tokenizer."""
    if args.tokenizer:
        tokenizer = load_tokenizer(args.tokenizer)
        vocab, ends = tokenizer.n_ids, (tokenizer.eos_id,)
    else:
        source = open_source("smollm2")
        if not args.shape:
            return jllama.load(source), tokenizer_for(source)
        tokenizer, vocab, ends = tokenizer_for(source), source.config.vocab_size, source.config.eos_ids
    config = jllama.preset(args.shape).replace(vocab_size=vocab, eos_ids=ends)
    dtype = jnp.float32 if default_device().platform == "cpu" else jnp.bfloat16
    return jllama.init(config, jax.random.key(0), dtype=dtype, stacked=True), tokenizer


def measured(engine: Engine, prompt: list[int], args: argparse.Namespace, constraint: Constraint | None) -> float:
    """New tokens a second."""
    before = engine.statistics
    how = SamplingSettings(temperature=1.0, seed=1)
    stop_ids = () if constraint is None else None
    engine.generate(
        [prompt] * args.rows, max_new_tokens=args.tokens, sampling=how, stop_ids=stop_ids, constraint=constraint
    )
    after = engine.statistics
    return (after.new_tokens - before.new_tokens) / (after.seconds - before.seconds)


def size(params: Params) -> int:
    """Numbers in the weights."""
    return sum(a.size for a in jax.tree.leaves(params))


if __name__ == "__main__":
    main()

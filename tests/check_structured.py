"""All constraints of `tests/support/shapes.py` with SmolLM2 at temperature 1, 16 at a time in one engine:
``PYTHONPATH=tests/support python tests/check_structured.py``. Prints each text that does not hold its constraint, then
figures as one line of JSON."""

import json
import sys
import time

import jsonschema
from shapes import shapes

from jllama import LM, Completion, Engine, Request, SamplingSettings
from jllama.text.complete import complete_many
from jllama.text.grammars import Grammars

PROMPT = "Here is an example of the value:\n"
MAX_NEW_TOKENS = 200


def main() -> int:
    """Run all."""
    lm, made = LM.load("smollm2"), shapes()
    config, prompt = lm.params.config, lm.tokenizer.encode(PROMPT)
    grammars = Grammars(lm.tokenizer, config.vocab_size, config.eos_ids)
    engine = Engine(lm.params, slots=16, max_len=256)
    done = [Completion(prompt) for _ in made]
    requests = [
        Request(
            prompt,
            MAX_NEW_TOKENS,
            SamplingSettings(1.0, seed=i),
            constraint=grammars.compile(shape.kind, shape.value),  # pyright: ignore[reportArgumentType]
        )
        for i, shape in enumerate(made)
    ]
    begin = time.perf_counter()
    for _ in complete_many(engine, lm.tokenizer, done, requests, stop=[()] * len(made)):
        pass
    seconds = time.perf_counter() - begin
    broken = 0
    for shape, completion in zip(made, done, strict=True):
        try:
            shape.check(completion.text)
        except (AssertionError, ValueError, jsonschema.ValidationError) as error:
            broken += 1
            print(f"{shape}: {completion.text!r}: {type(error).__name__}", file=sys.stderr)
    reasons = {reason: sum(c.finish_reason == reason for c in done) for reason in ("stop", "length", "dead_end")}
    figures = dict(constraints=len(made), broken=broken, tokens=sum(len(c.ids) for c in done), seconds=round(seconds))
    print(json.dumps(figures | reasons))
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())

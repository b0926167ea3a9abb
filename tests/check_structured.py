"""All constraints of `tests/support/shapes.py` with SmolLM2 at temperature 1: ``PYTHONPATH=tests/support python
tests/check_structured.py``. Prints each text that does not hold its constraint, then figures as one line of JSON."""

import json
import sys
import time

import jsonschema
from shapes import shapes

from jllama import LM

PROMPT = "Here is an example of the value:\n"
MAX_NEW_TOKENS = 160


def main() -> int:
    """Run all in one engine, many at a time."""
    lm, made, broken, cut, tokens = LM.load("smollm2", max_len=512), shapes(), 0, 0, 0
    begin = time.perf_counter()
    for at, shape in enumerate(made):
        how = {shape.kind: shape.value} if shape.kind != "choice" else {"regex": "|".join(map(escaped, shape.value))}
        out = lm.generate(PROMPT, temperature=1.0, seed=at, max_new_tokens=MAX_NEW_TOKENS, slots=1, **how)
        tokens += len(out.ids)
        cut += out.finish_reason == "length"
        try:
            shape.check(out.text)
        except (AssertionError, ValueError, jsonschema.ValidationError) as error:
            broken += 1
            print(f"{shape}: {out.text!r} ({out.finish_reason}): {type(error).__name__}", file=sys.stderr)
    seconds = round(time.perf_counter() - begin, 1)
    print(json.dumps(dict(constraints=len(made), broken=broken, cut=cut, tokens=tokens, seconds=seconds)))
    return int(broken > 0)


def escaped(text: str) -> str:
    """A text as an expression."""
    return "".join(f"\\{letter}" if letter in r".+*?()|[]{}^$\\" else letter for letter in text)


if __name__ == "__main__":
    sys.exit(main())

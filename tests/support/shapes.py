"""Constraints of many shapes, after those of the JSON-Schema test suite, whose texts are bounded."""

import json
import random
import re
from dataclasses import dataclass
from typing import Any

import jsonschema

WORDS = ("red", "green", "a b", 'q"t', "é", "日本", "", "x/y", "null", "Tom")


@dataclass(frozen=True)
class Shape:
    """A constraint: its kind and value as `jllama.text.grammars.Grammars.compile` takes them."""

    kind: str
    value: Any

    def check(self, text: str) -> None:
        """Raise unless a text is one of the constraint."""
        if self.kind == "json_schema":
            formats = jsonschema.FormatChecker(("date", "ipv4", "uuid"))
            validator = jsonschema.Draft202012Validator(self.value, format_checker=formats)
            validator.validate(json.loads(text))
        elif self.kind == "regex":
            assert re.fullmatch(self.value, text, re.DOTALL), (self.value, text)
        elif self.kind == "choice":
            assert text in self.value, (self.value, text)


def shapes(count: int = 200) -> list[Shape]:
    """The same every time: three schemas for each expression and each fifth list of choices."""
    rng = random.Random(7)
    made: list[Shape] = []
    while len(made) < count:
        n = len(made)
        if n % 5 == 4:
            made.append(Shape("choice", rng.sample(WORDS[:6], 3)) if n % 25 == 24 else Shape("regex", regex(rng)))
        else:
            made.append(Shape("json_schema", ROOTS[n % len(ROOTS)](rng, 2)))
    return made


def regex(rng: random.Random, depth: int = 2) -> str:
    """A regular expression in the common part of Python's and Rust's."""
    kind = rng.randrange(7 if depth else 4)
    if kind == 0:
        return rng.choice(("cat", "do", "42", "é", r"\.", r"\$", " "))
    if kind == 1:
        return rng.choice(("[a-z]", "[A-Z0-9]", "[^a-z\\x00-\\x1f]", "[0-9]", "[aeiou]")) + rng.choice(
            ("", "{2}", "{1,4}")
        )
    if kind == 2:
        return rng.choice((r"[0-9]{4}-[0-9]{2}", r"#[0-9a-f]{6}", r"[a-z]{1,8}@[a-z]{1,8}\.com", r"-?[1-9][0-9]{0,3}"))
    if kind == 3:
        return rng.choice(("[abc]?", "(yes|no)", "x{0,3}"))
    if kind == 4:
        return f"({regex(rng, depth - 1)}|{regex(rng, depth - 1)})"
    if kind == 5:
        return f"({regex(rng, depth - 1)}){{1,3}}"
    return regex(rng, depth - 1) + regex(rng, depth - 1)


def any_schema(rng: random.Random, depth: int) -> dict[str, Any]:
    """One of the shapes below; a leaf at depth 0."""
    return rng.choice(KINDS if depth > 0 else LEAVES)(rng, depth)


def string(rng: random.Random, _: int) -> dict[str, Any]:
    low = rng.randrange(4)
    return {"type": "string", "minLength": low, "maxLength": low + rng.randrange(8)}


def pattern(rng: random.Random, _: int) -> dict[str, Any]:
    return {
        "type": "string",
        "pattern": "^" + rng.choice(("[a-z]{1,6}", "[0-9]{3}-[0-9]{2}", "(on|off)", "x{2,4}")) + "$",
    }


def formatted(rng: random.Random, _: int) -> dict[str, Any]:
    return {"type": "string", "format": rng.choice(("date", "uuid", "ipv4"))}


def integer(rng: random.Random, _: int) -> dict[str, Any]:
    low = rng.randrange(-1000, 1000)
    edges = rng.choice((("minimum", "maximum"), ("exclusiveMinimum", "exclusiveMaximum")))
    return {"type": "integer", edges[0]: low, edges[1]: low + rng.randrange(2, 5000)}


def multiple(rng: random.Random, _: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": 0, "maximum": 900, "multipleOf": rng.choice((2, 5, 7, 10))}


def number(rng: random.Random, _: int) -> dict[str, Any]:
    # Without the last, a number may have any number of digits.
    return {"type": "number", "minimum": 0, "maximum": rng.choice((1, 2.5, 100)), "multipleOf": 0.25}


def boolean_or_null(rng: random.Random, _: int) -> dict[str, Any]:
    return {"type": rng.choice(("boolean", "null", ["boolean", "null"]))}


def enum(rng: random.Random, _: int) -> dict[str, Any]:
    values = [*rng.sample(WORDS, 3), rng.randrange(-50, 50), 0.25, True, None, [1, "a"], {"k": []}]
    return {"enum": rng.sample(values, rng.randrange(1, 6))}


def const(rng: random.Random, _: int) -> dict[str, Any]:
    return {"const": rng.choice((*WORDS, 0, -7, 1.5, False, None, [], [1, [2]], {"a": {"b": "é"}}))}


def obj(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(("id", "name", "a b", "é", "x-y", "tags", "_", "Ω"), rng.randrange(1, 5))
    required = rng.sample(names, rng.randrange(len(names) + 1))
    properties = {name: any_schema(rng, depth - 1) for name in names}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def counted(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randrange(3)
    return {"type": "array", "items": any_schema(rng, depth - 1), "minItems": low, "maxItems": low + rng.randrange(3)}


def positions(rng: random.Random, depth: int) -> dict[str, Any]:
    count = rng.randrange(1, 4)
    first = [any_schema(rng, depth - 1) for _ in range(count)]
    return {"type": "array", "prefixItems": first, "items": False, "minItems": rng.randrange(count + 1)}


def any_of(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [any_schema(rng, depth - 1) for _ in range(rng.randrange(2, 4))]}


def one_of(rng: random.Random, _: int) -> dict[str, Any]:
    kinds = [
        {"type": "object", "properties": {"kind": {"const": kind}, "v": string(rng, 0)}, "required": ["kind", "v"]}
        for kind in ("a", "b")
    ]
    return {"oneOf": [kind | {"additionalProperties": False} for kind in kinds]}


def all_of(rng: random.Random, _: int) -> dict[str, Any]:
    return {"allOf": [{"type": "string", "maxLength": 6}, {"pattern": "^[a-f]*$"}, {"minLength": rng.randrange(1, 4)}]}


def reference(rng: random.Random, depth: int) -> dict[str, Any]:
    pair = {"type": "array", "items": {"$ref": "#/$defs/leaf"}, "minItems": 1, "maxItems": 2}
    return {"$defs": {"leaf": any_schema(rng, 0), "pair": pair}, "$ref": "#/$defs/pair"}


def more_properties(rng: random.Random, depth: int) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"id": integer(rng, 0)},
        "required": ["id"],
        "patternProperties": {"^x[0-9]$": any_schema(rng, 0)},
        "additionalProperties": False,
        "maxProperties": 3,
    }


LEAVES = (string, pattern, formatted, integer, multiple, number, boolean_or_null, enum, const)
# References stand only at the root: `$defs` are found from there.
NESTED = (obj, counted, positions, any_of)
KINDS = (*LEAVES, *NESTED)
ROOTS = (*KINDS, one_of, all_of, reference, more_properties)

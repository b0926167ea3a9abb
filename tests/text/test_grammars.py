"""Structured output: every text is one of its grammar, whatever the logits; and a bad grammar is one line."""

import functools
import json
import resource
import sys

import numpy as np
import pytest

pytest.importorskip("llguidance", reason="needs the extra serve")
pytest.importorskip("jsonschema", reason="needs the package jsonschema (make setup)")

from shapes import Shape, shapes
from smollm2 import needs_smollm2

import jllama
from jllama import LM, InputError
from jllama.formats import open_source
from jllama.text import grammars as grammars_module
from jllama.text.grammars import MAX_CHOICES, MAX_DEPTH, Grammar, Grammars
from jllama.text.tokenizer import Tokenizer, load_tokenizer, tokenizer_for

EOS = 2
MODELS = ["demo", pytest.param("smollm2", marks=needs_smollm2)]


@functools.cache
def lm() -> LM:
    return LM.load(jllama.DEMO)


@functools.cache
def tokenizer(name: str) -> Tokenizer:
    return tokenizer_for(open_source(jllama.DEMO if name == "demo" else name))


@functools.cache
def grammars(name: str = "demo") -> Grammars:
    return Grammars(tokenizer(name), tokenizer(name).n_ids + 5, (EOS,))  # a model may pad its vocabulary


def allowed(grammar: Grammar, *ids: int) -> list[int]:
    matcher = grammar.matcher()
    for token in ids:
        matcher.accept(token)
    return np.flatnonzero(np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")).tolist()


def drawn(grammar: Grammar, name: str, rng: np.random.Generator) -> str:
    """A text of a grammar: any allowed token is as likely as any other."""
    matcher, ids = grammar.matcher(), []
    while not matcher.done:
        choices = np.flatnonzero(np.unpackbits(matcher.mask().view(np.uint8), bitorder="little"))
        assert len(ids) < 400
        token = int(rng.choice(choices))
        matcher.accept(token)
        if token != EOS:
            ids.append(token)
    names = tokenizer(name).token_bytes()
    return b"".join(names[i] for i in ids).decode()


@pytest.mark.parametrize("name", MODELS)
def test_two_hundred_constraints_hold_for_any_logits(name: str) -> None:
    rng, lengths = np.random.default_rng(5), []
    chosen = shapes() if name == "demo" else shapes()[::4]
    for shape in chosen:
        text = drawn(grammars(name).compile(shape.kind, shape.value), name, rng)
        shape.check(text)
        lengths.append(len(text))
    assert len(lengths) == (200 if name == "demo" else 50)
    assert max(lengths) > 50


def test_the_shapes_notice_another_text() -> None:
    for shape in shapes():
        with pytest.raises((AssertionError, ValueError)):
            shape.check("never said, and no JSON")
    assert {keyword for s in shapes() if s.kind == "json_schema" for keyword in s.value} >= {
        "$ref", "anyOf", "oneOf", "allOf", "enum", "const", "prefixItems", "patternProperties", "multipleOf", "format"
    }  # fmt: skip


def test_the_demo_holds_schemas_and_expressions_at_temperature_1() -> None:
    chosen = [s for s in shapes() if s.kind in ("json_schema", "regex")][:40:4]
    for i, shape in enumerate(chosen):
        out = lm().generate(
            "Once upon a time, ", temperature=1.0, seed=i, max_new_tokens=200, **{shape.kind: shape.value}
        )
        shape.check(out.text)
        assert out.finish_reason == "stop"
    many = lm().generate(["Tom", "A cat"], regex="(red|blue){2}", temperature=1.0, max_new_tokens=20)
    for completion in many:
        Shape("regex", "(red|blue){2}").check(completion.text)
    assert json.loads(lm().generate("Tom", json_schema='{"const": [1]}', max_new_tokens=20).text) == [1]


@needs_smollm2
def test_smollm2_holds_some_of_them_at_temperature_1() -> None:
    model = LM.load("smollm2", max_len=128)
    chosen = [s for s in shapes() if s.kind == "regex"][:6]
    chosen += [s for s in shapes() if s.kind == "json_schema" and len(str(s.value)) < 60][:6]
    for i, shape in enumerate(chosen):
        out = model.generate("The answer is: ", temperature=1.0, seed=i, max_new_tokens=64, **{shape.kind: shape.value})
        shape.check(out.text)


def test_a_text_may_only_end_where_its_grammar_ends() -> None:
    compile_, encode = grammars().compile, lambda text: tokenizer("demo").encode(text, bos=False)
    optional = compile_("regex", "(ab)?")
    assert EOS in allowed(optional)
    assert EOS not in allowed(compile_("regex", "(ab)+"))
    matcher = compile_("choice", ["yes", "no"]).matcher()
    forced = grammars()._tokenizer.tokenize_str("yes")
    for token in forced:
        assert not matcher.done
        matcher.accept(token)
    assert matcher.done
    assert b"".join(tokenizer("demo").token_bytes()[i] for i in forced) == b"yes"
    assert encode("yes") != forced  # of a text's first word, the tokenizer adds a space
    matcher = optional.matcher()
    matcher.accept(EOS)
    assert matcher.done
    matcher = optional.matcher()
    matcher.accept(forced[0])  # not allowed
    assert not matcher.mask().any()
    assert not matcher.done


@pytest.mark.parametrize("name", MODELS)
def test_a_token_s_bytes_are_what_it_adds_to_a_text(name: str) -> None:
    tok = tokenizer(name)
    names = tok.token_bytes()
    assert len(names) == tok.n_ids
    text = 'He said: "naïve 日本 🙂\n\tdef f(x):  return x" 42'
    ids = tok.encode(text, bos=False)
    assert b"".join(names[i] for i in ids).decode().removeprefix(" ") == text
    anchor = tok.encode("a", bos=False)
    for i in range(0, tok.n_ids, 1 if name == "demo" else 9):
        if i not in tok.control.ids and (added := names[i]) and added.isascii():
            assert tok.decode([*anchor, i]) == tok.decode(anchor) + added.decode()


BAD = [
    ("json_schema", {"not": {}}, "Unimplemented keys"),
    ("json_schema", {"type": "nope"}, "nope"),
    ("json_schema", {"x-guidance": {"lenient": True}, "not": {}}, "Unimplemented keys"),
    ("json_schema", {"$ref": "http://example.com/x"}, "does not fetch"),
    ("json_schema", {"$ref": "file:///etc/passwd"}, "does not fetch"),
    ("json_schema", {"$ref": "#"}, "expected a grammar"),
    ("json_schema", {"type": "number", "minimum": 5, "maximum": 1}, "Unsatisfiable"),
    ("json_schema", {"type": "array", "minItems": 10**9}, "minItems: expected at most 10000, found 1000000000"),
    ("json_schema", {"a": float("inf")}, "values that JSON does not have"),
    ("json_schema", {"a": {1, 2}}, "values that JSON does not have"),
    ("json_schema", [], r"\(an object\), found list"),
    ("json_schema", "{", "a text that is not JSON"),
    ("json_schema", "[" * 60, "a text that is not JSON"),
    ("json_schema", {"enum": ["x" * 70_000]}, "expected at most 65536 bytes"),
    ("json_schema", {"enum": list(range(20_000))}, "expected at most 65536 bytes"),
    ("json_schema", functools.reduce(lambda s, _: {"items": s}, range(MAX_DEPTH), {}), "nesting of at most 64"),
    ("regex", "(", "unclosed group"),
    ("regex", "(?=a)b", "look-around"),
    ("regex", "(" * 500 + ")" * 500, "brackets nested at most 64"),
    ("regex", ".*" * 4000, "lexer"),
    ("regex", 5, "expected a text, found int"),
    ("regex", "a\x00", "a NUL or half a character"),
    ("regex", "\ud800", "a NUL or half a character"),
    ("choice", [], "expected a list of texts"),
    ("choice", ["a", 5], "expected a list of texts"),
    ("choice", ["a"] * (MAX_CHOICES + 1), "at most 1024 choices, found 1025"),
    ("grammar", "start: b", "unknown name"),
    ("grammar", "", "Empty grammar"),
    ("grammar", "start: " + "(" * 60 + '"a"' + ")" * 60, "too deeply nested"),
    ("poetry", "x", "expected one of json_object, json_schema, regex, choice, grammar, found 'poetry'"),
]


@pytest.mark.parametrize(("kind", "value", "message"), BAD, ids=range(len(BAD)))
def test_a_bad_grammar_is_one_line_that_names_the_field(kind: str, value: object, message: str) -> None:
    with pytest.raises(InputError, match=rf"^field: .*{message}") as error:
        grammars().compile(kind, value, "field")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("regex", "(a{1,1000}){1,1000}"),
        ("regex", "(.*a){50}"),
        ("regex", "(x+x+)+y"),
        ("regex", "[ab]*a[ab]{300}"),
        ("json_schema", {"$defs": {f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(20)}
                         | {"a20": {"type": "string"}}, "$ref": "#/$defs/a0"}),
        ("json_schema", {"$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}}}, "$ref": "#/$defs/n"}),
        ("grammar", 'start: a\na: a a | "x"'),
        ("json_object", None),
    ],
)  # fmt: skip
def test_hostile_grammars_end_a_request_at_most(kind: str, value: object) -> None:
    matcher, rng = grammars().compile(kind, value).matcher(), np.random.default_rng(0)
    for _ in range(30):
        choices = np.flatnonzero(np.unpackbits(matcher.mask().view(np.uint8), bitorder="little"))
        if matcher.done or not len(choices):
            break
        matcher.accept(int(rng.choice(choices)))
    assert len(matcher.mask()) == -(-(tokenizer("demo").n_ids + 5) // 32)


def test_compiled_grammars_are_kept_up_to_a_number_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Grammars(tokenizer("demo"), 1024, (EOS,), cache_bytes=13 << 20)
    times = iter([0, 0.001, 0, 0.001, 0, 0.01])  # each counts 4 MiB and 400 MiB a second
    monkeypatch.setattr(grammars_module.time, "thread_time", lambda: next(times, 0))
    first = made.compile("regex", "a+")
    assert made.compile("regex", "a+") is first
    second = made.compile("regex", "b+")
    made.compile("regex", "a+")
    made.compile("regex", "(a|b)+")
    assert made.compile("regex", "a+") is first
    assert made.compile("regex", "b+") is not second


def test_expressions_that_count_far_hold_little() -> None:
    made = Grammars(tokenizer("demo"), 1024, (EOS,))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    held = [made.compile("regex", f"((a{{1000}}){{1000}}){{{n}}}") for n in range(1000, 1003)]
    assert not allowed(held[0], *allowed(held[0])[:1])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB; 3 of 180 MiB without a limit


def test_without_the_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(InputError, match=r"needs the llguidance package \(pip install 'jllama\[serve\]'\)"):
        Grammars(load_tokenizer(jllama.DEMO), 1024, (EOS,))


def test_both_a_schema_and_an_expression_are_one_line() -> None:
    with pytest.raises(InputError, match="regex: expected none with json_schema, found both"):
        lm().generate("Tom", json_schema={}, regex="a")
    with pytest.raises(InputError, match="json_schema: expected a grammar that llguidance can compile"):
        lm().generate("Tom", json_schema={"not": {}})

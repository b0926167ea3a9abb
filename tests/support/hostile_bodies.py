"""Bodies that a server must refuse, or answer within its bounds. Each function draws one from a random generator; the
same generator draws the same ones again."""

import json
from collections.abc import Callable
from random import Random
from typing import Any

COMPLETIONS, CHAT, TOKENIZE, DETOKENIZE = "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"
PATHS = (COMPLETIONS, CHAT, TOKENIZE, DETOKENIZE)
Body = tuple[str, bytes]  # the route, and what is sent to it

DRAWN = 4  # tokens that a body asks for, where it does not attack their number
NUMBERS = ("n", "max_tokens", "max_completion_tokens", "seed", "top_k", "min_tokens", "logprobs", "top_logprobs")
NUMBERS += ("best_of", "temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
TEXTS = ("prompt", "model", "user", "cache_salt", "stop", "suffix", "service_tier", "tool_choice")
OTHERS = ("messages", "stop_token_ids", "logit_bias", "tools", "stream_options", "response_format", "tokens")
OTHERS += ("structured_outputs", "echo", "stream", "ignore_eos", "store", "modalities", "functions", "chat_template")
FIELDS = NUMBERS + TEXTS + OTHERS

# Written into JSON as they are.
LITERALS = (
    "0", "-0", "-1", "1", "1.0", "1e0", "0.5", "-0.0", "1e999", "-1e999", "NaN", "Infinity", "-Infinity", "1e-400",
)  # fmt: skip
LITERALS += tuple(
    str(sign * 2**bits + add) for bits in (31, 32, 53, 63, 64, 128) for sign in (1, -1) for add in (-1, 0, 1)
)
LITERALS += ("1000000000", "9" * 400, "9" * 5000, "1e308", "-1e308", "1" + "0" * 300, "0x10", "01", "1_000", "+1", ".5")
LITERALS += ("null", "true", "false", '""', '"1"', "[]", "{}", "[[]]", "[null]", '{"a":1}', "[1,2,3]", '["a"]', "[1.5]")

STRINGS = (
    "", " ", "\0", "a\0b", "\ud800", "a\udfffb", "\udc00\ud800", "\ufeff", "\uffff", "\U0010ffff", "\u202e",
    "\x1b[2J",
)  # fmt: skip
STRINGS += (
    "e" + "\u0301" * 3000, "👩‍👩‍👧‍👦" * 200, "\r\n\r\n", "</s>", "<s>[INST]", "<|im_start|>system", "<0x0A>",
    "﷽" * 500,
)  # fmt: skip
STRINGS += (
    "../../etc/passwd", "%00", "%s%n%x", "${7*7}", "{{7*7}}", "{% for a in range(10**9) %}{% endfor %}", "'; DROP",
)  # fmt: skip
STRINGS += ("\\", '"', "a" * 255, "a" * 257, "a" * 100_000, "\n" * 5000, "ı", "ẞ" * 100, "\u2028\u2029", "\x7f\x80\x9f")


def _base(path: str) -> dict[str, Any]:
    if path == COMPLETIONS:
        return {"prompt": "Once", "max_tokens": DRAWN}
    if path == CHAT:
        return {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": DRAWN}
    return {"prompt": "Once"} if path == TOKENIZE else {"tokens": [1, 2, 3]}


def _with(path: str, **fields: Any) -> Body:
    return path, json.dumps(_base(path) | fields).encode()


def _literal(path: str, field: str, literal: str) -> Body:
    """A body in which a field has a value that `json.dumps` would not write."""
    rest = {name: value for name, value in _base(path).items() if name != field}
    return path, (json.dumps(rest)[:-1] + (", " if rest else "") + f"{json.dumps(field)}: {literal}}}").encode()


def numbers(random: Random) -> Body:
    """A number of the wrong size, sign or kind, or none at all."""
    fields = FIELDS if random.random() < 0.3 else NUMBERS
    return _literal(random.choice(PATHS[:2]), random.choice(fields), random.choice(LITERALS))


def lists_of_numbers(random: Random) -> Body:
    """Numbers inside of lists and keys."""
    literal, path = random.choice(LITERALS), random.choice(PATHS[:2])
    lists = {"prompt": f"[{literal}]", "stop_token_ids": f"[{literal}, 5]", "logit_bias": f'{{"5": {literal}}}'}
    lists |= {"tokens": f"[1, {literal}]", "logprobs": literal}
    field = random.choice(list(lists))
    if field == "logit_bias" and random.random() < 0.5:
        key = literal if literal.lstrip("-").isdigit() else "5"
        return _literal(path, field, f'{{"{key}": 1}}')
    return _literal(DETOKENIZE if field == "tokens" else path, field, lists[field])


def texts(random: Random) -> Body:
    """A text that is none, or a strange one, wherever a text may stand."""
    text = random.choice(STRINGS) if random.random() < 0.7 else strange(random)
    path = random.choice(PATHS[:3])
    places: list[dict[str, Any]] = [
        {"prompt": text}, {"prompt": ["a", text]}, {"model": text}, {"user": text}, {"cache_salt": text},
        {"stop": text}, {"stop": [text, "b"]}, {text[:300]: text}, {"messages": [{"role": text, "content": "a"}]},
        {"messages": [{"role": "user", "content": text, "name": text}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": text}]}]},
        {"messages": [{"role": "tool", "content": "a", "tool_call_id": text}]}, {"logit_bias": {text: 1}},
        {"structured_outputs": {"choice": [text]}}, {"structured_outputs": {"regex": text}},
        {"structured_outputs": {"grammar": text}}, {"structured_outputs": {"json": text}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": text, "schema": {}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": [text, {text: 1}]}}}},
        {"tools": [{"type": "function", "function": {"name": text, "description": text}}]},
        {"tools": [{"type": "function", "function": {"name": "f", "description": text, text: text}}]},
        {"tool_choice": text},
    ]  # fmt: skip
    return _with(path, **random.choice(places))


def strange(random: Random) -> str:
    """Letters from everywhere, halves of pairs among them."""
    ranges = ((0, 0x20), (0x20, 0x7F), (0x80, 0x800), (0xD800, 0xE000), (0xE000, 0x10000), (0x10000, 0x110000))
    picked = [random.randrange(*random.choice(ranges)) for _ in range(random.randrange(1, 40))]
    return "".join(map(chr, picked))


def value(random: Random, depth: int = 0) -> Any:
    """Any JSON value."""
    kind = random.randrange(8 if depth < 4 else 5)
    match kind:
        case 0:
            return random.choice((None, True, False))
        case 1:
            return random.choice((0, 1, -1, 2**31, 2**63, -(2**63) - 1, 10**30, random.randrange(-(10**6), 10**6)))
        case 2:
            return random.choice((0.0, 0.5, -1.5, 1e308, 1e-320))
        case 3 | 4:
            return random.choice(STRINGS) if random.random() < 0.3 else strange(random)
        case 5 | 6:
            return [value(random, depth + 1) for _ in range(random.randrange(5))]
    return {random.choice((*FIELDS, "type", "x", "")): value(random, depth + 1) for _ in range(random.randrange(5))}


def types(random: Random) -> Body:
    """Known fields with values of any type."""
    fields = {random.choice(FIELDS): value(random) for _ in range(random.randrange(1, 4))}
    return _with(random.choice(PATHS), **fields)


def broken_json(random: Random) -> Body:
    """A good body with bytes that are cut, doubled or replaced."""
    path = random.choice(PATHS)
    content = bytearray(_with(path, temperature=0.5, stop=["é", "b"], stream=False)[1])
    for _ in range(random.randrange(1, 5)):
        at = random.randrange(len(content) + 1)
        match random.randrange(5):
            case 0:
                del content[at : at + random.randrange(1, 9)]
            case 1:
                content[at:at] = bytes(random.randrange(256) for _ in range(random.randrange(1, 9)))
            case 2:
                content[at:at] = content[: random.randrange(20)]
            case 3:
                content = content[:at]
            case _:
                content[at:at] = random.choice(
                    (b"\xff\xfe", b"\xed\xa0\x80", b"\xc0\xaf", b"\0", b"\\ud800", b"\xef\xbb\xbf")
                )
    return path, bytes(content)


def encodings(random: Random) -> Body:
    """JSON in other encodings, and things that are no JSON."""
    path = random.choice(PATHS)
    text = json.dumps(_base(path))
    others = [text.encode(code) for code in ("utf-16", "utf-16-le", "utf-32", "utf-7", "utf-8-sig")]
    others += [b"", b"\0" * 100, b"<?xml version='1.0'?><!DOCTYPE a [<!ENTITY b 'c'>]><a>&b;</a>", b"a=1&b=2"]
    others += [
        b"cos\nsystem\n(S'id'\ntR.",
        b"\x80\x04\x95",
        b"--- !!python/object/apply:os.system ['id']",
        text.encode() * 2,
    ]
    return path, random.choice(others)


def depths(random: Random) -> Body:
    """Nesting around the limit, and far beyond."""
    path, depth = random.choice(PATHS), random.choice((30, 61, 62, 63, 64, 65, 66, 500, 990, 5000, 100_000))
    begin, end = random.choice((("[", "]"), ('{"a":', "}"), ('[{"b":[', "]}]")))
    inside = random.choice(("", "1", '"x"')) if begin == "[" else "1"
    nested = begin * depth + inside + end * (depth if random.random() < 0.9 else depth - 1)
    field = random.choice(FIELDS)
    if random.random() < 0.25:  # in a text that is JSON again
        call = {"type": "function", "function": {"name": "f", "arguments": nested}}
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
        return _with(CHAT, messages=[*turns, {"role": "tool", "content": "b"}])
    if random.random() < 0.25:
        return _with(path, structured_outputs={"json": nested})
    return _literal(path, field, nested)


def sizes(random: Random) -> Body:
    """Many of something, or something long."""
    path, count = random.choice(PATHS), random.choice((129, 1000, 5000, 20_000))
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    many: list[Callable[[], dict[str, Any]]] = [
        lambda: {"prompt": "word " * 100 * count}, lambda: {"prompt": ["a"] * count},
        lambda: {"prompt": [[]] * count}, lambda: {"prompt": list(range(count))},
        lambda: {"prompt": [[7] * 200] * 128, "max_tokens": 1},
        lambda: {"messages": [{"role": ("user", "assistant")[i % 2], "content": "a"} for i in range(count)]},
        lambda: {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * count}]},
        lambda: {"messages": [{"role": "assistant", "content": "a", "tool_calls": [call] * count}]},
        lambda: {"stop": ["ab"] * count}, lambda: {"stop_token_ids": [5] * count},
        lambda: {"logit_bias": {str(i): 1 for i in range(count)}}, lambda: {f"field{i}": i for i in range(count)},
        lambda: {"tokens": [5] * 10 * count},
        lambda: {"tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(count)]},
        lambda: {"structured_outputs": {"choice": [f"choice {i}" for i in range(count)]}},
        lambda: {"structured_outputs": {"choice": ["c" * count] * 3}}, lambda: {"a" * 50 * count: 1},
        lambda: {"user": "u" * 200 * count},
    ]  # fmt: skip
    return _with(path, **random.choice(many)())

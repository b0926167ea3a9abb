"""Bytes and manners of clients that a server should not trust. Each function draws one `Shot` from a generator."""

import functools
import gzip
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal

import hostile_bodies as bodies
import hostile_grammars as constraints
from hostile_bodies import CHAT, COMPLETIONS, PATHS, TOKENIZE

KEY = "sk-attacked"
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"
NO_ANSWER = 0  # among the statuses that a shot may have: the connection ends without one


@dataclass(frozen=True)
class Shot:
    """What one client does. ``statuses``: those that it may get; empty: any but a 500."""

    kind: str
    parts: tuple[bytes, ...]  # sent one after the other
    pause: float = 0.0  # seconds between them
    end: Literal["read", "half", "reset", "leave"] = "read"
    patience: float = 60.0  # seconds to wait for an answer
    statuses: tuple[int, ...] = ()
    answers: int = 1  # at most so many


def request(path: str | bytes, content: bytes, *headers: bytes, method: bytes = b"POST", key: str = KEY) -> bytes:
    """A request as it should be, after which the connection ends."""
    target = path.encode() if isinstance(path, str) else path
    lines = [b"%b %b HTTP/1.1" % (method, target), b"host: 127.0.0.1", b"connection: close"]
    lines += [b"authorization: Bearer " + key.encode()] if key else []
    if method == b"POST":
        lines += [b"content-length: %d" % len(content)]
        if not any(line.lower().startswith(b"content-type") for line in headers):
            lines += [b"content-type: application/json"]
    return b"\r\n".join([*lines, *headers, b"", b""]) + content


GOOD = json.dumps({"prompt": "Once", "max_tokens": 2}).encode()
LONG = json.dumps({"prompt": "Once", "max_tokens": 300, "ignore_eos": True, "stream": True}).encode()


def _body(draw: Callable[[Random], bodies.Body]) -> Callable[[Random], Shot]:
    def shot(random: Random) -> Shot:
        path, content = draw(random)
        cut = (NO_ANSWER,) if len(content) > 1 << 20 else ()  # the answer is lost where more is sent than is read
        return Shot(draw.__name__, (request(path, content),), statuses=(200, 400, 404, 413, 429, *cut))

    return shot


def smuggling(random: Random) -> Shot:
    """Heads over whose body's end two servers might disagree. Never must what is hidden there be answered."""
    te, n = b"transfer-encoding: chunked", len(GOOD)
    chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (n, GOOD)
    heads: list[tuple[list[bytes], bytes]] = [
        ([b"content-length: %d" % n, te], chunked + SMUGGLED), ([te, b"content-length: 5"], chunked + SMUGGLED),
        ([b"content-length: %d" % (5 + len(SMUGGLED)), te], b"0\r\n\r\n" + SMUGGLED),
        ([b"content-length: 6", b"content-length: 5"], GOOD + SMUGGLED),
        ([b"content-length: %d, 5" % n], GOOD + SMUGGLED), ([b"content-length: +%d" % n], GOOD + SMUGGLED),
        ([b"content-length: 0x%x" % n], GOOD + SMUGGLED), ([b"content-length: %d " % n + b"\x0b"], GOOD + SMUGGLED),
        ([b"content-length: \xd9\xa3"], GOOD + SMUGGLED), ([b"content-length : %d" % n], GOOD + SMUGGLED),
        ([b"content-length:\r\n %d" % n], GOOD + SMUGGLED), ([b"content-length: -1"], SMUGGLED),
        ([b"content-length: " + b"9" * 30], SMUGGLED), ([b"transfer-encoding: xchunked"], chunked + SMUGGLED),
        ([b"transfer-encoding: chunked, identity"], chunked + SMUGGLED),
        ([b"transfer-encoding: gzip, chunked"], chunked + SMUGGLED),
        ([b"transfer-encoding: \x0bchunked"], chunked + SMUGGLED),
        ([b"transfer-encoding : chunked"], chunked + SMUGGLED),
        ([b"transfer-encoding:\r\n chunked"], chunked + SMUGGLED), ([te, te], chunked + SMUGGLED),
        ([b"x: y\rtransfer-encoding: chunked", b"content-length: %d" % n], GOOD + SMUGGLED),
        ([b"x: y\ntransfer-encoding: chunked", b"content-length: %d" % n], GOOD + SMUGGLED),
        ([te], b"-1\r\n" + SMUGGLED), ([te], b"FFFFFFFFFFFFFFFFF\r\n" + SMUGGLED),
        ([te], b"0x5\r\nabcde\r\n0\r\n\r\n" + SMUGGLED), ([te], b"5;" + b"a" * 40_000 + b"\r\nabcde\r\n0\r\n\r\n"),
        ([te], b"5\r\nabcdeXX0\r\n\r\n" + SMUGGLED), ([te], b"%x\n%b\n0\n\n" % (n, GOOD) + SMUGGLED),
        ([te], b"%x\r\n%b\r\n0\r\ncontent-length: 9\r\nauthorization: x\r\n\r\n" % (n, GOOD)),
        ([b"content-length: 0"], SMUGGLED),
    ]  # fmt: skip
    more, content = random.choice(heads)
    line = random.choice((b"\r\n", b"\r\n", b"\n"))
    path = random.choice(PATHS).encode()
    lines = [b"POST %b HTTP/1.1" % path, b"host: 127.0.0.1", b"authorization: Bearer " + KEY.encode(), *more]
    lines += [b"content-type: application/json", b"connection: close", b"", b""]
    return Shot("smuggling", (line.join(lines) + content,), patience=2, end="leave", answers=1)


def heads(random: Random) -> Shot:
    """First lines and headers that are strange, huge, or no HTTP."""
    host = b"host: 127.0.0.1\r\n"
    odd = [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\0" * 300,
        b"\r\n" * 500, b"GET /\r\n\r\n", b"GET / HTTP/9.9\r\n" + host + b"\r\n", b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + host * 2 + b"\r\n", b"get / http/1.1\r\n\r\n",
        b"GET  / HTTP/1.1\r\n" + host + b"\r\n", b"GET / HTTP/1.1\r\nhost: a\0b\r\n\r\n",
        b"GET / HTTP/1.1\r\n: x\r\n\r\n", b"CONNECT a:1 HTTP/1.1\r\n\r\n", b"TRACE / HTTP/1.1\r\n" + host + b"\r\n",
        b"OPTIONS * HTTP/1.1\r\n" + host + b"\r\n", b"X" * 5000 + b" / HTTP/1.1\r\n" + host + b"\r\n",
        b"GET http://evil.example/ HTTP/1.1\r\n" + host + b"\r\n",
        b"GET " + b"/a" * 20_000 + b" HTTP/1.1\r\n" + host + b"\r\n",
        b"GET / HTTP/1.1\r\n" + host + b"a: " + b"x" * 70_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + host + b"a: b\r\n" * 9000 + b"\r\n",
        b"GET / HTTP/1.1\r\n" + host + b"a" * 40_000 + b": b\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + host + b"na me: x\r\n\r\n", b"GET /\xff HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + host + b"upgrade: websocket\r\nconnection: upgrade\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + host + b"upgrade: h2c\r\nconnection: upgrade, http2-settings\r\n\r\n",
        b"GET /health HTTP/1.0\r\n\r\n", b"POST /tokenize HTTP/1.0\r\n\r\n{}",
        (b"GET /health HTTP/1.1\r\n" + host + b"\r\n") * 200,
        b"HEAD / HTTP/1.1\r\n" + host + b"connection: close\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + host + b"range: bytes=0-1,2-3,0-\r\nif-range: x\r\n\r\n",
        bytes(random.randrange(256) for _ in range(random.randrange(1, 2000))),
    ]  # fmt: skip
    return Shot("heads", (random.choice(odd),), end="leave", patience=2, answers=200)


def known_headers(random: Random) -> Shot:
    """Headers with a meaning, in requests that are good without them."""
    more = (
        b"expect: 100-continue", b"expect: 200-maybe", b"x-forwarded-for: 127.0.0.1",
        b"forwarded: for=127.0.0.1;host=evil", b"origin: null", b"origin: https://evil.example",
        b"cookie: " + b"a=b; " * 4000, b"content-disposition: attachment; filename=../../x", b"te: trailers",
        b"accept: application/x-evil", b"accept-encoding: gzip, br, zstd;q=99", b"x-http-method-override: DELETE",
        b"x-original-url: /metrics", b"content-md5: x", b"prefer: respond-async", b"if-none-match: *",
        b"max-forwards: 0", b"via: 1.1 x", b"connection: content-length", b"x-request-id: req-mine\r\nx-tenant: 0",
        b"user-agent: () { :; }; echo x", b"openai-organization: \xff\xfe", b"a: " + b"\xe4" * 9000,
    )  # fmt: skip
    content = GOOD if random.random() < 0.7 else b"x"
    return Shot("known_headers", (request(random.choice(PATHS), content, random.choice(more)),), answers=2)


def hosts(random: Random) -> Shot:
    """Names that are not the server's: what a page sends that rebinds its name to this machine."""
    names = (
        b"evil.example", b"evil.example:8000", b"localhost.evil.example", b"127.0.0.1.nip.io", b"", b"0", b"[::1",
        b"2130706433", b"a b",
    )  # fmt: skip
    names += (
        b"127.0.0.1:x", b"evil@127.0.0.1", b"127.0.0.1, evil.example", b"\xffhost", b"[::1]:1:2",
    )  # fmt: skip
    head = request("/v1/completions", GOOD).replace(b"host: 127.0.0.1\r\n", b"host: " + random.choice(names) + b"\r\n")
    if random.random() < 0.2:
        head = head.replace(b"POST /v1/", b"POST http://127.0.0.1/v1/")
    return Shot("hosts", (head,), statuses=(400, 404, 421))


PLACES = (
    "/../../etc/passwd", "/v1/../../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/..%2f..%2fetc/passwd",
    "/..\\..\\x", "//evil.example/x",
)  # fmt: skip
PLACES += (
    "/v1/models/../../../etc/passwd", "/v1/models/%00", "/v1/models/" + "a" * 9000, "/%ff%fe", "/%ed%a0%80",
    "/%0d%0aset-cookie:a=b",
)  # fmt: skip
PLACES += (
    "/health%20", "/HEALTH", "/health/", "/health/../metrics", "/%68ealth", "/metrics?x=%", "/?" + "a=b&" * 5000,
    "/;a=b", "/.env",
)  # fmt: skip
PLACES += (
    "/.git/config", "/docs", "/redoc", "/openapi.json/..", "/static/..%252f..%252fetc/passwd", "/v1//completions",
    "/v1/completions/",
)  # fmt: skip
PLACES += (
    "/v1/models/{{7*7}}", "/%7B%7B7*7%7D%7D", "/<script>", "/proc/self/environ", "/v1/completions%00", "/page.html",
    "/tokenize?prompt=a",
)  # fmt: skip


def paths(random: Random) -> Shot:
    """Paths that lead elsewhere, with every method, and often without a key."""
    method = random.choice(
        (
            b"GET", b"GET", b"GET", b"POST", b"HEAD", b"PUT", b"DELETE", b"PATCH", b"OPTIONS", b"TRACE", b"PROPFIND",
            b"A" * 99,
        )
    )  # fmt: skip
    key = KEY if random.random() < 0.7 else ""
    return Shot("paths", (request(random.choice(PLACES), b"{}", method=method, key=key),))


def keys(random: Random) -> Shot:
    """Keys that are none."""
    given = (
        KEY[:-1], KEY + "a", KEY.upper(), "", " ", "null", "undefined", "*", "a" * 20_000, KEY[::-1],
        KEY + "\t" + KEY,
    )  # fmt: skip
    head = b"authorization: " + random.choice((b"Bearer ", b"bearer\t", b"Basic ", b"", b"Token ", b"Bearer\xff "))
    head += random.choice(given).encode()
    if random.random() < 0.2:
        head = b"x-api-key: %b\r\napi-key: %b\r\ncookie: authorization=Bearer %b" % ((KEY.encode(),) * 3)
    path, method = random.choice(
        [*((p, b"POST") for p in PATHS), ("/metrics", b"GET"), ("/v1/models", b"GET"), ("/version", b"GET")]
    )
    return Shot("keys", (request(path, GOOD, head, method=method, key=""),), statuses=(401, 400))


def content_types(random: Random) -> Shot:
    """Bodies that say that they are something else."""
    kinds = (
        b"text/plain", b"", b"application/x-www-form-urlencoded", b"multipart/form-data; boundary=" + b"x" * 300,
        b"application/jsonp",
    )  # fmt: skip
    kinds += (
        b"application/json-patch+json", b"*/*", b"application/x-python-pickle", b"application/xml", b"text/json",
        b"a" * 9000, b"\xff",
    )  # fmt: skip
    kinds += (
        b"application/json, text/plain", b"application/ json", b"application\\json", b"image/png",
        b"application/x-ndjson",
    )  # fmt: skip
    return Shot(
        "content_types",
        (request(random.choice(PATHS), GOOD, b"content-type: " + random.choice(kinds)),),
        statuses=(415, 400),
    )


@functools.cache
def bomb() -> bytes:
    """64 MiB in few bytes."""
    return gzip.compress(b'{"prompt": "' + b"a" * (64 << 20) + b'"}', 1)


def compressed(random: Random) -> Shot:
    """Bodies that are packed, some of them bombs."""
    packed = random.choice((gzip.compress(GOOD), zlib.compress(GOOD), bomb()))
    coding = random.choice((b"gzip", b"deflate", b"br", b"zstd", b"gzip, gzip", b"GZIP", b"x-gzip", b"compress"))
    content = packed if random.random() < 0.8 else GOOD
    return Shot(
        "compressed",
        (request(random.choice(PATHS), content, b"content-encoding: " + coding),),
        statuses=(400, 413, 415),
    )


def slow(random: Random) -> Shot:
    """A head or a body in drops, that never ends."""
    whole = request(random.choice(PATHS), GOOD)
    at = random.randrange(1, len(whole) - 1)
    parts = (whole[:at], *(whole[i : i + 1] for i in range(at, min(at + 5, len(whole) - 1))))
    return Shot("slow", parts, pause=random.random() / 4, end="leave", patience=0.5, statuses=(NO_ANSWER, 400, 408))


def half_closed(random: Random) -> Shot:
    """A whole request, or a part of one, after which the client sends no more, but reads."""
    whole = request(random.choice(PATHS[:2]), random.choice((GOOD, LONG)))
    at = random.choice((len(whole), len(whole), random.randrange(1, len(whole))))
    return Shot("half_closed", (whole[:at],), end="half", patience=10)


def gone(random: Random) -> Shot:
    """A client that leaves in the middle of its request, or of the answer, with or without goodbye."""
    whole = request(COMPLETIONS, random.choice((GOOD, LONG, LONG)))
    at = random.choice((len(whole), len(whole), random.randrange(1, len(whole))))
    end: Literal["reset", "leave"] = random.choice(("reset", "leave"))
    return Shot(
        "gone", (whole[:at],), end=end, patience=random.choice((0, 0.01, 0.1)), statuses=(200, 400, 429, NO_ANSWER)
    )


def deaf(random: Random) -> Shot:
    """A client that asks for much, and reads nothing for a while."""
    body = {
        "prompt": "a",
        "n": 8,
        "max_tokens": 40,
        "logprobs": 20,
        "stream": True,
        "ignore_eos": True,
        "temperature": 1,
    }
    return Shot("deaf", (request(COMPLETIONS, json.dumps(body).encode()), b""), pause=0.3, end="leave", patience=0.2)


def large(random: Random) -> Shot:
    """Bodies beyond the limit of bytes, whole or only said to be so."""
    size = random.choice((4 << 20, (4 << 20) + 1, 6 << 20))
    content = b'{"prompt": "' + b"a" * (size - 14) + b'"}'
    if random.random() < 0.5:
        return Shot("large", (request(TOKENIZE, content),), statuses=(200, 413, 429, NO_ANSWER))
    head = request(CHAT, b"").replace(
        b"content-length: 0", b"content-length: " + random.choice((b"99999999999", b"4294967296", b"9" * 19))
    )
    return Shot("large", (head,), statuses=(413, 400))


_BODIES = (
    bodies.numbers, bodies.lists_of_numbers, bodies.texts, bodies.types, bodies.broken_json, bodies.encodings,
    bodies.depths,
)  # fmt: skip
_GRAMMARS = (
    constraints.regexes, constraints.grammars, constraints.schemas, constraints.templates, constraints.tools,
    constraints.costs,
)  # fmt: skip
_HTTP = (smuggling, heads, known_headers, hosts, paths, keys, content_types)
_SLOW = (bodies.sizes, compressed, slow, half_closed, gone, deaf, large)  # less of these: each takes long
KINDS = [*map(_body, _BODIES), *map(_body, _GRAMMARS), *_HTTP] * 3 + [_body(bodies.sizes), *_SLOW[1:]]


def shot(seed: int, number: int) -> Shot:
    """The shot of a number in the attack of a seed."""
    random = Random(f"{seed}:{number}")
    return KINDS[number % len(KINDS)](random)

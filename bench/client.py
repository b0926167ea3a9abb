"""A client of OpenAI's completions, which notes when tokens come. It parses no more than it must, so that it keeps up
with hundreds of streams. `tests/support/load.py` asks with it, too."""

import asyncio
import contextlib
import json
import resource
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from bench.traffic import Ask, Timeline
from jllama.errors import InputError

LIMIT_S = 600  # of one stream; then the server is taken for dead


def drive(url: str, model: str, asks: Sequence[Ask], temperature: float, key: str | None = None) -> Timeline:
    """Ask for every prompt when it is due, each on a connection of its own."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # one file for each stream
    return asyncio.run(_drive(url, model, asks, temperature, key))


async def _drive(url: str, model: str, asks: Sequence[Ask], temperature: float, key: str | None) -> Timeline:
    how: dict[str, Any] = {"model": model, "temperature": temperature, "ignore_eos": True, "stream": True}
    how["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}  # how many tokens an event is of
    bodies = [json.dumps(how | {"prompt": ask.prompt, "max_tokens": ask.new_tokens}).encode() for ask in asks]
    timeline = Timeline(asks)

    async def one(text: int, ask: Ask) -> None:
        await asyncio.sleep(ask.at - timeline.now)
        await complete(url, bodies[text], key, lambda count: timeline.add(text, count))

    await asyncio.gather(*(one(text, ask) for text, ask in enumerate(asks)))
    return timeline


async def complete(url: str, content: bytes, key: str | None, came: Callable[[int], None]) -> None:
    """Post a completion, and call ``came`` with the number of new tokens of each event."""
    seen = 0
    try:
        async with asyncio.timeout(LIMIT_S):
            async for event in events(url, content, key):
                if used := event.get("usage"):
                    came(used["completion_tokens"] - seen)
                    seen = used["completion_tokens"]
    except TimeoutError:
        raise InputError(f"{url}: expected a whole answer within {LIMIT_S} s") from None


async def events(url: str, content: bytes, key: str | None) -> AsyncGenerator[dict[str, Any]]:
    """Post a completion, and yield the events of its stream. Raises `InputError` for a server that cannot be reached,
    refuses, or ends a stream early."""
    done = False
    try:
        status, lines = await _post(f"{url}/v1/completions", content, key)
        async with contextlib.aclosing(lines):
            async for line in lines:
                if status != 200:
                    said = line.decode(errors="replace")[:200]
                    raise InputError(f"{url}: expected status 200, found {status}: {said}")
                if line == b"data: [DONE]":
                    done = True
                elif line.startswith(b"data: "):
                    event: dict[str, Any] = json.loads(line[6:])
                    if "error" in event:
                        raise InputError(f"{url}: {event['error'].get('message')}")
                    yield event
    except (OSError, asyncio.IncompleteReadError) as error:
        raise InputError(f"{url}: {error or type(error).__name__}") from None
    if not done:
        raise InputError(f"{url}: expected a stream that ends with [DONE], found its end (status {status})")


async def _post(url: str, content: bytes, key: str | None) -> tuple[int, AsyncGenerator[bytes]]:
    """The status, and the lines of the body."""
    to = urlsplit(url)
    reader, writer = await asyncio.open_connection(to.hostname, to.port or 80)
    head = [f"POST {to.path} HTTP/1.1", f"host: {to.netloc}", "content-type: application/json", "connection: close"]
    head += [f"content-length: {len(content)}", *([f"authorization: Bearer {key}"] if key else []), "", ""]
    writer.write("\r\n".join(head).encode() + content)
    status = int((await reader.readuntil(b"\r\n")).split()[1])
    headers = (await reader.readuntil(b"\r\n\r\n")).lower()

    async def lines() -> AsyncGenerator[bytes]:
        try:
            rest = b""
            async for part in _parts(reader, chunked=b"transfer-encoding: chunked" in headers):
                *whole, rest = (rest + part).split(b"\n")
                for line in whole:
                    yield line
            if rest:
                yield rest
        finally:
            writer.close()

    return status, lines()


async def _parts(reader: asyncio.StreamReader, *, chunked: bool) -> AsyncGenerator[bytes]:
    if not chunked:
        while part := await reader.read(1 << 16):
            yield part
        return
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        yield (await reader.readexactly(size + 2))[:-2]

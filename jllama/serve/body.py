"""Reading a request's body: bounded in bytes, time and depth, before it is parsed."""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, NoReturn

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from jllama.serve.errors import ApiError, from_validation
from jllama.serve.gate import Gate
from jllama.serve.settings import Settings
from jllama.text.nesting import MAX_DEPTH, nested_within


@asynccontextmanager
async def reading[B: BaseModel](request: Request, schema: type[B], settings: Settings, gate: Gate) -> AsyncGenerator[B]:
    """The body of a request as an object of ``schema``. Its bytes count as held until the context ends."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a web page can send other types to any site without asking (CORS)
        raise ApiError(415, "content-type: expected application/json", code="unsupported_media_type")
    if (request.headers.get("content-encoding") or "identity").strip().lower() != "identity":
        raise ApiError(415, "content-encoding: expected none, found another", code="unsupported_media_type")
    parts: list[bytes] = []
    try:
        await _receive(request, settings, gate, parts)
        try:
            asked = schema.model_validate(parse(b"".join(parts)))
        except ValidationError as error:
            raise from_validation(error) from None
        yield asked
    finally:
        gate.give_back(sum(map(len, parts)))


async def _receive(request: Request, settings: Settings, gate: Gate, parts: list[bytes]) -> None:
    too_large = ApiError(413, f"body: expected at most {settings.body_bytes} bytes, found more", code="too_large")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length[:20]) > settings.body_bytes:
        raise too_large
    left = settings.body_bytes
    try:
        async with asyncio.timeout(settings.body_seconds):
            async for part in request.stream():
                left -= len(part)
                if left < 0:
                    raise too_large
                gate.take(len(part))
                parts.append(part)
    except TimeoutError:
        raise ApiError(408, f"body: expected it within {settings.body_seconds:g} s", code="timeout") from None
    except ClientDisconnect:
        raise ApiError(400, "body: the client left before its end") from None


def parse(content: bytes) -> dict[str, Any]:
    """A JSON object, or an error that says what is wrong with it."""
    try:
        value = json.loads(content.decode(), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"body: byte {error.start}: expected UTF-8 text, found other bytes") from None
    except json.JSONDecodeError as error:
        raise ApiError(400, f"body: expected JSON, found at character {error.pos}: {error.msg}") from None
    except (ValueError, RecursionError):  # a constant, a number of thousands of digits, or endless nesting
        raise ApiError(400, "body: expected JSON of finite numbers and little depth, found other") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"body: expected a JSON object, found {type(value).__name__}")
    if not nested_within(value):
        raise ApiError(400, f"body: expected at most {MAX_DEPTH} nested levels, found more")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)

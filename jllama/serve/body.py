"""Reading a request's body: bounded in bytes, time and depth, before anything looks at it."""

import asyncio
import json
from typing import Any, NoReturn

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from jllama.serve.errors import ApiError, from_validation
from jllama.serve.settings import Settings

MAX_DEPTH = 64  # of nested lists and objects


async def read[B: BaseModel](request: Request, schema: type[B], settings: Settings) -> B:
    """The body of a request as an object of ``schema``."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # what a web page may send anywhere without asking is no JSON
        raise ApiError(415, "content-type: expected application/json", code="unsupported_media_type")
    value = parse(await _bytes(request, settings))
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        raise from_validation(error) from None


async def _bytes(request: Request, settings: Settings) -> bytes:
    too_large = ApiError(413, f"body: expected at most {settings.body_bytes} bytes, found more", code="too_large")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length[:20]) > settings.body_bytes:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(settings.body_seconds):
            async for part in request.stream():
                size += len(part)
                if size > settings.body_bytes:
                    raise too_large
                parts.append(part)
    except TimeoutError:
        raise ApiError(408, f"body: expected it within {settings.body_seconds:g} s", code="timeout") from None
    except ClientDisconnect:
        raise ApiError(400, "body: the client left before its end") from None
    return b"".join(parts)


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
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [part for v in level for part in (v.values() if isinstance(v, dict) else v)]
        level = [part for part in level if isinstance(part, dict | list)]
        if not level:
            return value
    raise ApiError(400, f"body: expected at most {MAX_DEPTH} nested levels, found more")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)

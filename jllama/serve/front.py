"""What every request passes first: a name for it, the access log, and the key."""

import hashlib
import hmac
import json
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jllama.formats.files import label
from jllama.serve.errors import ApiError

OPEN = ("/health",)  # routes that need no key
GONE = 499  # logged where a client went away before its answer began


def error_response(error: ApiError) -> JSONResponse:
    """OpenAI's error object, with its status."""
    return JSONResponse(error.body, error.status, error.headers)


class Keys:
    """The API keys. Who asks with the i-th is the tenant ``i``; without keys, all are one tenant."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def tenant(self, headers: Headers) -> str | None:
        """Whose key a request carries; None: no valid one. Takes as long whichever key is right, or none: the digests
        of equal length are compared whole, with every key."""
        if not self._digests:
            return ""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(given.strip().encode("latin-1")).digest()
        found = None
        for i, known in enumerate(self._digests):
            if hmac.compare_digest(digest, known):
                found = str(i)
        return found if scheme.lower() == "bearer" else None


class Front:
    """Wraps the application. ``answered`` is told the scope and status of every request."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], answered: Callable[[Scope, int], None], *, log: bool) -> None:
        self._app, self._keys, self._answered, self._log = app, Keys(keys), answered, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or the lifespan."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        began, status, name = time.perf_counter(), GONE, f"req-{secrets.token_hex(12)}"
        facts: dict[str, Any] = {}
        scope["jllama"] = facts

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                more = [(b"x-request-id", name.encode()), (b"x-content-type-options", b"nosniff")]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        try:
            facts["tenant"] = tenant = self._keys.tenant(Headers(scope=scope))
            if tenant is None and scope["path"] not in OPEN:
                refused = ApiError(401, "authorization: expected a valid API key", code="invalid_api_key")
                await error_response(refused)(scope, receive, named)
            else:
                await self._app(scope, receive, named)
        finally:
            self._answered(scope, status)
            if self._log:
                _write(scope, name, status, time.perf_counter() - began, facts)


def _write(scope: Scope, name: str, status: int, seconds: float, facts: dict[str, Any]) -> None:
    """One JSON object on one line: no text of a prompt or an answer, no key, no query."""
    line = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "id": name,
        "client": (scope.get("client") or ("",))[0],
        "method": scope["method"],
        "path": label(scope["path"], 200),
        "status": status,
        "seconds": round(seconds, 4),
        **{key: value for key, value in facts.items() if value not in (None, "")},
    }
    print(json.dumps(line), file=sys.stdout, flush=True)

"""What every request passes first: a request id, the access log, the check of host and key."""

import hashlib
import hmac
import ipaddress
import json
import re
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

OPEN = ("/", "/health")  # routes that need no key: the chat page asks for one, and contains no secret
PROBES = ("/health", "/ready", "/metrics")  # asked again and again: what they usually answer is not logged
GONE = 499  # logged if a client left before its answer began


def error_response(error: ApiError) -> JSONResponse:
    """OpenAI's error object, with its status."""
    return JSONResponse(error.body, error.status, error.headers)


class Keys:
    """The API keys. A client with the i-th key is tenant ``i``. Without keys, all clients are one tenant."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def tenant(self, headers: Headers) -> str | None:
        """The tenant whose key a request carries; None: no valid key. The time does not depend on which key matches:
        digests of equal length are compared as a whole, with every key."""
        if not self._digests:
            return ""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(given.strip().encode("latin-1")).digest()
        found = None
        for i, known in enumerate(self._digests):
            if hmac.compare_digest(digest, known):
                found = str(i)
        return found if scheme.lower() == "bearer" else None


class Hosts:
    """The names by which clients may address the server; none: any.

    A page of another site can make its own name resolve to this machine, and then send requests as if it came from
    here (DNS rebinding). The browser still sends that name. Addresses and localhost cannot be misused in this way."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = {"localhost", *(name.lower() for name in names)} if names and "*" not in names else None

    def knows(self, headers: Headers) -> bool:
        """Whether a request names this server. A client of HTTP/1.0 without a host is not a browser, so it may ask."""
        given = headers.get("host")
        if self._names is None or given is None:
            return True
        match = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([^:\[\]]+?)\.?)(?::\d{1,5})?", given.lower())
        if match is None:
            return False
        name = match[1] or match[2]
        return name in self._names or _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Front:
    """Wraps the application. ``answered`` is told the scope and status of every request."""

    def __init__(
        self, app: ASGIApp, keys: Keys, hosts: Hosts, answered: Callable[[Scope, int], None], *, log: bool
    ) -> None:
        self._app, self._keys, self._hosts, self._answered, self._log = app, keys, hosts, answered, log

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
            headers = Headers(scope=scope)
            facts["tenant"] = tenant = self._keys.tenant(headers)
            if (refused := self._refused(headers, tenant, scope["path"])) is not None:
                await error_response(refused)(scope, receive, named)
            else:
                await self._app(scope, receive, named)
        finally:
            self._answered(scope, status)
            if self._log and not (scope["path"] in PROBES and status in (200, 503)):
                _write(scope, name, status, time.perf_counter() - began, facts)

    def _refused(self, headers: Headers, tenant: str | None, path: str) -> ApiError | None:
        """The error of a request that is refused here; None: it may go on."""
        if not self._hosts.knows(headers):
            return ApiError(421, "host: expected a name of this server (see --allow-host)", code="unknown_host")
        if "transfer-encoding" in headers and "content-length" in headers:
            # A proxy may have used the other of the two lengths, and take the rest for another client's request.
            return ApiError(400, "content-length: expected none beside transfer-encoding", code="ambiguous_length")
        if tenant is None and path not in OPEN:
            return ApiError(401, "authorization: expected a valid API key", code="invalid_api_key")
        return None


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

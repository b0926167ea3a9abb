"""Errors in OpenAI's shape: a status, and an object that says what is wrong with which field."""

import re
from typing import Any

from pydantic import ValidationError

from jllama.formats.files import label

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
MAX_NAME = 64  # characters of a client's field name that an error repeats


class ApiError(Exception):
    """A request that was refused or has failed."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """The headers that belong to the status."""
        match self.status:
            case 401:
                return {"www-authenticate": "Bearer"}
            case 429 | 503:
                return {"retry-after": "1"}
            case 408 | 413:
                return {"connection": "close"}  # the rest of the body is not read
            case 400 if self.code == "ambiguous_length":
                return {"connection": "close"}
        return {}


def bad(param: str, message: str, *, code: str | None = None) -> ApiError:
    """The error for a field that cannot be honoured."""
    return ApiError(400, f"{param}: {message}", param=param, code=code)


def from_validation(error: ValidationError) -> ApiError:
    """The error for the first invalid field of a body."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path = [label(str(part), MAX_NAME) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        param = ".".join(path)
        return ApiError(400, f"{param}: no such parameter of this server", param=param, code="unknown_parameter")
    message = first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    named = re.match(r"(\w+): (.+)", message, re.DOTALL) if first["type"] == "value_error" else None
    if named is not None:  # a check over several fields names the field to change
        path, message = [*path, named[1]], named[2]
    param = ".".join(path) or None
    return ApiError(400, f"{param}: {message}" if param else message, param=param)

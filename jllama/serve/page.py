"""The chat page: one static file, and headers that let a browser run only the scripts in this file."""

import base64
import hashlib
import re
from pathlib import Path

from starlette.responses import Response

PAGE = Path(__file__).with_name("page.html").read_bytes()


def policy(page: bytes) -> str:
    """The Content-Security-Policy of a page with inline scripts and styles: these run, by their hash, and no others.
    Trusted types forbid the page's own script to parse a text as HTML."""

    def hashes(tag: bytes) -> str:
        parts = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(part).digest()).decode()}'" for part in parts)

    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {hashes(b'script')}",
            f"style-src {hashes(b'style')}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        ]
    )


HEADERS = {
    "content-security-policy": policy(PAGE),
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def response() -> Response:
    """The response with the page."""
    return Response(PAGE, media_type="text/html", headers=HEADERS)

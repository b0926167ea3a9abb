"""Chromium on the chat page, and what a test needs to see of it."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from serving import Live

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
TIMEOUT = 20_000.0  # milliseconds in which what is expected must be there


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """A browser that the machine has. Skips the test where there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright (make setup)")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"needs a browser, one of {', '.join(BROWSERS)} (apt-get install chromium)")
    api.expect.set_options(timeout=TIMEOUT)
    args = ["--no-sandbox"] if os.geteuid() == 0 else []  # chromium's sandbox does not run as root
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=args)
        yield found
        found.close()


class Chat:
    """The chat page in a browser's context of its own. `check` fails if the page had an error, or if anything was asked
    of another host."""

    def __init__(self, browser: Any, live: Live, **context: Any) -> None:
        self.live = live
        self.context = browser.new_context(**{"viewport": {"width": 1000, "height": 800}} | context)
        self.context.set_default_timeout(TIMEOUT)
        self.page = page = self.context.new_page()
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.context.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda message: self._log(message))
        self.prompt = page.get_by_role("textbox", name="Message")
        self.articles = page.get_by_role("article")
        self.said = page.get_by_role("status")

    def _log(self, message: Any) -> None:
        if message.type == "error" and "Failed to load resource" not in message.text:  # a status that a test wants
            self.errors.append(message.text)

    def open(self, turns: Sequence[str] = (), **settings: Any) -> "Chat":
        """Open the page with a conversation and settings that were kept."""
        wanted = {"temperature": "0", "max_tokens": "24"} | settings
        kept = [{"role": ("user", "assistant")[i % 2], "content": text, "note": ""} for i, text in enumerate(turns)]
        for name, value in (("settings", wanted), ("turns", kept)):
            script = f"localStorage.setItem({json.dumps('jllama.' + name)}, {json.dumps(json.dumps(value))})"
            self.context.add_init_script(f"if (!sessionStorage.length) {script}")
        self.page.goto(self.live.url)
        return self

    def ask(self, text: str) -> None:
        """Send a message by Enter."""
        self.prompt.fill(text)
        self.prompt.press("Enter")

    def button(self, name: str) -> Any:
        return self.page.get_by_role("button", name=name)

    def turns(self) -> list[dict[str, Any]]:
        """The conversation as it is kept."""
        return json.loads(self.page.evaluate("sessionStorage.getItem('jllama.turns')") or "[]")

    def answers_with(self, body: Callable[[], str] | str, status: int = 200) -> None:
        """Let the page's next questions be answered by the test and not by the server."""
        self.page.unroute_all()

        def fulfil(route: Any) -> None:
            kind = "text/event-stream" if status == 200 else "application/json"
            route.fulfill(status=status, content_type=kind, body=body if isinstance(body, str) else body())

        self.page.route("**/v1/chat/completions", fulfil)

    def check(self) -> None:
        assert not self.errors
        assert all(url.startswith((self.live.url, "data:")) for url in self.requests)
        self.context.close()


def stream(text: str, size: int = 7, *, end: str = "data: [DONE]\n\n", finish: str = "stop") -> str:
    """A text as the events of an answer, some characters in each."""
    parts = [text[i : i + size] for i in range(0, len(text), size)]
    chunks = [
        {
            "choices": [
                {"index": 0, "delta": {"content": part}, "finish_reason": finish if part is parts[-1] else None}
            ],
            "usage": {"prompt_tokens": 5, "completion_tokens": i + 1},
        }
        for i, part in enumerate(parts)
    ]
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + end

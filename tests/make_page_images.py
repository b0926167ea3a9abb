"""Make the pictures of the chat page in docs/images, from a server that runs:

jllama serve --model smollm2 --served-model-name smollm2 --max-len 2048
PYTHONPATH=tests/support python tests/make_page_images.py http://127.0.0.1:8000
"""

import argparse
import io
import json
from pathlib import Path
from typing import Any

from browser import browser
from PIL import Image

IMAGES = Path(__file__).parents[1] / "docs" / "images"
QUESTIONS = (
    "Write a Python function that reverses a string. Explain it in one sentence.",
    "What is a cache? Answer in two sentences.",
)
SETTINGS = {"temperature": "0.2", "top_p": "0.95", "seed": "1", "system": "", "max_tokens": ""}
WIDE, NARROW = {"width": 1000, "height": 780}, {"width": 390, "height": 700}
WAIT = 120_000.0  # milliseconds


def main() -> None:
    """Ask once, then show the conversation in each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    url = parser.parse_args().url
    with browser() as found:
        page = opened(found, url, [], WIDE, "light")
        for question in QUESTIONS:
            page.get_by_role("textbox", name="Message").fill(question)
            page.keyboard.press("Enter")
            page.get_by_role("button", name="Regenerate").wait_for(timeout=WAIT)
        page.wait_for_timeout(1000)
        page.evaluate("scrollTo(0, 0)")
        save(page, "page-light")
        turns = json.loads(page.evaluate("sessionStorage.getItem('jllama.turns')"))
        page = opened(found, url, turns, WIDE, "dark")
        page.get_by_role("button", name="Settings").click()
        save(page, "page-dark")
        save(opened(found, url, turns[:2], NARROW, "light"), "page-narrow")


def opened(found: Any, url: str, turns: list[dict[str, str]], size: dict[str, int], scheme: str) -> Any:
    """The page with a conversation that was kept."""
    page = found.new_context(viewport=size, color_scheme=scheme, device_scale_factor=1.5).new_page()
    for name, value in (("settings", SETTINGS), ("turns", turns)):
        page.add_init_script(f"localStorage.setItem('jllama.{name}', {json.dumps(json.dumps(value))})")
    page.goto(url)
    page.get_by_text("running").wait_for()
    return page


def save(page: Any, name: str) -> None:
    """A small file: few colours are enough."""
    page.evaluate("document.activeElement.blur()")
    image = Image.open(io.BytesIO(page.screenshot(animations="disabled"))).convert("RGB")
    image.quantize(256, dither=Image.Dither.NONE).save(IMAGES / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()

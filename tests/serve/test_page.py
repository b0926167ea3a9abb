"""The chat page in a real browser, on a real server with the embedded model."""

import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from browser import Chat, stream
from serving import Live, http, wait_for

from jllama.serve import page as chat_page
from jllama.serve.bridge import EngineThread

KEY = "sk-secret"
QUESTION = "Once upon a time"
LONG = "Tell me a long story about a bird"


@pytest.fixture
def open_chat(browser: Any, live: Live) -> Iterator[Callable[..., Chat]]:
    """Open the page of a server, by default of the one without a key."""
    made: list[Chat] = []

    def make(server: Live = live, **context: Any) -> Chat:
        made.append(Chat(browser, server, **context))
        return made[-1]

    yield make
    for chat in made:
        chat.check()


def slow_down(engine: EngineThread, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on each step takes a moment, so that an answer still comes while the test acts."""
    step = engine._engine.step

    def slowly() -> Any:
        time.sleep(0.2)
        return step()

    monkeypatch.setattr(engine._engine, "step", slowly)


def expect(what: Any) -> Any:
    from playwright.sync_api import expect

    return expect(what)


def test_a_conversation(live: Live, open_chat: Callable[..., Chat]) -> None:
    chat = open_chat().open()
    first = live.chat(QUESTION, max_tokens=24)["choices"][0]["message"]["content"]
    second = live.chat(QUESTION, first, "And then?", max_tokens=24)["choices"][0]["message"]["content"]
    expect(chat.page).to_have_title("demo · jllama")
    expect(chat.page.get_by_text("context 512")).to_be_visible()

    chat.ask(QUESTION)
    expect(chat.button("Regenerate")).to_be_visible()
    assert [turn["content"] for turn in chat.turns()] == [QUESTION, first]
    assert words(chat.articles.nth(1).locator(".text").inner_text()) == words(first)
    assert words(chat.said.inner_text()) == words(f"{first} Ended at the limit of tokens.")  # once, when it is there
    expect(chat.page.locator("#live")).to_contain_text(
        re.compile(r"\d tokens/s · first after \d+\.\d\d s · \d+ of 512")
    )
    chat.ask("And then?")
    expect(chat.articles).to_have_count(4)
    expect(chat.button("Regenerate")).to_be_visible()
    assert [turn["content"] for turn in chat.turns()] == [QUESTION, first, "And then?", second]

    chat.button("Regenerate").click()
    expect(chat.button("Regenerate")).to_be_visible()
    assert chat.turns()[3]["content"] == second

    chat.prompt.fill("a draft")
    chat.button("Edit").click()
    expect(chat.prompt).to_have_value("And then?")
    chat.prompt.press("Escape")
    expect(chat.prompt).to_have_value("a draft")
    chat.button("Edit").click()
    chat.ask(QUESTION)
    expect(chat.articles.nth(2)).to_contain_text(QUESTION)
    expect(chat.button("Regenerate")).to_be_visible()

    chat.prompt.fill("a draft")
    chat.page.reload()
    expect(chat.articles).to_have_count(4)
    expect(chat.prompt).to_have_value("a draft")
    chat.button("New chat").click()
    expect(chat.articles).to_have_count(0)
    chat.button("Bring back").click()
    expect(chat.articles).to_have_count(4)


def test_settings_are_sent_and_kept(live: Live, open_chat: Callable[..., Chat]) -> None:
    chat = open_chat().open()
    settings = {"temperature": 1.5, "top_p": 1, "max_tokens": 6, "seed": 2**40}
    chat.button("Settings").click()
    chat.page.get_by_label("System prompt").fill("Be brief.")
    for label, value in zip(("Temperature", "Top p", "Tokens at most", "Seed"), settings.values(), strict=True):
        chat.page.get_by_label(label).fill(str(value))
    chat.page.get_by_label("Seed").fill("-1")  # not allowed: the one before stays
    chat.button("Close settings").click()
    with chat.page.expect_request("**/v1/chat/completions") as asked:
        chat.ask("Hello")
    sent = asked.value.post_data_json
    assert {name: sent[name] for name in settings} == settings
    assert sent["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    expect(chat.button("Regenerate")).to_be_visible()
    answer = live.post("/v1/chat/completions", sent | {"stream": False, "stream_options": None}).json()
    assert chat.turns()[1]["content"] == answer["choices"][0]["message"]["content"]  # the seed's

    chat.page.reload()
    chat.button("Settings").click()
    expect(chat.page.get_by_label("System prompt")).to_have_value("Be brief.")
    expect(chat.page.get_by_label("Temperature")).to_have_value("1.5")
    chat.button("Back to defaults").click()
    expect(chat.page.get_by_label("Temperature")).to_have_value("0.7")


def test_stop_and_a_reload_in_the_middle(
    live: Live, engine: EngineThread, open_chat: Callable[..., Chat], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = open_chat().open(max_tokens="")
    whole = live.chat(LONG)
    assert whole["usage"]["completion_tokens"] > 80  # some seconds, at 16 a step
    text = whole["choices"][0]["message"]["content"]
    slow_down(engine, monkeypatch)
    answer = chat.articles.nth(1).locator(".text")

    chat.ask(LONG)
    expect(answer).to_contain_text(re.compile(r"\w"))
    chat.button("Stop").click()
    expect(chat.articles.nth(1)).to_contain_text("Stopped.")
    wait_for(live.idle)
    assert chat.turns()[1]["note"] == "stopped"
    part = chat.turns()[1]["content"]
    assert part != text
    assert text.startswith(part)

    chat.button("Regenerate").click()
    expect(answer).to_contain_text(re.compile(r"\w"))
    chat.page.reload()
    wait_for(live.idle)
    expect(chat.articles.nth(1)).to_contain_text("Interrupted when the page closed.")
    part = chat.turns()[1]["content"]
    assert part not in ("", text)
    assert text.startswith(part)


def test_waiting_in_the_queue_and_leaving_it(live: Live, open_chat: Callable[..., Chat]) -> None:
    chat = open_chat().open()
    body = {"prompt": "a", "n": 20, "max_tokens": 400, "ignore_eos": True, "stream": True, "temperature": 0}
    with live.raw(http("/v1/completions", body)) as held:
        assert held.recv(1)
        chat.ask(QUESTION)
        expect(chat.page.locator("#live")).to_contain_text(re.compile(r"2 running · \d\d waiting"))
        expect(chat.button("Stop")).to_be_visible()
        chat.page.keyboard.press("Escape")
        expect(chat.articles.nth(1)).to_contain_text("Stopped.")
        expect(chat.button("Try again")).to_be_visible()
    wait_for(live.idle)
    chat.button("Try again").click()
    expect(chat.button("Regenerate")).to_be_visible()


def test_a_key_is_asked_for(make_live: Callable[..., Live], open_chat: Callable[..., Chat]) -> None:
    keyed = make_live(api_keys=(KEY,))
    chat = open_chat(keyed).open()
    field = chat.page.get_by_label("API key")
    expect(field).to_be_focused()
    for wrong, says in (("sk-wrong", "The server refused this key."), ("schlüssel", "printable ASCII")):
        field.fill(wrong)
        field.press("Enter")
        expect(chat.page.locator("#key-wrong")).to_contain_text(says)
        expect(field).to_be_focused()
    field.fill(KEY)
    chat.button("Use key").click()
    expect(field).to_be_hidden()
    chat.ask(QUESTION)
    expect(chat.button("Regenerate")).to_be_visible()

    chat.page.reload()  # the tab keeps it
    expect(chat.page.get_by_text("context 512")).to_be_visible()
    expect(field).to_be_hidden()
    assert chat.page.evaluate("Object.values(localStorage).join()").count(KEY) == 0
    chat.page.evaluate("sessionStorage.setItem('jllama.key', '\"sk-old\"')")
    chat.page.reload()
    expect(field).to_be_focused()
    chat.ask("What I wrote")
    expect(field).to_be_focused()
    expect(chat.prompt).to_have_value("What I wrote")  # nothing is lost
    expect(chat.articles).to_have_count(2)
    assert all(KEY not in url for url in chat.requests)


def test_the_page_needs_no_key_and_tells_nothing(make_live: Callable[..., Live], live: Live) -> None:
    keyed = make_live(api_keys=(KEY,), names=("secret-model",))
    answer = keyed.client.get("/")
    assert answer.status_code == 200
    assert answer.content == live.client.get("/").content == chat_page.PAGE
    assert keyed.client.head("/").headers["content-type"] == "text/html; charset=utf-8"
    assert keyed.client.post("/").status_code == 405


def test_failures_are_told_and_can_be_tried_again(live: Live, open_chat: Callable[..., Chat]) -> None:
    chat = open_chat().open()
    note = chat.articles.last.locator(".note")
    error = '{"error": {"message": "the queue is full", "type": "rate_limit_error", "param": null, "code": null}}'
    chat.answers_with(error, 429)
    chat.ask(QUESTION)
    expect(note).to_have_text("the queue is full")
    expect(chat.said).to_have_text("the queue is full")
    for end, says in ((f"data: {error}\n\n", "the queue is full"), ("", "The connection ended before the answer did.")):
        chat.answers_with(stream("A part", end=end))
        chat.button("Try again").or_(chat.button("Regenerate")).click()
        expect(note).to_have_text(says)
        expect(chat.articles.last.locator(".text")).to_have_text("A part")
    chat.page.unroute_all()
    chat.page.route("**/v1/chat/completions", lambda route: route.abort())
    chat.button("Regenerate").click()
    expect(note).to_have_text("The server cannot be reached.")
    chat.page.unroute_all()
    with chat.page.expect_request("**/v1/chat/completions") as asked:
        chat.ask("Then this")
    joined = f"{QUESTION}\n\nThen this"  # roles stay in turn
    assert [message["content"] for message in asked.value.post_data_json["messages"]] == [joined]
    expect(chat.button("Regenerate")).to_be_visible()


FOCUSED = """() => {
  const e = document.activeElement, style = getComputedStyle(e.id === "prompt" ? e.parentElement : e);
  const seen = e.matches(":focus-visible") && (style.outlineStyle !== "none" || style.boxShadow.includes("3px"));
  return [e.id || e.ariaLabel || e.textContent, seen];
}"""


def test_keyboard_alone(open_chat: Callable[..., Chat]) -> None:
    chat = open_chat().open()
    keys = chat.page.keyboard
    expect(chat.prompt).to_be_focused()
    keys.type("One line")
    keys.press("Shift+Enter")
    keys.type("another")
    keys.press("Enter")
    expect(chat.button("Regenerate")).to_be_visible()
    assert chat.turns()[0]["content"] == "One line\nanother"
    expect(chat.prompt).to_be_focused()

    reached = []
    for _ in range(6):
        keys.press("Shift+Tab")
        reached.append(chat.page.evaluate(FOCUSED))
    order = ["Regenerate", "Copy answer", "Edit", "open-settings", "theme", "new"]
    assert reached == [[name, True] for name in order]  # each of them with a visible ring

    for _ in range(2):
        keys.press("Tab")
    keys.press("Enter")
    expect(chat.page.get_by_role("dialog", name="Settings")).to_be_visible()
    assert chat.page.evaluate("document.activeElement.closest('dialog') !== null")
    keys.press("Escape")
    expect(chat.button("Settings")).to_be_focused()
    for _ in range(4):
        keys.press("Tab")
    expect(chat.prompt).to_be_focused()
    assert chat.page.evaluate(FOCUSED) == ["prompt", True]


def test_light_and_dark(open_chat: Callable[..., Chat]) -> None:
    chat = open_chat(color_scheme="dark").open()
    paper, switch = "getComputedStyle(document.body).backgroundColor", chat.button("Dark theme")
    dark = chat.page.evaluate(paper)
    expect(switch).to_have_attribute("aria-pressed", "true")
    switch.click()
    light = chat.page.evaluate(paper)
    assert light != dark
    chat.page.reload()
    assert chat.page.evaluate(paper) == light  # chosen
    switch.click()
    assert chat.page.evaluate(paper) == dark
    chat.page.emulate_media(color_scheme="light")
    assert chat.page.evaluate(paper) == light  # as the system has it again
    expect(switch).to_have_attribute("aria-pressed", "false")


def test_a_narrow_screen(open_chat: Callable[..., Chat]) -> None:
    wide = (
        f"```\n{'x' * 300}\n```\n\n|{'a column|' * 12}\n|{'-|' * 12}\n\n{'word' * 100}\n\n{'https://example.com/' * 9}"
    )
    chat = open_chat(viewport={"width": 320, "height": 560}, has_touch=True, is_mobile=True)
    chat.open(["y" * 300, wide])
    expect(chat.page.locator("table")).to_be_visible()
    assert (
        chat.page.evaluate("document.documentElement.scrollWidth") == 320
    )  # wide code and tables scroll by themselves
    for name in ("New chat", "Dark theme", "Settings", "Send"):
        box = chat.button(name).bounding_box()
        assert min(box["width"], box["height"]) >= 36
        assert 0 <= box["x"] <= 320 - box["width"]
    chat.answers_with(stream("A line\n\n" * 30))
    chat.ask(QUESTION)
    expect(chat.button("Regenerate")).to_be_in_viewport()  # follows the answer to its end
    expect(chat.prompt).to_be_in_viewport()


def words(text: str) -> list[str]:
    return text.split()

"""What a model writes on the chat page: Markdown is shown, and nothing that it holds ever runs or is loaded."""

import random
import re
from collections.abc import Iterator
from typing import Any

import pytest
from browser import Chat, stream
from serving import Live

from jllama.serve import page as chat_page


@pytest.fixture
def chat(browser: Any, live: Live) -> Iterator[Chat]:
    made = Chat(browser, live)
    yield made
    made.check()


def test_the_policy_lets_only_the_page_s_own_script_run() -> None:
    policy = chat_page.HEADERS["content-security-policy"]
    assert len(re.findall(r"'sha256-[\w+/]{43}='", policy)) == 2
    for part in ("default-src 'none'", "connect-src 'self'", "trusted-types 'none'", "frame-ancestors 'none'"):
        assert f"{part};" in f"{policy};"
    assert "unsafe" not in policy
    page = chat_page.PAGE.decode()
    assert not re.search(r"innerHTML|insertAdjacent|document\.write|\beval\b|<[^>]+\s(?:on\w+|style|src)=", page)
    assert set(re.findall(r"<(?:link|a|form)\b[^>]+?href=\"(\w+)", page)) == {"data"}


def test_what_is_injected_does_not_run(chat: Chat) -> None:
    """Were there a hole in the page, the browser would still refuse."""
    chat.open()
    tried = chat.page.evaluate(
        """async () => {
          const seen = [], add = node => document.body.append(node);
          addEventListener("securitypolicyviolation", event => seen.push(event.effectiveDirective));
          const attempts = [
            () => { document.body.innerHTML += "<img src=x onerror=hit=1>"; },
            () => { const s = document.createElement("script"); s.text = "hit = 1"; add(s); },
            () => { const s = document.createElement("script"); s.src = "data:text/javascript,hit=1"; add(s); },
            () => { const d = document.createElement("div"); d.setAttribute("onclick", "hit = 1"); add(d); d.click(); },
            () => { const a = document.createElement("a"); a.href = "javascript:hit=1"; add(a); a.click(); },
            () => { const i = new Image(); i.src = "/nothing.png"; add(i); },
            () => { const f = document.createElement("iframe"); f.src = "https://evil.example/"; add(f); },
            () => fetch("https://evil.example/"),
          ];
          let thrown = 0;
          for (const attempt of attempts) try { await attempt(); } catch { thrown++; }
          await new Promise(done => setTimeout(done, 50));
          return [thrown, [...new Set(seen)].sort(), typeof hit];
        }"""
    )
    kinds = ["connect-src", "frame-src", "img-src", "require-trusted-types-for"]
    assert tried[0] >= 4
    assert set(kinds) <= set(tried[1])
    assert tried[2] == "undefined"
    chat.errors.clear()  # the browser's words on each


MARKDOWN = """# Title

A *slanted*, **bold**, ***both*** and ~~gone~~ word, `co*de*`, snake_case_word, 2 * 3 * 4 and \\*stars\\*.
Next line, [a **link**](https://example.com/a_(b)), <https://example.com/c>, https://example.com/d_e_f.

3. three
   - nested
     more

   ```python
   x = "<b>"
   ```
4. four

> quoted
> > twice

| l | r |
|:--|--:|
| a \\| b | `c` |

---
~~~
unclosed *code*
"""
HTML = (
    "<h3>Title</h3><p>A <em>slanted</em>, <strong>bold</strong>, <strong><em>both</em></strong> and <del>gone</del> "
    "word, <code>co*de*</code>, snake_case_word, 2 * 3 * 4 and *stars*.\nNext line, "
    '<a href="https://example.com/a_(b)">a <strong>link</strong></a>, <a href="https://example.com/c">'
    'https://example.com/c</a>, <a href="https://example.com/d_e_f">https://example.com/d_e_f</a>.</p>'
    '<ol start="3"><li><p>three</p><ul><li><p>nested\nmore</p></li></ul><figure class="code"><figcaption>'
    '<span class="name">python</span></figcaption><pre aria-label="Code, python">'
    '<code>x = "&lt;b&gt;"</code></pre></figure></li>'
    "<li><p>four</p></li></ol><blockquote><p>quoted</p><blockquote><p>twice</p></blockquote></blockquote>"
    '<div class="scroll"><table><thead><tr><th>l</th><th class="right">r</th></tr></thead><tbody><tr><td>a | b</td>'
    '<td class="right"><code>c</code></td></tr></tbody></table></div><hr><figure class="code"><figcaption>'
    '<span class="name">text</span></figcaption><pre aria-label="Code"><code>unclosed *code*</code></pre></figure>'
)
SHOWN = """node => {
  const copy = node.cloneNode(true);
  for (const e of copy.querySelectorAll("button")) e.remove();
  for (const e of copy.querySelectorAll("*")) for (const name of ["tabindex", "target", "rel"]) e.removeAttribute(name);
  return copy.innerHTML;
}"""


@pytest.mark.parametrize("size", [1, 9999])
def test_markdown_is_shown_whatever_the_chunks(chat: Chat, size: int) -> None:
    chat.open()
    chat.answers_with(stream(MARKDOWN, size))
    chat.ask("Show")
    chat.button("Regenerate").wait_for()
    answer = chat.articles.nth(1).locator(".text")
    assert answer.evaluate(SHOWN) == HTML
    assert {link.get_attribute("rel") for link in answer.get_by_role("link").all()} == {"noopener noreferrer nofollow"}
    chat.context.grant_permissions(["clipboard-read", "clipboard-write"])
    chat.button("Copy code").first.click()
    chat.page.get_by_text("Copied").first.wait_for()
    assert chat.page.evaluate("navigator.clipboard.readText()") == 'x = "<b>"'


HOSTILE = [
    "<script>hit=1</script>",
    "<img src=x onerror=hit=1><svg onload=hit=1><iframe src=javascript:hit=1></iframe>",
    "<style>*{display:none}</style><base href=//evil.example><meta http-equiv=refresh content=0;url=//evil.example>",
    "[a](javascript:hit=1) [b](JaVaScRiPt:hit=1) [c](java\tscript:hit=1) [d](\x01javascript:hit=1)",
    "[e](&#106;avascript:hit=1)",
    "[a](data:text/html,<script>hit=1</script>) [b](vbscript:x) [c](file:///etc/passwd) [d](blob:https://evil.example/x)",
    "[a](//evil.example) [b](/v1/models) [c](#said) [d](?x) <javascript:hit=1> <mailto:a@b.example>",
    '![a](https://evil.example/steal.png) ![b](https://evil.example/x "t") [![c](https://evil.example)](javascript:hit=1)',
    '[a](https://evil.example/"onmouseover="hit=1) [b](https://evil.example "x\\" onclick=x") https://e.example/\'"><b>',
    '```"><script>hit=1</script>\n</code></pre><script>hit=1</script>\n```',
    "| <img src=x onerror=hit=1> | b |\n|:--|--|\n| <svg/onload=hit=1> | [x](javascript:hit=1) |",
    "\ufffc\ufffc *\ufffc* `\ufffc` [\ufffc](https://a.example/\ufffc) \u202e\u2066 \0 \ud7ff",
    "[x](https://user:pw@evil.example/) [y](https://evil\u2024example) [z](http://[::1) __proto__ **constructor**",
]
LARGE = [
    "> " * 9000 + "x",
    "- " * 9000 + "x",
    "\n".join("  " * i + "- x" for i in range(400)),
    "[" * 19000,
    "[a](" * 4500,
    "![" * 9000 + "](x)",
    "**a " * 4800,
    "*a _b ~~c " * 1900,
    "***a** b* " * 1900,
    "*" * 19000,
    "".join("`" * (i % 150) + "a" for i in range(250)),
    "[a](x" + " " * 19000,
    "a" + " " * 19000 + "b",
    "# " + "# " * 9000 + "x",
    "https://" * 2400 + "." * 800,
    "<https://" * 2000,
    "|" * 19000 + "\n" + "|-" * 9000,
    "- - - - " * 2000 + "x",
    "\\" * 19000,
    "x" * 400_000,
    "1. a\n" * 9000,
    "```\n" * 9001,
]
ALLOWED = """() => {
  const names = {
    A: ["href", "target", "rel"], CODE: [], DEL: [], EM: [], STRONG: [], P: [], H3: [], H4: [], H5: [], H6: [],
    HR: [],
    BLOCKQUOTE: [], UL: [], OL: ["start"], LI: [], TABLE: [], THEAD: [], TBODY: [], TR: [], TH: ["class"],
    TD: ["class"],
    DIV: ["class", "tabindex"], FIGURE: ["class"], FIGCAPTION: [], SPAN: ["class"], PRE: ["tabindex", "aria-label"],
    BUTTON: ["class", "type", "aria-label"],
  };
  const bad = [];
  for (const e of document.querySelectorAll(".assistant .text *")) {
    if (!(e.tagName in names) || [...e.attributes].some(a => !names[e.tagName].includes(a.name))) bad.push(e.outerHTML);
    if (e.tagName === "A" && !["https:", "http:", "mailto:"].includes(e.protocol)) bad.push(e.href);
    let depth = 0;
    for (let p = e; p; p = p.parentElement) depth++;
    if (depth > 60) bad.push("too deep");
  }
  return [bad, typeof hit, document.title];
}"""


def test_hostile_markdown_is_text(chat: Chat) -> None:
    texts = [*HOSTILE, *LARGE]
    chat.open([part for text in texts for part in ("?", text)])
    chat.answers_with(stream("\n\n".join(HOSTILE), 3))
    chat.ask("Attack")
    chat.button("Regenerate").wait_for()
    assert chat.articles.count() == 2 * len(texts) + 2
    assert chat.page.evaluate(ALLOWED) == [[], "undefined", "demo · jllama"]
    streamed = chat.articles.last.locator(".text").inner_text()
    for text in (
        "<script>hit=1</script>",
        "<svg/onload=hit=1>",
        "<style>*{display:none}</style>",
        "[b](JaVaScRiPt:hit=1)",
    ):
        assert text in streamed
    assert "evil.example" in streamed
    chat.button("Copy answer").last.click()
    assert chat.page.evaluate("typeof hit") == "undefined"


def test_no_text_is_lost(chat: Chat) -> None:
    """Random marks: each letter is shown, in its place."""
    draw = random.Random(7)
    marks = [
        "q",
        "z",
        "qz",
        " ",
        "  ",
        "\n",
        "\n\n",
        "*",
        "**",
        "_",
        "~~",
        "`",
        "```\n",
        "\n```",
        "- ",
        "1. ",
        "\n> ",
        "#",
    ]
    marks += [
        "\n# ",
        "[",
        "]",
        "](",
        ")",
        "!",
        "<",
        ">",
        "\\",
        "&",
        "\t",
        "***",
        "---",
        "\n  - ",
        "https://q.z/",
        "\ufffc",
    ]
    texts = ["".join(draw.choices(marks, k=draw.randint(1, 40))) for _ in range(400)]
    chat.open([part for text in texts for part in ("?", text)])
    chat.articles.nth(2 * len(texts) - 1).wait_for(state="attached")
    shown = chat.page.evaluate(
        """() => [...document.querySelectorAll(".assistant .text")].map(node => {
          return [...node.textContent].filter(c => "qz".includes(c)).join("");
        })"""
    )
    links = re.compile(r"\]\(")
    plain = [i for i, text in enumerate(texts) if not links.search(text)]
    assert len(plain) > 150
    for i in plain:
        assert shown[i] == re.sub(r"[^qz]", "", texts[i]), texts[i]
    assert chat.page.evaluate(ALLOWED)[:2] == [[], "undefined"]

"""Twenty varied conversations for chat templates: all kinds of typed text, without names of control tokens."""

SYSTEMS = (None, "You are a pirate.", "Answer briefly.\n\nIn two lines.  ", "")
TURNS = (
    ("Hi", "Hello! How can I help?", "What is 2+2?"),
    ("  leading and trailing spaces  ", " an answer with them ", "\ttabs\tand\nnew\r\nlines\n\n\n"),
    ("",),
    ("What does `if (a < b && c > d) { return x[i]; }` do?\n\n```c\nint main(void) {\n    return 0;\n}\n```",),
    ("Здравствуйте, как дела? 你好，世界！ こんにちは 안녕하세요 مرحبا", "नमस्ते", "ẞ ﬁ ǅ Ａ １２３ ½ ² ٣"),
    ("emoji 🙂👍🏽👨‍👩‍👧‍👦🇩🇪 and a combining e\u0301", "🎉" * 12, "ok"),
    ("1234567890 3.14159 1,000,000 0x1F 2026-11-27T12:00:00Z",),
    ("I'm, you're, he'll, WE'VE, don't, it's 'quoted' \"twice\"", "Yes.", "No.", "Maybe.", "So?"),
    ("<b>html</b> & </b> <<SYS>> [x](y) {{ name }} {% raw %} | < > << >> [ ] <|", "> quote", "|>"),
    (" ", "\n", "  \n  two  spaces  "),
)
CONVERSATIONS = [
    ([] if system is None else [{"role": "system", "content": system}])
    + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    for n, turns in enumerate(TURNS)
    for system in (SYSTEMS[n % 4], SYSTEMS[(n + 1 + n // 4) % 4])
]

"""A fixed set of varied strings for tokenizers: letters, digits, white space, emoji, code, random characters."""

from collections.abc import Callable, Sequence
from random import Random

_ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "0123456789",
    "           \t\n\r\u00a0\u2003\u3000\u200b\u0085\u2028",
    "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~",
    "éèüßñçøåÆŒĳﬁſİıǅẞΩµªº",
    "привет мир Ђжщъыь",
    "你好世界中文字符汉字漢字",
    "こんにちはカタカナ한국어안녕",
    "مرحبا שלום हिन्दी ไทย தமிழ்",
    "🙂👍🏽👨‍👩‍👧🇩🇪❤️🎉🧑🏿‍🚀☃️",
    "½²³¼①Ⅷ٣४๕１２３𝟜",
    "\u0301\u0308\u20dd\u200d\ufe0f\ufeff\u00ad",
)
_WORDS = ("the", " The", "don't", " I'LL", "'s", "we've", "HTTPServer", "camelCase", " x_1", "2026-11-27", "3.14",
          "1e10", " 1234567", "\n\n", "    ", "\r\n", "http://a.b/c?d=e&f", "<|im_end", "|>",
          "def f(x):\n\treturn x**2\n", "你好", "Привет", "🙂", "naïve", "…", " —", "“q”", "A.B.C.",
          "αβγ", "ﷺ")  # fmt: skip


def _pick(random: Random, values: Sequence[str]) -> str:
    return values[int(random.random() * len(values))]


def _letters(random: Random) -> str:
    return "".join(_pick(random, _pick(random, _ALPHABETS)) for _ in range(1 + int(random.random() * 24)))


def _of_one_alphabet(random: Random) -> str:
    alphabet = _pick(random, _ALPHABETS)
    return "".join(_pick(random, alphabet) for _ in range(1 + int(random.random() * 40)))


def _words(random: Random) -> str:
    return _pick(random, ("", " ")).join(_pick(random, _WORDS) for _ in range(1 + int(random.random() * 12)))


def _anything(random: Random) -> str:
    codes = (int(random.random() ** 3 * 0x2FFFF) + 1 for _ in range(1 + int(random.random() * 16)))
    return "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000) or "x"


def strings(count: int = 2000, seed: int = 7) -> list[str]:
    """``count`` strings, of four kinds in turn."""
    random = Random(seed)
    sorts: tuple[Callable[[Random], str], ...] = (_letters, _of_one_alphabet, _words, _anything)
    return [sorts[i % len(sorts)](random) for i in range(count)]

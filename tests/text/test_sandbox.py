"""Untrusted chat templates are programs: what they may do, and the limits that stop them."""

from typing import Any

import pytest

from jllama.errors import InputError
from jllama.text import sandbox
from jllama.text.sandbox import Template

pytest.importorskip("jinja2")

LONG = "{% set s = 'x' * 100000 %}"
MANY = "{% set r = range(100000) %}"
DOUBLE = "{%% set ns = namespace(s=%s) %%}{%% for a in range(100) %%}{%% set ns.s = %s %%}{%% endfor %%}{{ ns.s }}"


def render(text: str, **variables: Any) -> str:
    return Template(text, "t.jinja").render(variables)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{ 'a' ~ 1 ~ x }}", "a1é<b"),
        ("{{ x | tojson }} {{ {'b': [1, none], 'a': x} | tojson }}", '"é<b" {"b": [1, null], "a": "é<b"}'),
        ("{{ {'a': 1} | tojson(indent=2) }}", '{\n  "a": 1\n}'),
        ("{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i > 3 %}{% break %}{% endif %}{{ i }}"
         "{% endfor %}", "023"),
        ("{% generation %}{{ x }}{% endgeneration %}", "é<b"),
        ("{% set ns = namespace(n=0) %}{% for i in [1, 2] %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}", "3"),
        ("{% set a, b = (1, 2) %}{{ a }}{{ [1, (2, 3)] }}{% for k, v in {'x': 1}.items() %}{{ k }}{{ v }}{% endfor %}",
         "1[1, (2, 3)]x1"),
        ("{{ y | selectattr('a', 'equalto', 2) | map(attribute='a') | join(',') }}{{ y[::-1] | length }}", "22"),
        ("{{ 'a,b'.split(',') | join('-') }}{{ '{}{:>3}'.format(1, 2) }}{{ '%s' % 'z' }}", "a-b1  2z"),
        ("{{ x | upper | replace('B', 'c') }}", "É<c"),
        ("  {% if true %}\n  a\n  {% endif %}\n", "  a\n"),  # blocks are trimmed
        ("{% macro f(a) %}[{{ a }}]{% endmacro %}{{ f(1) ~ f('b') }}", "[1][b]"),
    ],
)  # fmt: skip
def test_what_chat_templates_do(text: str, expected: str) -> None:
    assert render(text, x="é<b", y=[{"a": 1}, {"a": 2}]) == expected


def test_the_time_is_that_of_the_machine() -> None:
    assert render("{{ strftime_now('%Y') }}").startswith("20")


def test_a_template_raises_in_its_own_words() -> None:
    with pytest.raises(InputError, match=r"^t\.jinja: roles must alternate$"):
        render("{{ raise_exception('roles must\n alternate') }}")


@pytest.mark.parametrize(
    "text",
    [
        "{{ 'x' * 10**10 }}",
        "{{ 'x'.center(10**10) }}",
        "{{ 'x' | center(10000000000) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '{:{}}'.format(1, 1000000000) }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ strftime_now('%1000000000d') }}",
        "{{ (9 ** 9 ** 9) ** 9 ** 9 }}",
        "{{ [1] | tojson(indent=1000000000) }}",
        "{{ 'a\nb' | indent(1000000000) }}",
        LONG + "{{ s.replace('x', s) }}",
        LONG + "{{ s | replace('x', s) }}",
        LONG + "{{ range(100000) | join(s) }}",
        LONG + "{{ s.join(s) }}",
        LONG + "{% for i in range(100000) %}{{ s }}{% endfor %}",
        LONG + "{% set z %}{% for i in range(100000) %}{{ s }}{% endfor %}{% endset %}",
        DOUBLE % ("'xxxxxxxxxx'", "ns.s ~ ns.s"),
        DOUBLE % ("'xxxxxxxxxx'", "ns.s + ns.s"),
        DOUBLE % ("[1]", "ns.s + ns.s"),
        DOUBLE % ("[1]", "[ns.s, ns.s]"),
        DOUBLE % ("1", "(ns.s, ns.s)"),
        DOUBLE % ("1", "{'a': ns.s, 'b': ns.s}"),
        MANY + "{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}{% endfor %}{% endfor %}",
        "{{ range(10000000) }}",
    ],
)
def test_what_would_not_end_or_fit_is_stopped(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.2)
    stopped = (
        r"creates more characters or elements than it may|has an output of more than|computes an integer of more than"
        r"|uses a format string with too large a width|takes longer than|Range too big"
    )
    with pytest.raises(InputError, match=rf"^t\.jinja: ({stopped})"):
        render(text)


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ x.append(1) }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ '{0.__class__.__mro__}'.format(x) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% include 'x' %}",
        "{{ 1 / 0 }}",
        "{{ nothing.at.all }}",
        "{{ nothing() }}",
        "{{ x.pop() }}",
        "{{ 'a' + 1 }}",
    ],
)
def test_what_it_may_not_do_is_one_line(text: str) -> None:
    with pytest.raises(InputError, match=r"^t\.jinja: .+$") as caught:
        render(text, x=[1])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["{% if %}", "{{", "{% for %}", "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "x" * (1 << 19)]
)
def test_what_is_no_template_is_said(text: str) -> None:
    with pytest.raises(InputError, match=r"^t\.jinja: expected "):
        Template(text, "t.jinja")


def test_a_long_conversation_is_not_too_much() -> None:
    messages = [{"role": "user", "content": "word " * 2000}] * 200
    text = "{% for m in messages %}{{ m.role + ': ' ~ m.content | trim | replace('word', 'words') }}\n{% endfor %}"
    assert len(render(text, messages=messages)) > 2_000_000

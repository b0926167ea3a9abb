"""Checks `tools` and `tool_choice` of a request, and builds the grammar of a required call."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jllama.errors import InputError
from jllama.formats.files import label
from jllama.text.grammars import check_schema, json_grammar, lark_text
from jllama.text.tokenizer import Tokenizer
from jllama.text.tool_calls import Style

MAX_TOOLS = 128
MAX_CALLS = 8  # most calls in one answer that must call
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


def check_tools(tools: Any) -> dict[str, Any]:
    """The functions' names and the schemas of their parameters, or an `InputError` if this is not a list of tools."""
    if not isinstance(tools, list) or not 1 <= len(tools) <= MAX_TOOLS:
        raise InputError(f"tools: expected a list of 1 to {MAX_TOOLS} tools, found something else")
    functions: dict[str, Any] = {}
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict):
            raise InputError(f'tools: {i}: expected {{"type": "function", "function": {{...}}}}, found something else')
        name = function.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name in functions:
            expected = "a name of its own of up to 64 letters, digits, _ and -"
            raise InputError(f"tools: {i}: function: name: expected {expected}, found {label(name)!r}")
        parameters = function.get("parameters")
        where = f"tools: {i}: function: parameters"
        functions[name] = {"type": "object"} if parameters is None else check_schema(parameters, where)
    return functions


def chosen(choice: Any, functions: Mapping[str, Any]) -> list[str]:
    """The functions of which one must be called; empty if none must (``"none"``, ``"auto"``, None)."""
    if choice in (None, "none", "auto"):
        return []
    if choice == "required":
        return list(functions)
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        expected = '"none", "auto", "required" or {"type": "function", "function": {"name": ...}}'
        raise InputError(f"tool_choice: expected {expected}, found {label(choice)!r}")
    if name not in functions:
        raise InputError(f"tool_choice: expected a function of tools, found {label(name)!r}")
    return [name]


def call_grammar(
    functions: Mapping[str, Any], names: Sequence[str], style: Style, tokenizer: Tokenizer, *, parallel: bool = True
) -> str:
    """The Lark grammar of answers that are calls of ``names`` in a format: one call, or with ``parallel`` up to
    `MAX_CALLS`. For `jllama.text.grammars.Grammars.compile` of kind ``grammar``."""
    key = "parameters" if style == "llama3" else "arguments"

    def mark(name: str) -> str:
        """A control token where the tokenizer has one of this name, else its letters."""
        ids = [t.id for t in tokenizer.control.tokens if t.text == name]
        return f"<[{ids[0]}]>" if ids else lark_text(name)

    begin, end = lark_text(""), lark_text("")
    between = lark_text({"llama3": "; ", "hermes": "\n", "mistral": ", "}[style])
    one = " | ".join(f"call_{i}" for i in range(len(names)))
    if style == "hermes":
        one = f'{mark("<tool_call>")} "\\n" ({one}) "\\n" {mark("</tool_call>")}'
    elif style == "mistral":
        begin, end = f'{mark("[TOOL_CALLS]")} "["', lark_text("]")
    more = f" ({between} call){{0,{MAX_CALLS - 1}}}" if parallel else ""
    lines = [f"start: {begin} call{more} {end}", f"call: {one}"]
    for i, name in enumerate(names):
        # The arguments are a JSON text of their own: references in a schema begin at its root.
        head = lark_text(f'{{"name": {json.dumps(name)}, "{key}": ')
        lines += [f'call_{i}: {head} arguments_{i} "}}"', f"arguments_{i}: %json {json_grammar(functions[name])}"]
    return "\n".join(lines)

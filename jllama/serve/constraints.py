"""Constraints of a request: response formats, schemas, grammars, and the tools that an answer may or must call."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jllama.errors import InputError
from jllama.serve.errors import ApiError, bad
from jllama.serve.model import Model
from jllama.serve.schema import ChatBody, Drawing
from jllama.text.grammars import Grammar, Kind
from jllama.text.tool_calls import Style
from jllama.text.tool_choice import call_grammar, check_tools, chosen


@dataclass(frozen=True)
class Tools:
    """The functions that an answer may call, and the form in which this model calls them."""

    listed: list[dict[str, Any]]  # as the request has them, for the template
    functions: dict[str, Any]  # by name: the schema of the parameters
    must: list[str]  # of these, one must be called; empty: the model decides
    style: Style
    parallel: bool


def tools_of(body: ChatBody, model: Model) -> Tools | None:
    """The tools of a request; None if it has none, or ``tool_choice`` is "none"."""
    if not body.tools:
        if body.tool_choice not in (None, "none", "auto"):
            raise bad("tool_choice", "expected tools with it, found none")
        return None
    functions = _checked("tools", check_tools, body.tools)
    must = _checked("tool_choice", chosen, body.tool_choice, functions)
    if body.tool_choice == "none":
        return None
    if model.style is None:
        raise bad("tools", "expected none, because this model's chat template calls no tools, found some")
    return Tools(body.tools, functions, must, model.style, body.parallel_tool_calls is not False)


def constraint_of(body: Drawing, tools: Tools | None, model: Model) -> Grammar | None:
    """The compiled grammar of a request; None if it has no constraint."""
    asked = [found for found in (_response_format(body), _structured(body), _calls(tools, model)) if found is not None]
    if not asked:
        return None
    if len(asked) > 1:
        raise bad(asked[0][2].partition(".")[0], f"expected one constraint, found {asked[1][2]}, too")
    if body.ignore_eos:
        raise bad("ignore_eos", "expected false with a constraint, which says where a text ends")
    kind, value, where = asked[0]
    return _checked(where, model.grammars.compile, kind, value, where)


Asked = tuple[Kind, Any, str]  # and the field


def _response_format(body: Drawing) -> Asked | None:
    asked = body.response_format
    if asked is None or asked.type == "text":
        return None
    if asked.type == "json_object":
        return "json_object", None, "response_format"
    assert asked.json_schema is not None
    return "json_schema", asked.json_schema.value, "response_format.json_schema.schema"


def _structured(body: Drawing) -> Asked | None:
    asked = body.structured_outputs
    if asked is None:
        return None
    kinds: dict[str, Kind] = {"value": "json_schema", "regex": "regex", "choice": "choice", "grammar": "grammar"}
    for name, kind in kinds.items():
        if (value := getattr(asked, name)) is not None:
            return kind, value, f"structured_outputs.{'json' if name == 'value' else name}"
    return ("json_object", None, "structured_outputs.json_object") if asked.json_object else None


def _calls(tools: Tools | None, model: Model) -> Asked | None:
    if tools is None or not tools.must:
        return None
    grammar = call_grammar(tools.functions, tools.must, tools.style, model.tokenizer, parallel=tools.parallel)
    return "grammar", grammar, "tools"


def _checked[T](param: str, check: Callable[..., T], *args: Any) -> T:
    """The result of a check. Turns its `InputError` into an error of the API."""
    try:
        return check(*args)
    except InputError as error:
        message = str(error)
        raise ApiError(400, message if message.startswith(param) else f"{param}: {message}", param=param) from None

"""The page's table of parameters against the schema, and against those that OpenAI's client knows."""

import re
from pathlib import Path
from typing import Any

import pytest
from serving import Live, messages

from jllama.serve.schema import ChatBody, CompletionBody

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
ROUTES = {"/v1/completions": CompletionBody, "/v1/chat/completions": ChatBody}


def rows() -> dict[str, str]:
    """What the table says in its last column of every parameter."""
    table = PAGE.partition("| parameter | OpenAI |")[2].partition("\n\n")[0]
    found = {}
    for line in table.splitlines()[2:]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert len(cells) == 5, line
        found |= dict.fromkeys(re.findall(r"`(\w+)`", cells[0]), cells[-1])
    return found


def of_openai(route: str) -> set[str]:
    """The parameters of OpenAI's API today, as its client has them."""
    types = pytest.importorskip("openai.types")
    module = types.completion_create_params if route == "/v1/completions" else types.chat.completion_create_params
    return set(module.CompletionCreateParamsNonStreaming.__annotations__) | set(
        module.CompletionCreateParamsBase.__annotations__
    )


@pytest.mark.parametrize("route", ROUTES)
def test_every_parameter_of_the_schema_and_of_openai_is_in_the_table(route: str) -> None:
    known = {field.alias or name for name, field in ROUTES[route].model_fields.items()}
    assert len(of_openai(route)) > 15
    assert known | of_openai(route) <= set(rows())


@pytest.mark.parametrize("route", ROUTES)
def test_what_the_table_refuses_is_refused_by_its_name(live: Live, route: str) -> None:
    base: dict[str, Any] = {"prompt": "a"} if route == "/v1/completions" else {"messages": messages("a")}
    fields = set(ROUTES[route].model_fields)
    for name in (of_openai(route) | set(rows())) - fields:
        assert live.refused(route, base | {name: "x"})["param"] == name
    refused = {name for name, says in rows().items() if says.startswith("refused")}
    assert len(refused) > 5
    for name in refused:
        assert live.refused(route, base | {name: {"any": "thing"}})["param"].split(".")[0] == name

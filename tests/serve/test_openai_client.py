"""The official client, as people use it: sync, async, streams, parsed answers, tools."""

import asyncio
import json
from collections.abc import Callable
from typing import Any, Literal

import pytest
from attack import TEMPLATE
from pydantic import BaseModel, ConfigDict
from serving import Live, messages

from jllama import DEMO, LM

openai = pytest.importorskip("openai")
QUESTION: Any = messages("Who are you?")


class Animal(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: Literal["cat", "dog"]
    legs: Literal[2, 4]


@pytest.fixture(scope="module")
def url(make_live: Callable[..., Live]) -> str:
    """Of a server whose template calls tools."""
    return make_live(LM.load(DEMO, chat_template=TEMPLATE)).url + "/v1"


@pytest.fixture(scope="module")
def client(url: str) -> Any:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as made:
        yield made


def test_async_clients_run_side_by_side(url: str) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:

            async def whole() -> str:
                made = await client.chat.completions.create(model="demo", messages=QUESTION, max_tokens=8, seed=3)
                return made.choices[0].message.content

            async def stream() -> str:
                how: Any = dict(model="demo", messages=QUESTION, max_tokens=8, seed=3, stream=True)
                chunks = [chunk async for chunk in await client.chat.completions.create(**how)]
                return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

            return await asyncio.gather(whole(), stream(), whole())

    one, *others = asyncio.run(ask())
    assert one
    assert others == [one, one]


def test_an_answer_is_parsed_into_a_class(client: Any) -> None:
    how: Any = dict(model="demo", messages=QUESTION, response_format=Animal, temperature=1, seed=1, max_tokens=80)
    made = client.chat.completions.parse(**how)
    assert isinstance(made.choices[0].message.parsed, Animal)
    with client.chat.completions.stream(**how) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.parsed == made.choices[0].message.parsed


def test_a_tool_is_called_and_its_answer_taken(client: Any) -> None:
    tool: Any = openai.pydantic_function_tool(Animal, name="look")
    how: Any = dict(model="demo", messages=QUESTION, tools=[tool], tool_choice="required", max_tokens=120, seed=1)
    made = client.chat.completions.parse(**how, parallel_tool_calls=False)
    (call,) = made.choices[0].message.tool_calls
    assert made.choices[0].finish_reason == "tool_calls"
    assert call.function.name == "look"
    assert isinstance(call.function.parsed_arguments, Animal)

    with client.chat.completions.stream(**how, parallel_tool_calls=False) as stream:
        streamed = stream.get_final_completion().choices[0].message.tool_calls[0]
    assert json.loads(streamed.function.arguments) == json.loads(call.function.arguments)

    again = [*QUESTION, made.choices[0].message.model_dump(exclude_none=True, exclude={"parsed"})]
    for one in again[-1]["tool_calls"]:
        one["function"].pop("parsed_arguments", None)
    again.append({"role": "tool", "tool_call_id": call.id, "content": '{"seen": true}'})
    answered = client.chat.completions.create(model="demo", messages=again, tools=[tool], max_tokens=4)
    assert answered.choices[0].message.content is not None

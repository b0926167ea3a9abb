"""langchain-openai: an answer, a stream, a structured answer, a tool."""

import os
from typing import Literal

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, ConfigDict, Field

how = dict(base_url=os.environ["URL"] + "/v1", api_key=os.environ["KEY"], model=os.environ["MODEL"], max_retries=0)
chat = ChatOpenAI(**how, temperature=0, max_completion_tokens=24, seed=1)


class Age(BaseModel):
    """How old someone is."""

    model_config = ConfigDict(extra="forbid")
    years: int = Field(ge=0, le=99)


@tool
def look(years: Literal[7, 70]) -> str:
    """Look at who is so old."""
    return f"{years}"


whole = chat.invoke([("system", "Be brief."), ("human", "Who are you?")])
assert whole.content, whole
assert whole.usage_metadata["output_tokens"] > 0
chunks = list(chat.stream([("system", "Be brief."), ("human", "Who are you?")]))
assert "".join(chunk.content for chunk in chunks) == whole.content
both = chat.batch(["Hello", "Hello"])
assert both[0].content == both[1].content
assert isinstance(chat.with_structured_output(Age, method="json_schema").invoke("How old?"), Age)
able = chat.bind_tools([look], tool_choice="look", parallel_tool_calls=False, strict=True)
called = able.invoke("How old?", max_completion_tokens=200)
assert called.tool_calls[0]["name"] == "look", called
assert OpenAI(**how, temperature=0, max_tokens=8).invoke("Once upon a time")
print("ok")

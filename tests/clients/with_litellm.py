"""litellm: an answer, a stream, a completion, an error."""

import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # nothing is fetched
import litellm  # noqa: E402

how = dict(model="openai/" + os.environ["MODEL"], api_base=os.environ["URL"] + "/v1", api_key=os.environ["KEY"])
question = [{"role": "user", "content": "Who are you?"}]
whole = litellm.completion(**how, messages=question, max_tokens=16, temperature=0, seed=1)
text = whole.choices[0].message.content
assert text, whole
chunks = litellm.completion(**how, messages=question, max_tokens=16, temperature=0, seed=1, stream=True)
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
asked = how | {"model": "text-completion-openai/" + os.environ["MODEL"]}
assert litellm.text_completion(**asked, prompt="Once upon a time", max_tokens=8).choices[0].text
try:
    litellm.completion(**how, messages=question, temperature=99999)
except litellm.BadRequestError as error:
    assert "temperature" in str(error)
else:
    raise AssertionError("expected an error")
print("ok")

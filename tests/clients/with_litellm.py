"""litellm: an answer, a stream, a completion, an error."""

import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # nothing is fetched
import litellm

how = dict(model="openai/" + os.environ["MODEL"], api_base=os.environ["URL"] + "/v1", api_key=os.environ["KEY"])
question = [{"role": "user", "content": "Who are you?"}]
whole = litellm.completion(**how, messages=question, max_tokens=16, temperature=0, seed=1)
text = whole.choices[0].message.content
assert text, whole
chunks = litellm.completion(**how, messages=question, max_tokens=16, temperature=0, seed=1, stream=True)
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
asked = how | {"model": "text-completion-openai/" + os.environ["MODEL"]}
assert litellm.text_completion(**asked, prompt="Once upon a time", max_tokens=8).choices[0].text
refusal = ""
try:
    litellm.completion(**how, messages=question, temperature=99999)
except litellm.BadRequestError as error:
    refusal = str(error)
assert "temperature" in refusal
print("ok")

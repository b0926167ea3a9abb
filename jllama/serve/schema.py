"""The bodies of requests. A field that is not listed here is refused by name; every field has bounds.

Fields of OpenAI's API that this server cannot honour are listed with the values that change nothing.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field, PlainValidator, WithJsonSchema
from pydantic import model_validator as validated

from jllama.engine.request import MAX_BIAS, MAX_STOP_IDS, MAX_TOP_LOGPROBS
from jllama.text.grammars import MAX_CHOICES
from jllama.text.nesting import is_unicode
from jllama.text.templates import ROLES
from jllama.text.tool_choice import MAX_TOOLS

MAX_ROWS = 128  # texts that one request may draw: prompts times n
MAX_MESSAGES = 4096
MAX_PARTS = 1024  # of a message
MAX_STOP = 16  # stop strings
MAX_STOP_LENGTH = 256  # characters of one
MAX_NAME = 256  # characters of `model`, `user`, `cache_salt` and their like
MAX_TOKENS = 1 << 22  # far above any context: the model's own is checked later
MAX_TEXT = 1 << 24  # characters of a text; the body's size is bounded before


class Strict(BaseModel):
    """Base of all bodies: converts no values, refuses unknown fields, and repeats no input in errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, hide_input_in_errors=True)


def _texts(value: Any, name: str, count: int, length: int) -> tuple[str, ...]:
    """A text, or a list of texts, as a tuple."""
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"expected a text or a list of texts, found {type(value).__name__}")
    if len(texts) > count:
        raise ValueError(f"expected at most {count} {name}, found {len(texts)}")
    for text in texts:
        if len(text) > length:
            raise ValueError(f"expected at most {length} characters, found {len(text)}")
        check_unicode(text)
    return tuple(texts)


def check_unicode(text: str) -> str:
    """The text, unless it holds half of a surrogate pair, which no tokenizer takes."""
    if not is_unicode(text):
        raise ValueError("expected Unicode text, found a lone surrogate")
    return text


def _stop(value: Any) -> tuple[str, ...]:
    texts = () if value is None else _texts(value, "stop texts", MAX_STOP, MAX_STOP_LENGTH)
    if "" in texts:
        raise ValueError("expected texts, found an empty one")
    return texts


def _prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    """One prompt or several, each a text or token ids."""
    if isinstance(value, list) and value and all(type(v) is int for v in value):
        return (tuple(value),)
    if isinstance(value, list) and value and all(isinstance(v, list) for v in value):
        if len(value) > MAX_ROWS:
            raise ValueError(f"expected at most {MAX_ROWS} prompts, found {len(value)}")
        if not all(type(v) is int for ids in value for v in ids):
            raise ValueError("expected token ids in every list, found something else")
        return tuple(tuple(ids) for ids in value)
    if not isinstance(value, str | list) or value == []:
        raise ValueError("expected a text, a list of texts, a list of token ids or a list of such lists")
    return _texts(value, "prompts", MAX_ROWS, MAX_TEXT)


def _content(value: Any) -> str | None:
    """A message's text; OpenAI's parts of type text are joined."""
    if isinstance(value, list):
        if len(value) > MAX_PARTS:
            raise ValueError(f"expected at most {MAX_PARTS} parts, found {len(value)}")
        for part in value:
            if not isinstance(part, dict) or part.get("type") != "text" or set(part) != {"type", "text"}:
                raise ValueError('expected parts {"type": "text", "text": ...}, found another: this model reads text')
            if not isinstance(part["text"], str):
                raise ValueError(f"expected a part's text to be a text, found {type(part['text']).__name__}")
        value = "".join(part["text"] for part in value)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"expected a text or a list of parts, found {type(value).__name__}")
    return None if value is None else check_unicode(value)


def _bias(value: Any) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"expected an object of token ids and numbers, found {type(value).__name__}")
    if len(value) > MAX_BIAS:
        raise ValueError(f"expected at most {MAX_BIAS} entries, found {len(value)}")
    found: dict[int, float] = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise ValueError("expected token ids as keys, found something else")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise ValueError("expected numbers from -100 to 100, found something else")
        found[int(key)] = float(bias)
    return found


def _json(kind: str) -> WithJsonSchema:
    return WithJsonSchema({"type": kind})


Stop = Annotated[tuple[str, ...], PlainValidator(_stop), WithJsonSchema({"type": ["string", "array", "null"]})]
Prompts = Annotated[Any, PlainValidator(_prompts), WithJsonSchema({"type": ["string", "array"]})]
Content = Annotated[str | None, PlainValidator(_content), WithJsonSchema({"type": ["string", "array", "null"]})]
Bias = Annotated[dict[int, float], PlainValidator(_bias), _json("object")]
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME), AfterValidator(check_unicode)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Penalty = Annotated[Number, Field(ge=-2, le=2)]
Count = Annotated[int, Field(ge=1, le=MAX_TOKENS)]


class StreamOptions(Strict):
    """What a stream reports beside the text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None


class JsonSchema(Strict):
    """A schema of OpenAI's ``response_format``. It is always held, ``strict`` or not."""

    name: Name | None = None
    description: str | None = None
    value: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """OpenAI's constraints."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @validated(mode="after")
    def _has_its_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema: expected one with type json_schema, and only then")
        return self


class StructuredOutputs(Strict):
    """vLLM's constraints: one of them."""

    value: Any = Field(None, alias="json")  # a schema, or its text
    json_object: bool | None = None
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)] | None = None
    grammar: str | None = None

    @validated(mode="after")
    def _one_kind(self) -> Self:
        kinds = (self.value, self.json_object or None, self.regex, self.choice, self.grammar)
        if (given := sum(kind is not None for kind in kinds)) != 1:
            raise ValueError(f"expected one of json, json_object, regex, choice and grammar, found {given}")
        return self


class Drawing(Strict):
    """What both kinds of completion share: how texts are drawn, and how they end."""

    model: Name | None = None
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[Number, Field(ge=0, lt=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_ROWS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop = ()
    stop_token_ids: Annotated[list[int], Field(max_length=MAX_STOP_IDS)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=100)] | None = None
    logit_bias: Bias = Field(default_factory=dict)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Name | None = None
    cache_salt: Name | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    # Known to OpenAI's clients, and accepted here only with values that change nothing.
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None

    @validated(mode="after")
    def _stream_options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: expected stream to be true with it")
        return self


class CompletionBody(Drawing):
    """``POST /v1/completions``."""

    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_ROWS)] | None = None
    suffix: Literal[""] | None = None

    @validated(mode="after")
    def _best_of_is_n(self) -> Self:
        if self.best_of not in (None, self.n or 1):
            raise ValueError("best_of: expected the value of n (this server returns all that it draws)")
        return self


class Message(Strict):
    """One message of a conversation."""

    role: str
    content: Content = None
    name: Name | None = None
    tool_calls: Annotated[list[dict[str, Any]], Field(max_length=MAX_ROWS)] | None = None
    tool_call_id: Name | None = None
    type: Literal["text"] | None = None  # lm-eval sends it
    refusal: None = None
    audio: None = None
    function_call: None = None

    @validated(mode="after")
    def _has_a_role_and_text(self) -> Self:
        if self.role not in ROLES:
            raise ValueError(f"role: expected one of {', '.join(ROLES)}")
        if self.content is None and not self.tool_calls:
            raise ValueError("content: expected a text, found none")
        return self


class ChatBody(Drawing):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None
    functions: None = None
    function_call: None = None

    @validated(mode="after")
    def _settings_agree(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: expected logprobs to be true with it")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_completion_tokens: expected it or max_tokens, found both and different")
        return self


class TokenizeBody(Strict):
    """``POST /tokenize``: a text or a conversation."""

    model: Name | None = None
    prompt: Annotated[str, Field(max_length=MAX_TEXT), AfterValidator(check_unicode)] | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False

    @validated(mode="after")
    def _one_of_both(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: expected either prompt or messages")
        return self


class DetokenizeBody(Strict):
    """``POST /detokenize``."""

    model: Name | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], FailFast(), Field(max_length=MAX_TOKENS)]

"""Turns a request's body into requests for the engine. Pure, except for the random seed of a request without one."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jllama.engine.constraint import Constraint
from jllama.engine.request import MAX_STOP_IDS, Request, SamplingSettings, check_ids
from jllama.errors import InputError
from jllama.serve.constraints import Tools, constraint_of, tools_of
from jllama.serve.errors import ApiError, bad
from jllama.serve.model import Model
from jllama.serve.schema import MAX_ROWS, ChatBody, CompletionBody, Drawing, Message, TokenizeBody
from jllama.text.templates import chat_prompt_ids

COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions


@dataclass(frozen=True)
class Run:
    """What one HTTP request asks of the engine. Row ``p * n + i`` is sample i of prompt p; with ``echo``, and where
    log-probabilities are asked for, rows that score the prompts follow."""

    prompts: list[list[int]]
    echoes: list[str]  # the prompts' texts, with ``echo``
    n: int
    requests: list[Request]
    scores: list[Request]
    stop: tuple[str, ...]
    logprobs: int | None  # how many of the likeliest tokens to report; None: no log-probabilities at all
    ends: frozenset[int]  # if a text ends with one of these tokens, the token is not part of the text
    tools: Tools | None = None

    @property
    def rows(self) -> int:
        """The rows of the answer."""
        return len(self.prompts) * self.n


def completion_run(body: CompletionBody, model: Model, tenant: str) -> Run:
    """Of ``/v1/completions``."""
    n, echo = body.n or 1, bool(body.echo)
    if len(body.prompt) * n > MAX_ROWS:
        raise bad("n", f"expected at most {MAX_ROWS} texts in all, found {len(body.prompt)} prompts times {n}")
    prompts = [_prompt_ids(prompt, model) for prompt in body.prompt]
    limit = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    if limit == 0 and not echo:
        raise bad("max_tokens", "expected at least 1, or echo to be true with it, found 0")
    if echo and (body.logprobs or 0) > 1:
        raise bad("logprobs", f"expected at most 1 with echo (a prompt's likeliest tokens), found {body.logprobs}")
    template = _request(body, model, tenant, body.logprobs, constraint_of(body, None, model))
    scored = [p for p in prompts if len(p) > 1] if echo and body.logprobs is not None else []
    return Run(
        prompts,
        [p if isinstance(p, str) else model.tokenizer.decode(list(p)) for p in body.prompt] if echo else [],
        n,
        _rows(prompts, n, template, limit, model) if limit else [],
        [replace(template, prompt=p, score_from=1, constraint=None) for p in scored],
        body.stop,
        body.logprobs,
        _ends(template, model),
    )


def chat_run(body: ChatBody, model: Model, tenant: str) -> Run:
    """Of ``/v1/chat/completions``."""
    tools = tools_of(body, model)
    prompt = conversation_ids(body.messages, model, tools=tools)
    limit = body.max_completion_tokens or body.max_tokens or max(1, model.max_len - len(prompt))
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    ends = () if body.ignore_eos else model.chat.stop_ids(model.tokenizer)
    template = _request(body, model, tenant, logprobs, constraint_of(body, tools, model), ends)
    n = body.n or 1
    rows, stop = _rows([prompt], n, template, limit, model), (*body.stop, *model.chat.stop)
    return Run([prompt], [], n, rows, [], stop, logprobs, _ends(template, model), tools)


def conversation_ids(
    messages: Sequence[Message], model: Model, *, answer: bool = True, tools: Tools | None = None
) -> list[int]:
    """The ids of a conversation in the model's own chat format."""
    plain, listed = [_plain(message) for message in messages], tools.listed if tools else None
    try:
        return chat_prompt_ids(plain, model.tokenizer, model.chat, answer, listed)
    except InputError as error:
        param, _, rest = str(error).partition(": ")
        raise (bad(param, rest) if param in ("messages", "tools") else bad("messages", str(error))) from None


def _ends(request: Request, model: Model) -> frozenset[int]:
    """The tokens that may end a text of a request. A grammar ends with any of the model's."""
    return frozenset((*(request.stop_ids or ()), *(model.ends if request.constraint else ())))


def ids_to_count(body: TokenizeBody, model: Model) -> list[int]:
    """Of ``/tokenize``: the ids of a text or of a conversation."""
    if body.messages is not None:
        return conversation_ids(body.messages, model, answer=body.add_generation_prompt)
    return model.tokenizer.encode(body.prompt or "", bos=body.add_special_tokens)


def _prompt_ids(prompt: str | tuple[int, ...], model: Model) -> list[int]:
    ids = model.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    return ids or [model.config.bos_id]


def _plain(message: Message) -> dict[str, Any]:
    """A message as templates expect it. They do not know OpenAI's new name "developer" of the role "system"."""
    found = {name: value for name, value in message.model_dump(exclude={"type"}).items() if value is not None}
    return {"content": "", **found, "role": "system" if message.role == "developer" else message.role}


def _request(
    body: Drawing,
    model: Model,
    tenant: str,
    logprobs: int | None,
    constraint: Constraint | None,
    ends: tuple[int, ...] = (),
) -> Request:
    """What all rows of a body have in common."""
    own = () if body.ignore_eos else model.config.eos_ids
    stop_ids = tuple(dict.fromkeys((*own, *ends, *(body.stop_token_ids or ()))))
    if len(stop_ids) > MAX_STOP_IDS:
        raise bad("stop_token_ids", f"expected at most {MAX_STOP_IDS} with the model's own, found {len(stop_ids)}")
    settings = SamplingSettings(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=max(0, body.top_k or 0),
        top_p=1.0 if body.top_p is None else body.top_p,
        min_p=body.min_p or 0.0,
        seed=secrets.randbits(63) if body.seed is None else body.seed,
        repetition_penalty=body.repetition_penalty or 1.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=body.logit_bias,
        min_tokens=body.min_tokens or 0,
        top_logprobs=logprobs or 0,
    )
    salt = model.salt(tenant, body.cache_salt)
    request = Request((0,), 1, settings, stop_ids, salt=salt, constraint=constraint)
    try:
        settings.check(model.config)
        check_ids("stop_token_ids", body.stop_token_ids or (), model.config)
    except InputError as error:
        name = str(error).partition(":")[0]
        raise ApiError(400, str(error), param=name) from None
    return request


def _rows(prompts: list[list[int]], n: int, template: Request, limit: int, model: Model) -> list[Request]:
    for prompt in prompts:
        if len(prompt) + limit > model.max_len:
            message = (
                f"expected at most {model.max_len} tokens (the context), found {len(prompt)} of the prompt and {limit} "
                "to be drawn"
            )
            raise bad("max_tokens", message, code="context_length_exceeded")
    if template.sampling.min_tokens > limit:
        raise bad("min_tokens", f"expected at most max_tokens ({limit}), found {template.sampling.min_tokens}")
    seed = template.sampling.seed
    settings = [replace(template.sampling, seed=seed + i) for i in range(n)]
    return [replace(template, prompt=p, max_new_tokens=limit, sampling=s) for p in prompts for s in settings]

"""What goes into an engine and what comes out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from jllama.config import LlamaConfig
from jllama.engine.constraint import Constraint, Progress
from jllama.engine.scheduler import Sequence as Scheduled
from jllama.errors import InputError
from jllama.sampling import CHECKED, check_bias, check_setting

# "dead_end": the request's constraint and settings exclude every next token.
FinishReason = Literal["stop", "length", "abort", "error", "dead_end"]

# Limits of a request: the state has arrays of these sizes for each row.
MAX_STOP_IDS = 16
MAX_BIAS = 304
MAX_BAD_WORDS = 32
MAX_BAD_WORD_TOKENS = 8
MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True)
class SamplingSettings:
    """How one request's tokens are drawn; the defaults take the likeliest. See `jllama.make_sampling`."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = MappingProxyType({})
    min_tokens: int = 0
    bad_words: Sequence[Sequence[int]] = ()  # sequences of tokens that must not be drawn
    top_logprobs: int = 0  # how many of the likeliest tokens to report at every step

    def check(self, config: LlamaConfig) -> None:
        """Raise `InputError` for what cannot be meant."""
        for name in CHECKED:
            check_setting(name, getattr(self, name))
        _within("top_logprobs", self.top_logprobs, 0, MAX_TOP_LOGPROBS)
        _within("logit_bias: entries", len(self.logit_bias), 0, MAX_BIAS)
        _within("bad_words: sequences", len(self.bad_words), 0, MAX_BAD_WORDS)
        for word in self.bad_words:
            _within("bad_words: tokens of a sequence", len(word), 1, MAX_BAD_WORD_TOKENS)
            check_ids("bad_words", word, config)
        check_ids("logit_bias", self.logit_bias, config)
        check_bias(self.logit_bias)

    @property
    def kind(self) -> str:
        """The simplest compiled step that supports these settings: see `jllama.engine.steps.KINDS`."""
        asked = (self.presence_penalty, self.frequency_penalty, self.logit_bias, self.min_tokens, self.bad_words)
        if any(asked) or self.repetition_penalty != 1 or self.top_logprobs:
            return "full"
        if self.temperature == 0:
            return "greedy"
        return "plain" if (self.top_k, self.top_p, self.min_p) == (0, 1.0, 0.0) else "cut"


@dataclass(frozen=True)
class Request:
    """A prompt, and how to continue it. ``stop_ids`` None: the model's end-of-sequence tokens. Requests of a higher
    ``priority`` go first. Only requests with the same ``salt`` share cached prefixes.

    With a ``constraint`` the text matches its grammar, and ends where the grammar ends.

    With ``score_from`` nothing is drawn: `Completion.logprobs` are those of ``prompt[score_from:]``."""

    prompt: Sequence[int]
    max_new_tokens: int = 16
    sampling: SamplingSettings = SamplingSettings()
    stop_ids: Sequence[int] | None = None
    priority: int = 0
    salt: str = ""
    score_from: int | None = None
    constraint: Constraint | None = None

    def check(self, config: LlamaConfig) -> None:
        """Raise `InputError` for what cannot be meant."""
        if not self.prompt:
            raise InputError("prompt: expected at least 1 token, found 0")
        check_ids("prompt", self.prompt, config)
        _within("stop_ids: entries", len(self.stops(config)), 0, MAX_STOP_IDS)
        check_ids("stop_ids", set(self.stops(config)).difference(config.eos_ids), config)
        if self.score_from is None:
            _within("max_new_tokens", self.max_new_tokens, 1, 2**31 - 1)
        elif self.constraint is not None:
            raise InputError("constraint: expected none with score_from, found one")
        elif not 1 <= self.score_from < len(self.prompt):
            expected = f"1 to {len(self.prompt) - 1} (the prompt's tokens but the first)"
            raise InputError(f"score_from: expected {expected}, found {self.score_from}")
        self.sampling.check(config)

    def stops(self, config: LlamaConfig) -> tuple[int, ...]:
        """The tokens that end the request."""
        return tuple(config.eos_ids if self.stop_ids is None else self.stop_ids)


@dataclass
class Completion:
    """The completion of one prompt. It grows until ``finish_reason`` is set."""

    prompt_ids: list[int]
    ids: list[int] = field(default_factory=list)  # the new ids, including a stop token
    logprobs: list[float] = field(default_factory=list)  # under the model's own distribution
    text: str = ""  # set by `jllama.LM` and `jllama.complete`, which have a tokenizer
    finish_reason: FinishReason | None = None  # "stop": a token or a text that ends it
    # For each step, log-probability by token, the likeliest first, where requested. `Engine.score`: the likeliest only.
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    greedy: list[bool] = field(default_factory=list)  # set by `Engine.score`: whether the token is the likeliest


@dataclass(eq=False)
class Handle:
    """A request that an engine has taken."""

    request: Request
    scheduled: Scheduled
    completion: Completion
    progress: Progress | None = None  # where its text stands in the grammar of its constraint

    @property
    def finished(self) -> bool:
        """Whether the request has ended."""
        return self.completion.finish_reason is not None

    @property
    def error(self) -> str | None:
        """Why the request ended, if its finish reason is "error"."""
        if self.completion.finish_reason != "error":
            return None
        failed = None if self.progress is None else self.progress.error
        return failed or "logits are NaN: the weights hold NaN or Inf, or overflow this dtype"


@dataclass(frozen=True)
class Event:
    """The tokens that a step has read back for one request."""

    handle: Handle
    ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason | None
    top: list[dict[int, float]] = field(default_factory=list)  # of each id, the likeliest tokens, where asked for


def per_prompt(sampling: SamplingSettings | Sequence[SamplingSettings] | None, count: int, n: int) -> list[Any]:
    """Settings of ``count`` prompts with ``n`` samples each. With one setting for all prompts, sample i of all samples
    has the seed ``seed + i``, as in `make_sampling`. With one for each prompt, sample i of it has its ``seed + i``."""
    if sampling is None or isinstance(sampling, SamplingSettings):
        one = sampling or SamplingSettings()
        return [replace(one, seed=one.seed + i) for i in range(count * n)]
    if len(sampling) != count:
        raise InputError(f"sampling: expected one or {count} (one a prompt), found {len(sampling)}")
    return [replace(one, seed=one.seed + i) for one in sampling for i in range(n)]


def check_ids(name: str, ids: Any, config: LlamaConfig) -> None:
    """Raise `InputError` unless all are tokens of the vocabulary."""
    found = np.asarray(list(ids))
    if not found.size:
        return
    if found.dtype.kind not in "iu":
        raise InputError(f"{name}: expected token ids, found {found.dtype}")
    strange = found[(found < 0) | (found >= config.vocab_size)]
    if strange.size:
        raise InputError(f"{name}: expected token ids from 0 to {config.vocab_size - 1}, found {strange[0]}")


def _within(name: str, value: float, low: int, high: int) -> None:
    if not (low <= value <= high and value == int(value)):
        raise InputError(f"{name}: expected a whole number from {low} to {high}, found {value}")

"""`LM`: a model and its tokenizer as one object, for text in and text out."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, Unpack, overload

import numpy as np
from jax.typing import DTypeLike

from jllama.config import Backend, Quant
from jllama.decode import check_prompts
from jllama.device import bandwidth, default_device
from jllama.errors import InputError
from jllama.formats import open_source
from jllama.formats.checkpoint import load
from jllama.formats.source import Source
from jllama.kernels import Choice
from jllama.params import Params, unpacked, weight_bytes
from jllama.sampling import make_sampling
from jllama.scoring import token_logprobs
from jllama.stream import CHUNK, Session, Timings, bucket
from jllama.text.complete import Completion, complete
from jllama.text.templates import Chat, Message, PlainChat, chat_for, chat_prompt_ids
from jllama.text.tokenizer import Tokenizer, tokenizer_for

LOGITS_BYTES = 256 << 20  # limit for the logits of one batch in `LM.score`


class Options(TypedDict, total=False):
    """Options of text generation, all optional. The sampling settings are those of `make_sampling`."""

    max_new_tokens: int  # 256
    temperature: float  # 0: greedy
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int  # 0; prompt i of several gets seed + i
    stop: str | Sequence[str]  # a completion ends before any of these texts
    ignore_eos: bool  # continue after end-of-sequence tokens


@dataclass(frozen=True)
class Score:
    """The ids of a text without the first one, which has nothing before it (normally the beginning-of-sequence id), and
    the log-probability of each id given all ids before it."""

    ids: list[int]
    logprobs: list[float]

    @property
    def total(self) -> float:
        """The log-probability of the whole text."""
        return sum(self.logprobs)


@dataclass
class LM:
    """A model and its tokenizer.

    ``params`` may be replaced at any time, for example by new weights of a trainer. The cache of the last run is kept.
    If a prompt starts like the last one, only the rest of it is computed, so a conversation only computes new turns.
    """

    params: Params
    tokenizer: Tokenizer
    max_len: int  # the context: maximum number of tokens of prompt and completion together
    backend: Backend = "auto"
    chat_format: Chat = field(default_factory=PlainChat)  # how a conversation is written as ids
    timings: Timings = field(default_factory=Timings)  # of the last batch
    backends: dict[str, dict[str, Choice]] = field(default_factory=dict)  # the choice for every op of the last batch
    _idle: Session | None = field(default=None, repr=False)  # the session of the last run, with its cache

    @classmethod
    def load(
        cls,
        path: str | Path | Source,
        *,
        dtype: DTypeLike | None = None,
        quant: Quant = "none",
        group: int | None = None,
        max_len: int | None = None,
        batch: int = 1,
        tokenizer: str | Path | None = None,
        chat_template: str | Path | None = None,
        backend: Backend = "auto",
        progress: Callable[[Iterable[str], int], Iterable[str]] | None = None,
    ) -> LM:
        """Load a checkpoint of any format with its tokenizer, or with the tokenizer in the file ``tokenizer``.

        ``chat_template`` replaces the chat format of the checkpoint. It is ``llama-2``, ``plain`` or the file of a
        template.

        ``max_len`` is the context (default: the model's). A cache of this length for ``batch`` prompts must fit on the
        device together with the weights. The other arguments are as in `jllama.load`.
        """
        source = path if isinstance(path, Source) else open_source(path)
        context = source.config.max_seq_len
        if max_len is not None and not 2 <= max_len <= context:
            raise InputError(f"max_len: expected 2 to {context} (the model's context), found {max_len}")
        max_len = context if max_len is None else max_len
        loaded_tokenizer, chat_format = tokenizer_for(source, tokenizer), chat_for(source, chat_template)
        params = load(
            source,
            dtype=dtype,
            quant=quant,
            group=group,
            batch=batch,
            max_len=max_len,
            stacked=False if backend == "xla" else None,  # stacked layers are slow without kernels
            progress=progress,
        )
        if default_device().platform == "cpu":
            params = unpacked(params)
        return cls(params, loaded_tokenizer, max_len, backend, chat_format)

    @overload
    def generate(  # pyright: ignore[reportOverlappingOverload]  (a str is a sequence of str, too)
        self, prompts: str, *, batch_size: int = 8, **options: Unpack[Options]
    ) -> Completion: ...
    @overload
    def generate(
        self, prompts: Sequence[str], *, batch_size: int = 8, **options: Unpack[Options]
    ) -> list[Completion]: ...
    def generate(
        self, prompts: str | Sequence[str], *, batch_size: int = 8, **options: Unpack[Options]
    ) -> Completion | list[Completion]:
        """The completion of a prompt, or the completions of several prompts, which run in batches of ``batch_size``."""
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if batch_size < 1:
            raise InputError(f"batch_size: expected at least 1, found {batch_size}")
        done: list[Completion] = []
        for at in range(0, len(texts), batch_size):
            batch = [Completion(self.tokenizer.encode(text)) for text in texts[at : at + batch_size]]
            for _ in self.complete(batch, row=at, **options):
                pass
            done += batch
        return done[0] if isinstance(prompts, str) else done

    def stream(self, prompt: str | Sequence[Message], **options: Unpack[Options]) -> Generator[str]:
        """Stream the completion of a prompt, or the answer to a conversation, as pieces of text. Close the iterator to
        stop early."""
        chat = not isinstance(prompt, str)
        ids = self.prompt_ids(prompt) if chat else self.tokenizer.encode(prompt)
        pieces = self.complete([Completion(ids)], chat=chat, **options)
        try:
            for _, text in pieces:
                yield text
        finally:
            pieces.close()

    def chat(self, messages: Sequence[Message], **options: Unpack[Options]) -> Completion:
        """The answer to a conversation: ``[{"role": "user", "content": "..."}, ...]``."""
        completion = Completion(self.prompt_ids(messages))
        for _ in self.complete([completion], chat=True, **options):
            pass
        return completion

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation in the model's chat format, up to where the answer begins."""
        return chat_prompt_ids(messages, self.tokenizer, self.chat_format)

    @overload
    def score(self, texts: str) -> Score: ...  # pyright: ignore[reportOverlappingOverload]
    @overload
    def score(self, texts: Sequence[str]) -> list[Score]: ...
    def score(self, texts: str | Sequence[str]) -> Score | list[Score]:
        """The log-probability of every token of a text, or of several texts."""
        one = isinstance(texts, str)
        rows = [self.tokenizer.encode(text) for text in ([texts] if one else texts)]
        check_prompts(rows, self.max_len, "the context", self.params.config)
        scores: list[Score] = []
        while len(scores) < len(rows):
            width = bucket(max(map(len, rows[len(scores) :])))
            fit = max(1, LOGITS_BYTES // (4 * width * self.params.config.vocab_size))
            scores += self._scores(rows[len(scores) : len(scores) + fit], width)
        return scores[0] if one else scores

    def _scores(self, rows: list[list[int]], width: int) -> list[Score]:
        tokens = np.zeros((bucket(len(rows), 1), width), np.int32)  # padded, so that few shapes are compiled
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = row
        logprobs = np.asarray(token_logprobs(self.params, tokens, backend=self.backend))
        return [Score(row[1:], logprobs[i, : len(row) - 1].tolist()) for i, row in enumerate(rows)]

    def complete(
        self, completions: Sequence[Completion], *, row: int = 0, chat: bool = False, **options: Unpack[Options]
    ) -> Generator[tuple[int, str]]:
        """Run one batch of completions in place, and yield ``(index, text)`` for text that can no longer change.

        Completion i has the seed ``seed + row + i``. With ``chat``, a completion also ends where an answer ends in the
        chat format. The other methods use this one.
        """
        settings: dict[str, Any] = dict(options)
        stop, seed = settings.pop("stop", ()), settings.pop("seed", 0)
        new_tokens, ignore_eos = settings.pop("max_new_tokens", 256), settings.pop("ignore_eos", False)
        stops = check_stops([stop] if isinstance(stop, str) else stop)
        if new_tokens < 1:
            raise InputError(f"max_new_tokens: expected at least 1, found {new_tokens}")
        stop_ids = () if ignore_eos else self.params.config.eos_ids
        if chat:
            stops += self.chat_format.stop
            stop_ids += () if ignore_eos else self.chat_format.stop_ids(self.tokenizer)
        sampling = make_sampling(len(completions), seed=seed + row, **settings)
        session = self._session(len(completions))
        try:
            yield from complete(
                session,
                self.tokenizer,
                completions,
                max_new_tokens=new_tokens,
                sampling=sampling,
                stop_ids=stop_ids,
                stop=stops,
            )
        finally:
            self.timings, self.backends, self._idle = session.timings, session.backends, session

    def _session(self, batch: int) -> Session:
        """The idle session if it fits, or a new one. Two streams at the same time have separate sessions."""
        idle, self._idle = self._idle, None
        # A session is reused only with the same params: its cache is useless for another model.
        needed = (batch, self.max_len, self.backend)
        if idle is not None and idle.params is self.params and (idle.batch, idle.max_len, idle.backend) == needed:
            return idle
        return Session(self.params, self.max_len, batch, self.backend, chunk_of(self.params))


def chunk_of(params: Params) -> int:
    """The number of decode steps per chunk, `CHUNK` at most. It is chosen so that a chunk takes at most a tenth of a
    second if the weights are read at the full memory bandwidth."""
    device = default_device()
    rate = bandwidth(device) or (10e9 if device.platform == "cpu" else 1e12)
    return max(1, min(CHUNK, int(0.1 * rate / weight_bytes(params, per_token=True))))


def check_stops(stops: Sequence[str]) -> tuple[str, ...]:
    """The stop texts as a tuple. An empty one is refused, because it would end every completion at once."""
    if "" in stops:
        raise InputError("stop: expected a text, found an empty one")
    return tuple(stops)

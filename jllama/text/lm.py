"""`LM`: a model and its tokenizer as one object, for text in and text out."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict, Unpack, overload

from jax.sharding import Mesh
from jax.typing import DTypeLike

from jllama.config import Backend, Quant
from jllama.decode import check_prompts
from jllama.device import bandwidth, default_device
from jllama.engine.engine import Engine
from jllama.engine.request import Completion, Request, SamplingSettings
from jllama.errors import InputError
from jllama.formats import open_source
from jllama.formats.checkpoint import load
from jllama.formats.source import Source
from jllama.kernels import Choice
from jllama.mesh.layout import MODEL, axis_size
from jllama.paged import pages_for
from jllama.params import Params, unpacked, weight_bytes
from jllama.sampling import make_sampling
from jllama.stream import CHUNK, MIN_CACHE, Session, Timings, bucket
from jllama.text.complete import complete, complete_many
from jllama.text.grammars import Grammar, Grammars
from jllama.text.templates import Chat, Message, PlainChat, chat_for, chat_prompt_ids
from jllama.text.tokenizer import Tokenizer, tokenizer_for

SLOTS = {"cpu": 16}  # rows of an engine at a time, by platform
SLOTS_ELSEWHERE = 64  # a GPU reads all weights for each step, so that 64 rows take little longer than one
MIN_PAGES = 16  # smallest pool


class Options(TypedDict, total=False):
    """Options of text generation, all optional. The sampling settings are those of `SamplingSettings`."""

    max_new_tokens: int  # default 256
    temperature: float  # default 0: greedy
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]  # added to the logits of tokens
    min_tokens: int
    bad_words: Sequence[Sequence[int]]  # sequences of tokens that must not be drawn
    top_logprobs: int  # how many of the likeliest tokens of every step to report
    seed: int  # default 0; of several prompts, prompt i gets seed + i
    stop: str | Sequence[str]  # a completion ends before any of these texts
    ignore_eos: bool  # continue after end-of-sequence tokens
    json_schema: (
        Mapping[str, Any] | str
    )  # the completion is JSON of this schema (JSON text or a dict); needs llguidance
    regex: str  # the completion matches this expression as a whole; needs llguidance


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

    One prompt runs with a `Session`, which starts at once and streams. Several prompts run with an `Engine`, whose pool
    of pages has room for what they can use, or takes 0.9 of the device's free memory if that is less.
    """

    params: Params
    tokenizer: Tokenizer
    max_len: int  # the context: maximum number of tokens of prompt and completion together
    backend: Backend = "auto"
    chat_format: Chat = field(default_factory=PlainChat)  # how a conversation is written as ids
    timings: Timings = field(default_factory=Timings)  # of the last run
    backends: dict[str, dict[str, Choice]] = field(default_factory=dict)  # the choice for every op of the last run
    _idle: Session | None = field(default=None, repr=False)  # the session of the last run, with its cache
    _idle_engine: Engine | None = field(default=None, repr=False)  # of the last run of many prompts
    _grammars: Grammars | None = field(default=None, repr=False)  # made at the first constraint

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
        mesh: Mesh | None = None,
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
            mesh=mesh,
            progress=progress,
        )
        if default_device().platform == "cpu":
            params = unpacked(params)
        return cls(params, loaded_tokenizer, max_len, backend, chat_format)

    @overload
    def generate(  # pyright: ignore[reportOverlappingOverload]  (a str is a sequence of str, too)
        self, prompts: str, *, slots: int | None = None, **options: Unpack[Options]
    ) -> Completion: ...
    @overload
    def generate(
        self, prompts: Sequence[str], *, slots: int | None = None, **options: Unpack[Options]
    ) -> list[Completion]: ...
    def generate(
        self, prompts: str | Sequence[str], *, slots: int | None = None, **options: Unpack[Options]
    ) -> Completion | list[Completion]:
        """The completion of a prompt, or the completions of several prompts, of which ``slots`` run at a time (default:
        16 on a CPU, 64 on a GPU)."""
        done = [
            Completion(self.tokenizer.encode(text)) for text in ([prompts] if isinstance(prompts, str) else prompts)
        ]
        for _ in self.complete(done, slots=slots, **options):
            pass
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
        with self._engine([len(row) for row in rows], None) as engine:
            asked = [row for row in rows if len(row) > 1]
            found = iter(engine.score([row[:1] for row in asked], [row[1:] for row in asked]))
        scores = [Score(row[1:], next(found).logprobs if len(row) > 1 else []) for row in rows]
        return scores[0] if one else scores

    def complete(
        self,
        completions: Sequence[Completion],
        *,
        row: int = 0,
        slots: int | None = None,
        chat: bool = False,
        **options: Unpack[Options],
    ) -> Generator[tuple[int, str]]:
        """Run completions in place, and yield ``(index, text)`` for text that can no longer change. Of several, each is
        yielded once more when it is finished, maybe without text.

        Completion i has the seed ``seed + row + i``. With ``chat``, a completion also ends where an answer ends in the
        chat format. The other methods use this one.
        """
        settings: dict[str, Any] = dict(options)
        stop, seed = settings.pop("stop", ()), settings.pop("seed", 0)
        new_tokens, ignore_eos = settings.pop("max_new_tokens", 256), settings.pop("ignore_eos", False)
        stops = check_stops([stop] if isinstance(stop, str) else stop)
        schema, regex = settings.pop("json_schema", None), settings.pop("regex", None)
        if new_tokens < 1:
            raise InputError(f"max_new_tokens: expected at least 1, found {new_tokens}")
        if slots is not None and slots < 1:
            raise InputError(f"slots: expected at least 1, found {slots}")
        stop_ids = () if ignore_eos else self.params.config.eos_ids
        if chat:
            stops += self.chat_format.stop
            stop_ids += () if ignore_eos else self.chat_format.stop_ids(self.tokenizer)
        one = SamplingSettings(seed=seed + row, **settings)
        one.check(self.params.config)
        check_prompts(
            [c.prompt_ids for c in completions], self.max_len - 1, "one less than the context", self.params.config
        )
        if not completions:
            return
        constraint = self._constraint(schema, regex)
        if len(completions) > 1 or one.top_logprobs or constraint:
            limits = [min(new_tokens, self.max_len - len(c.prompt_ids)) for c in completions]
            requests = [
                Request(c.prompt_ids, limit, replace(one, seed=one.seed + i), stop_ids, constraint=constraint)
                for i, (c, limit) in enumerate(zip(completions, limits, strict=True))
            ]
            yield from self._complete_many(completions, requests, stops, slots)
            return
        settings.pop("top_logprobs", None)
        session = self._session()
        pieces = complete(
            session,
            self.tokenizer,
            completions[0],
            max_new_tokens=new_tokens,
            sampling=make_sampling(1, seed=one.seed, **settings),
            stop_ids=stop_ids,
            stop=stops,
        )
        try:
            for text in pieces:
                yield 0, text
        finally:
            pieces.close()
            self.timings, self.backends, self._idle = session.timings, session.backends, session

    def _constraint(self, schema: Mapping[str, Any] | str | None, regex: str | None) -> Grammar | None:
        if schema is None and regex is None:
            return None
        if schema is not None and regex is not None:
            raise InputError("regex: expected none with json_schema, found both")
        if self._grammars is None:
            ends = (*self.params.config.eos_ids, *self.chat_format.stop_ids(self.tokenizer))
            self._grammars = Grammars(self.tokenizer, self.params.config.vocab_size, ends)
        if regex is not None:
            return self._grammars.compile("regex", regex)
        return self._grammars.compile("json_schema", schema if isinstance(schema, str) else dict(schema or {}))

    def _complete_many(
        self, completions: Sequence[Completion], requests: Sequence[Request], stop: Sequence[str], slots: int | None
    ) -> Generator[tuple[int, str]]:
        timings = Timings()
        with self._engine([len(r.prompt) + r.max_new_tokens for r in requests], slots) as engine:
            try:
                yield from complete_many(
                    engine, self.tokenizer, completions, requests, stop=[stop] * len(requests), timings=timings
                )
            finally:
                self.timings, self.backends = timings, engine.backends

    def _session(self) -> Session:
        """The idle session if it fits, or a new one. Two streams at the same time have separate sessions."""
        idle, self._idle = self._idle, None
        # A session is reused only with the same params: its cache is useless for another model.
        if (
            idle is not None
            and idle.params is self.params
            and (idle.max_len, idle.backend) == (self.max_len, self.backend)
        ):
            return idle
        return Session(self.params, self.max_len, self.backend, chunk_of(self.params))

    @contextmanager
    def _engine(self, lengths: Sequence[int], slots: int | None) -> Generator[Engine]:
        """An engine for requests of these lengths, prompts and new tokens together: the idle one if it fits, or a new
        one. Two runs at the same time have separate engines."""
        slots = default_slots() if slots is None else slots
        # Few sizes, so that few shapes are compiled.
        longest = min(bucket(max(lengths, default=1), MIN_CACHE), self.max_len)
        pages = bucket(sum(sorted(map(pages_for, lengths))[-slots:]), MIN_PAGES)
        engine, self._idle_engine = self._idle_engine, None
        if engine is None or not _serves(engine, self, slots, longest, pages):
            del engine  # its pages are free before the new ones are made
            engine = Engine(self.params, slots=slots, max_pages=pages, max_len=max(longest, 2), backend=self.backend)
        try:
            yield engine
        finally:
            self._idle_engine = engine


def default_slots() -> int:
    """The default number of rows that an engine runs at a time."""
    return SLOTS.get(default_device().platform, SLOTS_ELSEWHERE)


def _serves(engine: Engine, lm: LM, slots: int, longest: int, pages: int) -> bool:
    """Whether an engine can be reused for these requests of a model. It has asked for as many pages as they want. It
    may have got fewer, but enough for the longest of them."""
    same = engine.params is lm.params and engine.backend == lm.backend and engine.slots == slots
    enough = (engine.max_pages or 0) >= pages and engine.statistics.pages >= pages_for(longest)
    return same and engine.max_len >= longest and enough


def chunk_of(params: Params) -> int:
    """The number of decode steps per chunk, `CHUNK` at most. It is chosen so that a chunk takes at most a tenth of a
    second if the weights are read at the full memory bandwidth."""
    device = default_device()
    rate = bandwidth(device) or (10e9 if device.platform == "cpu" else 1e12)
    of_device = weight_bytes(params, per_token=True) / axis_size(params.mesh, MODEL)
    return max(1, min(CHUNK, int(0.1 * rate / of_device)))


def check_stops(stops: Sequence[str]) -> tuple[str, ...]:
    """The stop texts as a tuple. An empty one is refused, because it would end every completion at once."""
    if "" in stops:
        raise InputError("stop: expected a text, found an empty one")
    return tuple(stops)

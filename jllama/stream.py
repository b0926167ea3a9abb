"""The stateful shell around the pure core: prompts go in, tokens come out chunk by chunk while the next chunk runs."""

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, fields, replace

import jax
import jax.numpy as jnp
import numpy as np

from jllama.cache import KVCache, grow, init_cache
from jllama.compilation import compile_seconds
from jllama.config import Backend
from jllama.decode import (
    NO_TOKEN,
    Drawn,
    check_prompts,
    jit_decode_chunk,
    jit_prefill,
    jit_sample_first,
    stop_table,
    tokens_seen,
)
from jllama.errors import InputError
from jllama.kernels import Choice, Recorded, known
from jllama.params import Params
from jllama.sampling import Sampling, make_sampling

MIN_BUCKET = 16  # tokens of a prompt
MIN_CACHE = 128
PREFILL_PIECE = 2048  # longer prompts go through in pieces: attention's scores stay bounded, and so do compilations
CHUNK = 16  # tokens a row between two looks at the output


def bucket(n: int, low: int = MIN_BUCKET) -> int:
    """The smallest power of two that holds ``n``: padded shapes are few, so compilations are."""
    return max(low, 1 << (n - 1).bit_length()) if n > 0 else low


@dataclass
class Timings:
    """Seconds of the last `Session.run`, and what it produced. Where `jllama.compilation.start_clock` was called,
    compiling is counted apart."""

    compile: float = 0.0
    prefill: float = 0.0  # until the first token
    decode: float = 0.0
    prompt_tokens: int = 0  # fed; those found in the cache do not count
    new_tokens: int = 0
    decode_steps: int = 0  # a step gives a token to every row
    decoded: int = 0  # tokens that those steps brought: all but each row's first

    @property
    def decode_rate(self) -> float:
        """Tokens a second while decoding, all rows together."""
        return self.decoded / self.decode if self.decode > 0 else 0.0

    def __add__(self, other: "Timings") -> "Timings":
        return Timings(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Tokens:
    """What one chunk brought: ``ids[row]`` and ``logprobs[row]``, empty for rows that are done."""

    ids: list[list[int]]
    logprobs: list[list[float]]


@dataclass
class Session:
    """A model with a cache that outlives a call: of a prompt, only what the cache does not hold yet is fed.

    After a run, ``backends`` says which implementation every op of its ``"prefill"`` and ``"decode"`` had, and why, as
    the programs that ran were compiled."""

    params: Params
    max_len: int
    batch: int = 1
    backend: Backend = "auto"
    chunk: int = CHUNK
    timings: Timings = field(default_factory=Timings)

    def __post_init__(self) -> None:
        # Made once: before a prompt's first operation every step of the host is time in which the device waits.
        self._no_logits = jnp.zeros((self.batch, self.params.config.vocab_size), jnp.float32)
        self.backends: dict[str, dict[str, Choice]] = {}
        self._forget()

    def _note(self, phase: str, ran: Recorded) -> None:
        """Keep what a compiled piece chose for its ops."""
        self.backends.setdefault(phase, {}).update(ran.choices)

    def _forget(self) -> None:
        self._cache: KVCache | None = None
        self._held: list[list[int]] = [[] for _ in range(self.batch)]  # the tokens in the cache, row by row

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop_ids: Sequence[int] = (),
    ) -> Generator[Tokens]:
        """Continue the prompts (one a row of the batch). Close the iterator to stop early; the cache stays usable."""
        self._check(prompts)
        self.timings, self.backends = Timings(), {}
        self._how = {"backend": self.backend, "arch": known(self.params)}
        clock = _Clock(self.timings)
        limit = np.asarray([min(max_new_tokens, self.max_len - len(p)) for p in prompts], np.int32)
        logits, cache = self._prefill(prompts, int(limit.max()))
        sampling = make_sampling(self.batch) if sampling is None else sampling
        seen = self._seen(prompts) if sampling.repetition_penalty is not None else None
        (state, drawn), choices = jit_sample_first(
            logits, cache, sampling, limit, stop_table(self.batch, stop_ids), seen, **self._how
        )
        self._note("prefill", choices)
        left = int(limit.max()) - 1
        try:
            self._held = [list(p) for p in prompts]
            while True:
                # The next chunk is under way before this one is looked at: the device never waits for the host.
                ahead = None
                if left > 0:
                    (state, ahead), choices = jit_decode_chunk(self.params, state, steps=self.chunk, **self._how)
                    self._note("decode", choices)
                    left -= self.chunk
                tokens = self._collect(drawn)
                clock.tick(tokens, steps=drawn.tokens.size // self.batch)
                yield tokens
                if ahead is None or not any(tokens.ids):
                    break
                drawn = ahead
        except InputError:  # NaN: the cache is full of it
            self._forget()
            raise
        finally:
            # An interrupt can fall between a donation and its result.
            if not self._held[0] or state.cache.lengths.is_deleted():
                self._forget()
            else:
                self._cache = state.cache

    def _collect(self, drawn: Drawn) -> Tokens:
        drawn = jax.device_get(drawn)  # blocks; both on their way at once
        tokens, logprobs = (a.reshape(-1, self.batch).T for a in (drawn.tokens, drawn.logprobs))  # [B, steps]
        if np.isnan(logprobs).any():
            row = int(np.isnan(logprobs).any(axis=1).argmax())
            raise InputError(f"model: row {row}: logits are NaN: the weights hold NaN or Inf, or overflow this dtype")
        ids = [row[row != NO_TOKEN].tolist() for row in tokens]
        for held, new in zip(self._held, ids, strict=True):
            held.extend(new)
        return Tokens(
            ids,
            [probs[: len(new)].tolist() for probs, new in zip(logprobs, ids, strict=True)],
        )

    def _check(self, prompts: Sequence[Sequence[int]]) -> None:
        if len(prompts) != self.batch:
            raise InputError(f"prompts: expected {self.batch} (the session's batch), found {len(prompts)}")
        check_prompts(prompts, self.max_len - 1, "one less than the context", self.params.config)

    def _prefill(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[jax.Array, KVCache]:
        # The last token drawn is not in the cache, and the last of a prompt must be fed to give logits.
        kept = [min(_common_prefix(h[:-1], p), len(p) - 1) for h, p in zip(self._held, prompts, strict=True)]
        room = self._room_for(max(map(len, prompts)) + new_tokens)
        cache = replace(room, lengths=np.asarray(kept, np.int32))
        self._forget()  # donated from here on; it comes back once there is text
        logits = self._no_logits
        rest = [list(p[k:]) for p, k in zip(prompts, kept, strict=True)]
        self.timings.prompt_tokens = sum(map(len, rest))
        for at in range(0, max(map(len, rest)), PREFILL_PIECE):
            tokens, lengths = pad([row[at : at + PREFILL_PIECE] for row in rest])
            (logits, cache), choices = jit_prefill(self.params, tokens, lengths, logits, cache, **self._how)
            self._note("prefill", choices)
        return logits, cache

    def _room_for(self, tokens: int) -> KVCache:
        # No more room than this run can use: attention reads all of it.
        size = min(bucket(tokens, MIN_CACHE), self.max_len)
        if self._cache is None:
            params = self.params
            return init_cache(params.config, self.batch, size, params.dtype, stacked=params.stacked)
        return self._cache if size <= self._cache.max_len else grow(self._cache, size)

    def _seen(self, prompts: Sequence[Sequence[int]]) -> jax.Array:
        tokens, lengths = pad(prompts)
        return tokens_seen(jnp.asarray(tokens), jnp.asarray(lengths), self.params.config.vocab_size)


class _Clock:
    """Adds the time between two ticks to where it belongs."""

    def __init__(self, timings: Timings) -> None:
        self._timings, self._since, self._compiled = timings, time.perf_counter(), compile_seconds()

    def tick(self, tokens: Tokens, steps: int) -> None:
        now, compiled, timings = time.perf_counter(), compile_seconds(), self._timings
        compiling = min(compiled - self._compiled, now - self._since)
        spent, new = now - self._since - compiling, sum(map(len, tokens.ids))
        timings.compile += compiling
        if timings.new_tokens == 0:
            timings.prefill += spent
        else:
            timings.decode += spent
            timings.decode_steps += steps
            timings.decoded += new
        timings.new_tokens += new
        self._since, self._compiled = now, compiled


def pad(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of different lengths as one [B, bucket] array, and their lengths [B]; a compiled call takes them as they
    are, sooner than the host could make device arrays of them."""
    out = np.zeros((len(rows), bucket(max(map(len, rows)))), np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out, np.asarray([len(row) for row in rows], np.int32)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    return min(len(a), len(b)) if same is None else same

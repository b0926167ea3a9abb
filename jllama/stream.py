"""`Session`: one prompt at a time, streamed. It is the stateful layer over the pure functions of `jllama.decode`. It
yields the tokens of one chunk while the device computes the next.

Many prompts run with `jllama.Engine`; a batch inside another program is `jllama.generate`.
"""

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, fields, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jllama.cache import KVCache, grow, init_cache
from jllama.compilation import compile_seconds
from jllama.config import Backend
from jllama.decode import (
    NO_TOKEN,
    StepOutput,
    check_prompts,
    jit_decode_chunk,
    jit_prefill,
    jit_sample_first,
    stop_table,
)
from jllama.errors import InputError
from jllama.kernels import Choice, Recorded, known
from jllama.mesh.layout import DATA, MODEL, axis_size, spec
from jllama.mesh.place import placed
from jllama.mesh.run import fetch
from jllama.params import Params
from jllama.sampling import Sampling, begin_history, make_sampling

MIN_BUCKET = 16  # smallest padded length of a prompt
MIN_CACHE = 128  # smallest length of a cache
PREFILL_PIECE = 2048  # longer prompts are split: this bounds the attention scores and the number of compilations
CHUNK = 16  # decode steps per compiled call: the host reads the output once per chunk


def bucket(n: int, low: int = MIN_BUCKET) -> int:
    """The smallest power of two that is at least ``n`` and ``low``. Lengths are padded to it, so that few shapes are
    compiled."""
    return max(low, 1 << (n - 1).bit_length()) if n > 0 else low


@dataclass
class Timings:
    """Seconds and token counts of the last `Session.run`. Compile time is separate only if
    `jllama.compilation.start_clock` was called; otherwise it is part of the other times."""

    compile: float = 0.0
    prefill: float = 0.0  # until the first token
    decode: float = 0.0
    prompt_tokens: int = 0  # computed in prefill; tokens that the cache held already do not count
    new_tokens: int = 0
    decode_steps: int = 0  # a step computes a token for every row
    decoded: int = 0  # tokens from decode steps: all new tokens except the first of each row

    @property
    def decode_rate(self) -> float:
        """Tokens per second while decoding, summed over all rows."""
        return self.decoded / self.decode if self.decode > 0 else 0.0

    def __add__(self, other: "Timings") -> "Timings":
        return Timings(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class TokenChunk:
    """The new tokens of one chunk, and their log-probabilities. Both are empty once the completion is done."""

    ids: list[int]
    logprobs: list[float]


@dataclass
class Session:
    """A model with the cache of one sequence, which is kept between calls. The tokens at the start of a prompt that the
    cache already holds are not computed again.

    After a run, ``backends`` says which implementation every op of ``"prefill"`` and of ``"decode"`` had, and why. It
    was recorded when the programs that ran were traced."""

    params: Params
    max_len: int
    backend: Backend = "auto"
    chunk: int = CHUNK
    timings: Timings = field(default_factory=Timings)

    def __post_init__(self) -> None:
        self.params, mesh = placed(self.params), self.params.mesh
        self._rows = axis_size(mesh, DATA)  # of a mesh, the devices along `data` all compute the same row
        # Allocated once: the device idles during all host work before the first operation of a prompt.
        lies = None if mesh is None else NamedSharding(mesh, spec(mesh, DATA, MODEL))
        self._no_logits = jnp.zeros((self._rows, self.params.config.vocab_size), jnp.float32, device=lies)
        self.backends: dict[str, dict[str, Choice]] = {}
        self._compiled: set[object] = set()  # programs of decode chunks that ran in this session
        self._drop_cache()

    def _record(self, phase: str, ran: Recorded) -> None:
        """Add the choices of a compiled function to ``backends``."""
        self.backends.setdefault(phase, {}).update(ran.choices)

    def _drop_cache(self) -> None:
        self._cache: KVCache | None = None
        self._cached_ids: list[int] = []  # the tokens of the cache

    def run(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop_ids: Sequence[int] = (),
    ) -> Generator[TokenChunk]:
        """Continue a prompt. ``sampling`` (default: greedy) has one row. Close the iterator to stop early; the cache
        stays usable."""
        check_prompts([prompt], self.max_len - 1, "one less than the context", self.params.config)
        self.timings, self.backends = Timings(), {}
        self._static = {"backend": self.backend, "arch": known(self.params)}
        clock = Clock(self.timings)
        limit = min(max_new_tokens, self.max_len - len(prompt))
        logits, cache = self._prefill(prompt, limit)
        sampling = make_sampling(1) if sampling is None else sampling
        if self._rows > 1:
            rows = np.zeros(self._rows, np.int32)
            sampling = replace(sampling, **jax.tree.map(lambda a: a[rows], vars(sampling)))
        history = begin_history(sampling, *self._pad(prompt), self.params.config.vocab_size)
        (state, output), choices = jit_sample_first(
            logits,
            cache,
            sampling,
            np.full(self._rows, limit, np.int32),
            stop_table(self._rows, stop_ids),
            history,
            mesh=self.params.mesh,
            **self._static,
        )
        self._record("prefill", choices)
        left = limit - 1
        program = cache.max_len, jax.tree.structure(sampling)

        def launch() -> StepOutput | None:
            """The next chunk, if one is wanted."""
            nonlocal state, left
            if left <= 0:
                return None
            (state, ahead), choices = jit_decode_chunk(self.params, state, steps=self.chunk, **self._static)
            self._record("decode", choices)
            self._compiled.add(program)
            left -= self.chunk
            return ahead

        try:
            self._cached_ids = list(prompt)
            while True:
                # The next chunk is launched before this one is read, so that the device does not wait for the host. If
                # its program must be compiled, it is launched after: the first token is there long before.
                compiled = program in self._compiled
                ahead = launch() if compiled else None
                tokens = self._collect(output)
                clock.tick(len(tokens.ids), steps=output.tokens.size // self._rows)
                yield tokens
                ahead = ahead if compiled or not tokens.ids else launch()
                if ahead is None or not tokens.ids:
                    break
                output = ahead
        except InputError:  # NaN logits: the cache holds NaN, too
            self._drop_cache()
            raise
        finally:
            # An interrupt may come after the cache was donated and before the new one was returned.
            if not self._cached_ids or state.cache.lengths.is_deleted():
                self._drop_cache()
            else:
                self._cache = state.cache

    def _collect(self, output: StepOutput) -> TokenChunk:
        # Blocks; copies both arrays at the same time.
        tokens, logprobs = fetch((output.tokens, output.logprobs), self.params.mesh)
        tokens, logprobs = (a.reshape(-1, self._rows)[:, 0] for a in (tokens, logprobs))  # [steps]
        if np.isnan(logprobs).any():
            raise InputError("model: logits are NaN: the weights hold NaN or Inf, or overflow this dtype")
        ids = tokens[tokens != NO_TOKEN].tolist()
        self._cached_ids += ids
        return TokenChunk(ids, logprobs[: len(ids)].tolist())

    def _prefill(self, prompt: Sequence[int], new_tokens: int) -> tuple[jax.Array, KVCache]:
        # The last drawn token is not in the cache. The last token of a prompt is always computed, for its logits.
        kept = min(_common_prefix(self._cached_ids[:-1], prompt), len(prompt) - 1)
        cache = self._cache_for(len(prompt) + new_tokens)
        lengths = np.full(self._rows, kept, np.int32)
        if (mesh := self.params.mesh) is not None:  # donated with the cache, so it lies as the result does
            lengths = jax.device_put(lengths, NamedSharding(mesh, spec(mesh, DATA)))
        cache = replace(cache, lengths=lengths)
        self._drop_cache()  # it is donated from here on; `run` stores the new one
        logits = self._no_logits
        self.timings.prompt_tokens = len(prompt) - kept
        for at in range(kept, len(prompt), PREFILL_PIECE):
            tokens, lengths = self._pad(prompt[at : at + PREFILL_PIECE])
            (logits, cache), choices = jit_prefill(self.params, tokens, lengths, logits, cache, **self._static)
            self._record("prefill", choices)
        return logits, cache

    def _pad(self, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """`pad` of the same row for every row of the cache."""
        return pad([ids] * self._rows)

    def _cache_for(self, tokens: int) -> KVCache:
        """The cache, new or grown, with room for ``tokens``. It has little more, because attention reads all of it."""
        size = min(bucket(tokens, MIN_CACHE), self.max_len)
        if self._cache is None:
            params = self.params
            where = params.config, self._rows, size, params.dtype
            return init_cache(*where, stacked=params.stacked, mesh=params.mesh)
        return self._cache if size <= self._cache.max_len else grow(self._cache, size)


class Clock:
    """Adds the time between two ticks to the right field of a `Timings`."""

    def __init__(self, timings: Timings) -> None:
        self._timings, self._since, self._compiled = timings, time.perf_counter(), compile_seconds()

    def tick(self, new: int, steps: int) -> None:
        """Record that ``new`` tokens have been read, from this many decode steps of all rows."""
        now, compiled, timings = time.perf_counter(), compile_seconds(), self._timings
        compiling = min(compiled - self._compiled, now - self._since)
        spent = now - self._since - compiling
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
    """Rows of different lengths as one array [B, bucket], and their lengths [B]. Both are numpy arrays: a compiled call
    takes them directly, which is faster than to create device arrays first."""
    out = np.zeros((len(rows), bucket(max(map(len, rows)))), np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out, np.asarray([len(row) for row in rows], np.int32)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    return min(len(a), len(b)) if same is None else same

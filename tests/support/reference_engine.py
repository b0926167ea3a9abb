"""The reference engine: one request at a time, without a cache. A token comes from a forward over the whole text before
it. A text that is given is checked in one forward, because no token depends on those after it."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jllama.engine.request import Request
from jllama.engine.state import extra_settings
from jllama.model import forward
from jllama.params import Params
from jllama.sampling import NOTHING, History, Sampling, sample

LONGEST = 256
STEPS = 128  # the longest text, and one token more
CLOSE = 1e-3  # a gap between the two largest logits that rounding may close


@dataclass(frozen=True)
class Drawn:
    ids: list[int]
    logprobs: list[float]
    gaps: list[float]  # between the two largest logits of every step
    ends: list[bool]  # whether a token of the given text ends the request


def drawn(params: Params, request: Request, text: list[int]) -> Drawn:
    """What a request that runs alone draws at every step of this text, and after it."""
    prompt, s, vocab, steps = request.prompt, request.sampling, params.config.vocab_size, len(text) + 1
    assert steps <= STEPS
    tokens = [*prompt, *text]
    padded = np.zeros((1, LONGEST), np.int32)
    padded[0, : len(tokens)] = tokens
    seen, counts = np.zeros((STEPS, vocab), bool), np.zeros((STEPS, vocab), np.int32)
    recent, allowed = np.full((STEPS, 7), NOTHING, np.int32), np.ones((STEPS, vocab), bool)
    matcher = request.constraint and request.constraint.matcher()
    stops, ends = request.stops(params.config), []
    for i in range(steps):
        before = tokens[: len(prompt) + i]
        seen[i, before] = True
        np.add.at(counts[i], text[:i], 1)
        recent[i] = ([NOTHING] * 7 + before)[-7:]
        if matcher and not matcher.done:
            allowed[i] = np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")[:vocab]
        if i < len(text):
            if matcher and not matcher.done and allowed[i, text[i]]:
                matcher.accept(text[i])
            ends.append(text[i] in stops or i + 1 == request.max_new_tokens or bool(matcher and matcher.done))
    cuts = dict(temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, min_p=s.min_p)
    sampling = extra_settings(request).replace(
        key=jax.random.key(s.seed), **{name: np.asarray(value) for name, value in cuts.items()}
    )
    stop_ids = np.asarray([*stops, *[NOTHING] * (16 - len(stops))], np.int32)
    history = History(seen=seen, counts=counts, recent=recent)  # type: ignore[arg-type]
    found = _draw(params, padded, np.int32(len(prompt)), sampling, history, stop_ids, allowed)
    return Drawn(*(np.asarray(a)[:steps].tolist() for a in found), ends=ends)


def alone(params: Params, request: Request) -> Drawn:
    """The result of a request that runs alone, token by token."""
    text: list[int] = []
    while not any((found := drawn(params, request, text)).ends):
        text.append(found.ids[-1])
    return found


def scores(params: Params, context: list[int], tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The log-probability of each of ``tokens`` given all before it, and the most likely tokens at its position."""
    padded = np.zeros((1, LONGEST), np.int32)
    padded[0, : len(context) + len(tokens)] = context + tokens
    logprobs = np.asarray(_logprobs(params, padded))[len(context) - 1 : len(context) + len(tokens) - 1]
    return logprobs[np.arange(len(tokens)), tokens], logprobs.argmax(-1)


@jax.jit
def _logprobs(params, tokens):
    return jax.nn.log_softmax(forward(params, tokens)[0][0])


@jax.jit
def _draw(params, tokens, first, sampling: Sampling, history: History, stop_ids, allowed):
    logits = forward(params, tokens)[0][0]  # [LONGEST, vocab]
    logits = logits[jnp.minimum(first - 1 + jnp.arange(STEPS), LONGEST - 1)]
    limited = jnp.where(allowed, logits, -jnp.inf)
    rows, stops = jax.tree.map(lambda a: jnp.broadcast_to(a, (STEPS, *a.shape)), (sampling, stop_ids))
    token, _ = sample(limited, rows, jnp.arange(STEPS), history=history, stop_ids=stops)
    best = jax.lax.top_k(limited, 2)[0]
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]
    return token, logprobs, best[:, 0] - best[:, 1]


def assert_same(params: Params, request: Request, ids: list[int], logprobs: list[float], *, ended: bool = True) -> None:
    """Whether an engine's text is that of the request alone. A greedy text may differ after a close decision."""
    wanted, n = drawn(params, request, ids), len(ids)
    if ids != wanted.ids[:n]:
        n = next(i for i, (a, b) in enumerate(zip(ids, wanted.ids, strict=False)) if a != b)
        assert request.sampling.temperature == 0, (n, ids, wanted.ids)
        assert wanted.gaps[n] < CLOSE, (n, ids, wanted)
    else:
        assert not any(wanted.ends[:-1]), (ids, wanted)
        assert not ended or wanted.ends[-1], (ids, wanted)
    np.testing.assert_allclose(logprobs[:n], wanted.logprobs[:n], atol=1e-4)

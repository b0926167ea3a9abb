"""The reference engine: one request at a time, without a cache. Each token comes from a forward over the whole text."""

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
CLOSE = 1e-3  # a gap between the two largest logits that rounding may close


@dataclass(frozen=True)
class Alone:
    ids: list[int]
    logprobs: list[float]
    gaps: list[float]  # between the two largest logits of every step


def alone(params: Params, request: Request) -> Alone:
    """The result of a request that runs alone."""
    tokens, out, s = list(request.prompt), Alone([], [], []), request.sampling
    stops, vocab = request.stops(params.config), params.config.vocab_size
    matcher = request.constraint and request.constraint.matcher()
    for step in range(request.max_new_tokens):
        padded = np.zeros((1, LONGEST), np.int32)
        padded[0, : len(tokens)] = tokens
        drawn = tokens[len(request.prompt) :]
        history = History(
            seen=np.isin(np.arange(vocab), tokens)[None],
            counts=np.bincount(np.asarray(drawn, int), minlength=vocab)[None],
            recent=np.asarray([([NOTHING] * 7 + tokens)[-7:]], np.int32),
        )
        cuts = dict(temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, min_p=s.min_p)
        sampling = jax.tree.map(lambda a: np.asarray(a)[None], extra_settings(request)).replace(
            key=jax.random.key(s.seed)[None], **{name: np.asarray([value]) for name, value in cuts.items()}
        )
        stop_ids = np.asarray([[*stops, *[NOTHING] * (16 - len(stops))]], np.int32)
        allowed = np.ones((1, vocab), bool)
        if matcher:
            allowed[0] = np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")[:vocab]
        token, logprob, gap = _step(
            params, padded, np.int32(len(tokens)), sampling, np.int32([step]), history, stop_ids, allowed
        )
        out.ids.append(int(token)), out.logprobs.append(float(logprob)), out.gaps.append(float(gap))
        tokens.append(out.ids[-1])
        if matcher:
            matcher.accept(tokens[-1])
        if tokens[-1] in stops or (matcher and matcher.done):
            break
    return out


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
def _step(params, tokens, length, sampling: Sampling, step, history: History, stop_ids, allowed):
    logits, _ = forward(params, tokens, lengths=length[None], last_only=True)
    limited = jnp.where(allowed, logits, -jnp.inf)
    token, _ = sample(limited, sampling, step, history=history, stop_ids=stop_ids)
    best = jax.lax.top_k(limited[0], 2)[0]
    return token[0], jax.nn.log_softmax(logits[0])[token[0]], best[0] - best[1]


def assert_same(params: Params, request: Request, ids: list[int], logprobs: list[float], *, ended: bool = True) -> None:
    """Whether an engine's text is that of the request alone. A greedy text may differ after a close decision."""
    wanted = alone(params, request)
    n = len(wanted.ids) if ended else len(ids)
    if ids != wanted.ids[:n]:
        first = next(i for i, (a, b) in enumerate(zip(ids, wanted.ids[:n], strict=False)) if a != b)
        assert request.sampling.temperature == 0, (first, ids, wanted.ids)
        assert wanted.gaps[first] < CLOSE, (first, ids, wanted)
        n = first
    np.testing.assert_allclose(logprobs[:n], wanted.logprobs[:n], atol=1e-4)

"""Generates text and streams it: one prompt with a `Session`, many with an `Engine`. The command lines and `jllama.LM`
use this."""

from collections.abc import Generator, Sequence

from jllama.engine.engine import Engine
from jllama.engine.request import Completion, Event, Request
from jllama.sampling import Sampling
from jllama.stream import Clock, Session, Timings
from jllama.text.tokenizer import TextStream, Tokenizer


def complete(
    session: Session,
    tokenizer: Tokenizer,
    completion: Completion,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: Sequence[int] = (),
    stop: Sequence[str] = (),
) -> Generator[str]:
    """Continue one prompt, and yield text that can no longer change. Close the iterator to stop early."""
    stream = TextStream(tokenizer, completion.prompt_ids, tuple(stop))
    tokens = session.run(completion.prompt_ids, max_new_tokens, sampling, stop_ids)
    try:
        for chunk in tokens:
            if piece := _take(completion, stream, chunk.ids, chunk.logprobs, stop_ids):
                yield piece
            if completion.finish_reason:
                break
    finally:
        tokens.close()
    completion.finish_reason = completion.finish_reason or "length"
    if rest := _finish(completion, stream):
        yield rest


def complete_many(
    engine: Engine,
    tokenizer: Tokenizer,
    completions: Sequence[Completion],
    requests: Sequence[Request],
    *,
    stop: Sequence[Sequence[str]],
    timings: Timings | None = None,
) -> Generator[tuple[int, str]]:
    """Run many requests, with the ``stop`` texts of each. Yields ``(index, text)`` for text that can no longer change,
    and once more, maybe without text, when a completion is finished. Close the iterator to abort the others.

    ``timings`` are filled: prefill is the time until the first token of all."""
    timings = Timings() if timings is None else timings
    streams = [TextStream(tokenizer, c.prompt_ids, tuple(s)) for c, s in zip(completions, stop, strict=True)]
    before, clock = engine.statistics, Clock(timings)
    handles = {handle: i for i, handle in enumerate(engine.submit_all(requests))}
    turns, steps = engine.follow(list(handles)), before.decode_steps
    try:
        for events in turns:
            now = engine.statistics
            clock.tick(sum(len(event.ids) for event in events), now.decode_steps - steps)
            steps = now.decode_steps
            for event in events:
                i = handles[event.handle]
                if text := _settle(engine, event, completions[i], streams[i]):
                    yield i, text
                elif event.handle.finished:
                    yield i, ""
    finally:
        turns.close()
        now = engine.statistics
        hits = now.prefix_hits - before.prefix_hits
        timings.prompt_tokens = now.prompt_tokens - before.prompt_tokens - hits + len(handles)  # steps feed the last


def _settle(engine: Engine, event: Event, completion: Completion, stream: TextStream) -> str:
    """The text that an event settles. A request is aborted if a stop text has come."""
    handle = event.handle
    text = _take(completion, stream, event.ids, event.logprobs, handle.request.stops(engine.params.config))
    if completion.finish_reason:
        engine.abort(handle)
    if handle.finished:
        completion.finish_reason = completion.finish_reason or event.finish_reason
        completion.top_logprobs = handle.completion.top_logprobs[: len(completion.ids)]
        text += _finish(completion, stream)
    return text


def _take(
    completion: Completion, stream: TextStream, ids: list[int], logprobs: list[float], stop_ids: Sequence[int]
) -> str:
    """Add new tokens to a completion, up to a stop. Returns the text that can no longer change."""
    out = ""
    for token, logprob in zip(ids, logprobs, strict=True):
        if completion.finish_reason:
            break
        completion.ids.append(token)
        completion.logprobs.append(logprob)
        if token in stop_ids:
            completion.finish_reason = "stop"
            break
        out += stream.push([token])
        if stream.stopped:
            completion.finish_reason = "stop"
    completion.text += out
    return out


def _finish(completion: Completion, stream: TextStream) -> str:
    """Add the text that was held back."""
    rest = stream.finish()
    completion.text += rest
    return rest

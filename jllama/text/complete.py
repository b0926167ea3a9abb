"""Generates text for a batch of prompts and streams it. The command lines and `jllama.LM` use this."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

from jllama.sampling import Sampling
from jllama.stream import Session
from jllama.text.tokenizer import TextStream, Tokenizer


@dataclass
class Completion:
    """The completion of one prompt. It grows while `complete` runs."""

    prompt_ids: list[int]
    ids: list[int] = field(default_factory=list)  # the new ids, including a stop token
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None  # "stop" (token or string) or "length"; None: not finished


def complete(
    session: Session,
    tokenizer: Tokenizer,
    completions: Sequence[Completion],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: Sequence[int] = (),
    stop: Sequence[str] = (),
) -> Generator[tuple[int, str]]:
    """Run a batch, and yield ``(row, text)`` for text that can no longer change. Close the iterator to stop early."""
    texts = [TextStream(tokenizer, c.prompt_ids, tuple(stop)) for c in completions]
    tokens = session.run([c.prompt_ids for c in completions], max_new_tokens, sampling, stop_ids)
    try:
        for chunk in tokens:
            for row, completion in enumerate(completions):
                if piece := _take(completion, texts[row], chunk.ids[row], chunk.logprobs[row], stop_ids):
                    yield row, piece
            if all(c.finish_reason for c in completions):
                break
    finally:
        tokens.close()
    for row, completion in enumerate(completions):
        completion.finish_reason = completion.finish_reason or "length"
        if rest := texts[row].finish():
            completion.text += rest
            yield row, rest


def _take(
    completion: Completion, text: TextStream, ids: list[int], logprobs: list[float], stop_ids: Sequence[int]
) -> str:
    """Add the tokens of one chunk to a completion, up to a stop. Returns the text that can no longer change."""
    out = ""
    for token, logprob in zip(ids, logprobs, strict=True):
        if completion.finish_reason:
            break
        completion.ids.append(token)
        completion.logprobs.append(logprob)
        if token in stop_ids:
            completion.finish_reason = "stop"
            break
        out += text.push([token])
        if text.stopped:
            completion.finish_reason = "stop"
    completion.text += out
    return out

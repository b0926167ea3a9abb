"""Workloads: batch sizes, prompt lengths, and the prompts themselves."""

import random
from dataclasses import dataclass

SEED = 42
DRAWN = "random:"  # prefix of a preset's name: each process makes the weights on its device, and none writes them
TEXT = "Once upon a time,"
SAMPLING = {"temperature": 0.8, "top_p": 0.9}  # settings of sampled workloads
VERIFIED = 32  # how many new tokens of a row are checked


@dataclass(frozen=True)
class Workload:
    """``case`` is ``decode``, ``prefill`` (one new token) or ``sampled``. The first two are greedy and checked; a
    sampled decode is not checked."""

    case: str
    batch: int
    prompt_len: int
    new_tokens: int

    @property
    def context(self) -> int:
        """Tokens that a row holds at the end."""
        return self.prompt_len + self.new_tokens

    @property
    def sampled(self) -> bool:
        """Whether tokens are sampled, with `SAMPLING`."""
        return self.case == "sampled"

    @property
    def mean_context(self) -> float:
        """Tokens that a row holds in the middle of decoding."""
        return self.prompt_len + self.new_tokens / 2


def grid(
    batches: list[int],
    prompt_lens: list[int],
    new_tokens: int,
    prefills: list[tuple[int, int]],
    contexts: list[int],
    *,
    sampled: bool = False,
) -> list[Workload]:
    """All workloads: the first decode, the prefills, the other decodes, decodes that end at ``contexts``, and sampled
    ones. The most important come first, because a run may be cut off. ``prefills`` are rows and lengths of prompts;
    ``contexts`` have one row."""
    decodes = [Workload("decode", b, p, new_tokens) for p in prompt_lens for b in batches]
    decodes += [Workload("decode", 1, c - new_tokens, new_tokens) for c in contexts]
    draws = [Workload("sampled", b, prompt_lens[0], new_tokens) for b in batches if sampled]
    return [decodes[0], *(Workload("prefill", b, p, 1) for b, p in prefills), *decodes[1:], *draws]


def prompts(workload: Workload, vocab_size: int, bos_id: int, text: list[int] | None) -> list[list[int]]:
    """One prompt per row, all of the same length. ``text`` is the ids of a prompt, which is repeated to that length.
    Without it the ids are random, without control tokens."""
    rows = []
    for row in range(workload.batch):
        if text:
            body = (text[1:] * (workload.prompt_len // max(len(text) - 1, 1) + 1))[: workload.prompt_len - 1]
        else:
            draw = random.Random(SEED + row)
            body = [draw.randrange(3, vocab_size) for _ in range(workload.prompt_len - 1)]
        rows.append([bos_id, *body])
    return rows

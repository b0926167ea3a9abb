"""What is run: shapes of batches and prompts, and the prompts themselves."""

import random
from dataclasses import dataclass

SEED = 42
DRAWN = "random:"  # before a preset's name: weights that each process draws on its device, nowhere written
TEXT = "Once upon a time,"
SAMPLING = {"temperature": 0.8, "top_p": 0.9}  # of a workload that draws its tokens
VERIFIED = 32  # new tokens of a row that are checked


@dataclass(frozen=True)
class Workload:
    """``case`` is ``decode``, ``prefill``, which makes one token, or ``sampled``: a decode that draws, and so is not
    checked; the others are greedy."""

    case: str
    batch: int
    prompt_len: int
    new_tokens: int

    @property
    def context(self) -> int:
        """Tokens a row holds at the end."""
        return self.prompt_len + self.new_tokens

    @property
    def sampled(self) -> bool:
        """Whether tokens are drawn, as `SAMPLING` says."""
        return self.case == "sampled"

    @property
    def mean_context(self) -> float:
        """Tokens a row holds in the middle of decoding."""
        return self.prompt_len + self.new_tokens / 2


def grid(
    batches: list[int],
    prompt_lens: list[int],
    new_tokens: int,
    prefills: list[int],
    contexts: list[int],
    *,
    sampled: bool = False,
) -> list[Workload]:
    """Every decode workload, with the prefills behind the first, then decodes that end at one of ``contexts``, then
    those that draw: what matters most comes first, for runs that do not get to their end. Prefills and contexts are of
    one row."""
    decodes = [Workload("decode", b, p, new_tokens) for p in prompt_lens for b in batches]
    decodes += [Workload("decode", 1, c - new_tokens, new_tokens) for c in contexts]
    draws = [Workload("sampled", b, prompt_lens[0], new_tokens) for b in batches if sampled]
    return [decodes[0], *(Workload("prefill", 1, p, 1) for p in prefills), *decodes[1:], *draws]


def prompts(workload: Workload, vocab_size: int, bos_id: int, text: list[int] | None) -> list[list[int]]:
    """One prompt a row, all of the same length. With ``text``, the ids of a prompt, it is repeated to that length;
    without, the ids are random, and no control token is among them."""
    rows = []
    for row in range(workload.batch):
        if text:
            body = (text[1:] * (workload.prompt_len // max(len(text) - 1, 1) + 1))[: workload.prompt_len - 1]
        else:
            draw = random.Random(SEED + row)
            body = [draw.randrange(3, vocab_size) for _ in range(workload.prompt_len - 1)]
        rows.append([bos_id, *body])
    return rows

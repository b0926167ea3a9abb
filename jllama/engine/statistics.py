"""What an engine has done so far, and what it is doing."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Statistics:
    """The state of an engine, and its counters since it was made."""

    running: int
    waiting: int
    pages_used: int
    pages: int
    prompt_tokens: int  # of all prompts that were started
    prefix_hits: int  # how many of them were found in the cache
    new_tokens: int
    decode_steps: int  # each is of all rows at once
    preemptions: int
    seconds: float  # spent in steps

    @property
    def tokens_per_s(self) -> float:
        """New tokens a second."""
        return self.new_tokens / self.seconds if self.seconds > 0 else 0.0

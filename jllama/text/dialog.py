"""Meta's Llama-2 chat format, as token ids.

A finished exchange is ``<s>[INST] question [/INST] answer </s>``, the open one ends after ``[/INST]``; a system prompt
stands inside the first question. The text of ``<s>`` and ``</s>`` is never tokenised: they are the control ids, so that
nobody can type them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # chat's --help must not wait for what tokenizers need
    from jllama.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Exchange:
    """A question and its answer; None while it is open."""

    question: str
    answer: str | None = None


def dialog_ids(tokenizer: Tokenizer, exchanges: Sequence[Exchange], system: str | None = None) -> list[int]:
    """The ids of a dialog, the last exchange open."""
    ids: list[int] = []
    for i, exchange in enumerate(exchanges):
        question = exchange.question
        if i == 0 and system:
            question = f"<<SYS>>\n{system}\n<</SYS>>\n\n{question}"
        ids += tokenizer.encode(f"[INST] {question.strip()} [/INST]" + _answer(exchange))
        if exchange.answer is not None:
            ids.append(tokenizer.eos_id)
    return ids


def _answer(exchange: Exchange) -> str:
    return "" if exchange.answer is None else f" {exchange.answer.strip()} "

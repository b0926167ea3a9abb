"""Meta's Llama-2 chat format, as token ids.

A complete exchange is ``<s>[INST] question [/INST] answer </s>``. An open exchange ends after ``[/INST]``. The system
prompt is part of the first question. ``<s>`` and ``</s>`` are added as control ids and never tokenised from text, so a
user cannot type them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `jllama chat --help` must not import the tokenizers' dependencies
    from jllama.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Exchange:
    """A question and its answer. The answer is None while the exchange is open."""

    question: str
    answer: str | None = None


def dialog_ids(tokenizer: Tokenizer, exchanges: Sequence[Exchange], system: str | None = None) -> list[int]:
    """The ids of a dialog whose last exchange is open."""
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

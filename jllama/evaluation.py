"""The interface of evaluation harnesses: log-likelihoods of texts, and generation until a stop string.

`Evaluator` needs nothing but jllama. `lm_eval_model` wraps it for the harness lm-eval (extra ``eval``)::

    python -m jllama.evaluation run --model jllama --model_args pretrained=path/to/model --tasks arc_easy
"""

import functools
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jllama.engine.engine import Engine
from jllama.engine.request import Completion, Request, SamplingSettings
from jllama.errors import InputError
from jllama.text.complete import complete_many
from jllama.text.lm import LM
from jllama.text.tokenizer import Tokenizer

MAX_GEN_TOKS = 256  # for tasks that name no limit


@dataclass
class Evaluator:
    """The three kinds of request of a harness, for many texts at once. Results are in the order of the requests.
    Contexts with a common prefix share its computation."""

    engine: Engine
    tokenizer: Tokenizer

    @property
    def prefix(self) -> int:
        """The token before a text without a context."""
        return self.engine.params.config.bos_id

    def loglikelihood(self, pairs: Iterable[tuple[str, str]]) -> list[tuple[float, bool]]:
        """For each (context, continuation): the continuation's log-probability after the context, and whether greedy
        decoding gives it."""
        return self._scores([self._encode_pair(*pair) for pair in pairs])

    def loglikelihood_rolling(self, texts: Iterable[str]) -> list[float]:
        """The log-probability of each whole text, every token once. A text longer than the context goes through in
        windows: each has as many tokens before its first new one as fit."""
        encoded = [self.tokenizer.encode(text, bos=False) for text in texts]
        windows = [rolling_windows(ids, self.prefix, self.engine.max_len) for ids in encoded]
        scores = iter(self._scores([window for group in windows for window in group]))
        return [sum(next(scores)[0] for _ in group) for group in windows]

    def generate_until(self, requests: Iterable[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """For each (context, settings): the text that follows, up to the first string of ``until``. Other settings are
        ``max_gen_toks``, ``do_sample``, ``temperature``, ``top_k``, ``top_p`` and ``seed``; without ``do_sample``, or a
        temperature, decoding is greedy."""
        asked = [(self._request(context, settings), settings.get("until") or ()) for context, settings in requests]
        completions = [Completion(list(request.prompt)) for request, _ in asked]
        stops = [(until,) if isinstance(until, str) else tuple(until) for _, until in asked]
        for _ in complete_many(self.engine, self.tokenizer, completions, [r for r, _ in asked], stop=stops):
            pass
        return [completion.text for completion in completions]

    def _scores(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        scored = self.engine.score([context for context, _ in pairs], [tokens for _, tokens in pairs])
        return [(sum(s.logprobs), all(s.greedy)) for s in scored]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The tokens of context and continuation, tokenised as one text. Spaces at the end of the context count as part
        of the continuation."""
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        if not kept:
            before, tokens = [self.prefix], self.tokenizer.encode(continuation, bos=False)
        else:
            before, whole = self.tokenizer.encode(kept), self.tokenizer.encode(kept + continuation)
            tokens = whole[len(before) :]
        if not tokens:
            raise InputError(f"continuation: expected at least one token of text, found {continuation!r}")
        room = self.engine.max_len - 1
        tokens = tokens[-room:]
        return before[-(room + 1 - len(tokens)) :], tokens

    def _request(self, context: str, settings: Mapping[str, Any]) -> Request:
        limit = min(int(settings.get("max_gen_toks", MAX_GEN_TOKS)), self.engine.max_len - 1)
        prompt = (self.tokenizer.encode(context) or [self.prefix])[-(self.engine.max_len - limit) :]
        warm = settings.get("do_sample", settings.get("temperature", 0.0) > 0)
        names = ("temperature", "top_k", "top_p", "seed")
        chosen = {name: settings[name] for name in names if name in settings} if warm else {}
        if warm:
            chosen.setdefault("temperature", 1.0)
        return Request(prompt, limit, SamplingSettings(**chosen))


def rolling_windows(ids: Sequence[int], prefix: int, max_len: int) -> list[tuple[list[int], list[int]]]:
    """(context, tokens) pairs of at most ``max_len`` tokens. Every token of ``ids`` is in ``tokens`` of one pair."""
    room = max_len - 1
    windows = [([prefix], list(ids[:room]))] if ids else []
    for begin in range(room, len(ids), room):
        end = min(begin + room, len(ids))
        windows.append((list(ids[max(0, end - max_len) : begin]), list(ids[begin:end])))
    return windows


def open_evaluator(path: str, *, slots: int = 16, max_len: int | None = None, **load: Any) -> Evaluator:
    """An `Evaluator` for the model at ``path``. ``load`` are arguments of `LM.load`."""
    lm = LM.load(path, max_len=max_len, batch=slots, **load)
    return Evaluator(Engine(lm.params, slots=slots, max_len=lm.max_len, backend=lm.backend), lm.tokenizer)


@functools.cache
def lm_eval_model() -> type:
    """Register the model ``jllama`` with lm-eval, and return its class."""
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model

    @register_model("jllama")
    class JllamaLM(LM):
        """``pretrained``: a path that `jllama.load` takes; ``batch_size`` is the number of rows that run at a time."""

        def __init__(self, pretrained: str, batch_size: int | str = 16, max_length: int | None = None, **more: Any):
            super().__init__()
            more = {name: value for name, value in more.items() if name in ("dtype", "quant", "group")}
            slots = int(batch_size) if str(batch_size).isdigit() else 16
            self._evaluator = open_evaluator(pretrained, slots=slots, max_len=max_length, **more)

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return self._evaluator.loglikelihood([r.args for r in requests])

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            return self._evaluator.loglikelihood_rolling([r.args[0] for r in requests])

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            return self._evaluator.generate_until([r.args for r in requests])

    return JllamaLM


def main() -> int:
    """lm-eval's command line, which knows ``--model jllama``."""
    try:
        lm_eval_model()
    except ModuleNotFoundError as error:
        print(f"jllama.evaluation: error: needs lm-eval (pip install jllama[eval]): {error}", file=sys.stderr)
        return 2
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""SGLang's offline engine."""

import importlib
from typing import Any

from bench.peers import Peer, missing
from bench.peers._engine import Engine, float_dtype


def open_model(job: dict[str, Any]) -> Engine:
    """Start the engine without a tokenizer and without its radix cache."""
    # Not `import sglang`: type checkers would resolve that to this file.
    engine = importlib.import_module("sglang").Engine(
        model_path=job["model"],
        skip_tokenizer_init=True,
        dtype=float_dtype(job),
        context_length=job["max_len"],
        disable_radix_cache=True,
        random_seed=42,
    )

    def complete(prompts: list[list[int]], n: int) -> list[list[int]]:
        settings = {"temperature": 0.0, "max_new_tokens": n, "ignore_eos": True}
        return [list(done["output_ids"]) for done in engine.generate(input_ids=prompts, sampling_params=settings)]

    return Engine(complete)


PEER = Peer("sglang", "model", lambda: missing("sglang", install="pip install sglang; GPU"), open_model, ("sglang",))

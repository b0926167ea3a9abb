"""vLLM's offline engine."""

import importlib
from typing import Any

from bench.peers import Peer, missing
from bench.peers._engine import Engine, float_dtype


def open_model(job: dict[str, Any]) -> Engine:
    """Start the engine without a tokenizer and without a prefix cache, with CUDA graphs."""
    # Not `import vllm`: type checkers would resolve that to this file.
    vllm = importlib.import_module("vllm")

    llm = vllm.LLM(
        model=job["model"],
        skip_tokenizer_init=True,
        dtype=float_dtype(job),
        max_model_len=job["max_len"],
        max_num_seqs=max(job["batch"], 1),
        enable_prefix_caching=False,
        gpu_memory_utilization=0.8,
        seed=42,
    )

    def complete(prompts: list[list[int]], n: int) -> list[list[int]]:
        settings = vllm.SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, detokenize=False)
        done = llm.generate([{"prompt_token_ids": p} for p in prompts], settings, use_tqdm=False)
        return [list(d.outputs[0].token_ids) for d in done]

    return Engine(complete)


PEER = Peer("vllm", "model", lambda: missing("vllm", install="pip install vllm; GPU"), open_model, ("vllm", "torch"))

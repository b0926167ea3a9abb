"""TensorRT-LLM through its LLM interface."""

import importlib
from typing import Any

from bench.peers import Peer, missing
from bench.peers._engine import Engine, float_dtype


def open_model(job: dict[str, Any]) -> Engine:
    """Start the engine without a tokenizer and without reuse of cache blocks."""
    # Not `import tensorrt_llm`: type checkers would resolve that to this file.
    trt, llmapi = (importlib.import_module(name) for name in ("tensorrt_llm", "tensorrt_llm.llmapi"))

    llm = trt.LLM(
        model=job["model"],
        skip_tokenizer_init=True,
        dtype=float_dtype(job),
        max_seq_len=job["max_len"],
        max_batch_size=max(job["batch"], 1),
        kv_cache_config=llmapi.KvCacheConfig(enable_block_reuse=False),
    )

    def complete(prompts: list[list[int]], n: int) -> list[list[int]]:
        settings = trt.SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, detokenize=False, end_id=-1)
        return [list(done.outputs[0].token_ids) for done in llm.generate(prompts, settings, use_tqdm=False)]

    return Engine(complete)


PEER = Peer(
    "tensorrt-llm",
    "model",
    lambda: missing("tensorrt_llm", install="pip install tensorrt-llm; GPU"),
    open_model,
    ("tensorrt_llm", "torch"),
)

"""vLLM's offline engine, as ``vllm.LLM`` sets it up: torch.compile, CUDA graphs, and the attention it prefers."""

import importlib
import os
from typing import Any

from bench.peers import Peer, missing
from bench.peers._engine import Engine, float_dtype, model_folder

# No network, no plug-ins, no second process: the engine runs in the process that is timed. FlashInfer is optional, and
# greedy sampling does not use it.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_PLUGINS": "",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOOPBACK_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "TRANSFORMERS_OFFLINE": "1",
    # Several GPUs add up their parts without NVLink's multicast, which many containers may not set up. vLLM has a
    # kernel of its own for that, in which each GPU reads the memory of the others.
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # of the processes of several GPUs
}
MEMORY = 0.9  # of the device's


def open_model(job: dict[str, Any], quantization: str | None = None) -> Engine:
    """Start the engine without a tokenizer and without a prefix cache."""
    llm, vllm = start(job, quantization, prefix_cache=False)

    def complete(prompts: list[list[int]], n: int) -> list[list[int]]:
        how = vllm.SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, detokenize=False)
        done = llm.generate([{"prompt_token_ids": p} for p in prompts], how, use_tqdm=False)
        return [list(d.outputs[0].token_ids) for d in done]

    return Engine(complete, chosen(llm.llm_engine.vllm_config))


def start(job: dict[str, Any], quantization: str | None, *, prefix_cache: bool) -> tuple[Any, Any]:
    """The engine, and the module ``vllm``. ``quantization`` is applied to the float weights while they are loaded."""
    dtype = float_dtype(job)
    os.environ.update({k: v for k, v in ENVIRONMENT.items() if k not in os.environ})
    vllm = importlib.import_module("vllm")  # not `import vllm`: type checkers would resolve that to this file
    folder, drawn = model_folder(job)
    llm = vllm.LLM(
        model=folder,
        load_format="dummy" if drawn else "auto",
        skip_tokenizer_init=True,
        dtype=dtype,
        quantization=quantization,
        max_model_len=min(job["max_len"], job["context"]),
        max_num_seqs=job["batch"],
        tensor_parallel_size=job.get("tp", 1),
        max_num_batched_tokens=job.get("budget"),
        enable_prefix_caching=prefix_cache,
        gpu_memory_utilization=MEMORY,
        compilation_config={"cudagraph_capture_sizes": captured(job)} if "rooms" in job else {},
        seed=42,
    )
    return llm, vllm


def captured(job: dict[str, Any]) -> list[int]:
    """The numbers of rows that get a CUDA graph: those of the workloads exactly, and powers of two for what lies
    between. The default list, which traffic of changing rows gets, is longer and takes longer to capture."""
    most = job["batch"]
    powers = {1 << i for i in range(most.bit_length())}
    return sorted({*powers, *(int(b) for b in job["rooms"]), most})


def chosen(config: Any) -> dict[str, Any]:
    """What the engine chose, for the record."""
    compilation, scheduler, cache = config.compilation_config, config.scheduler_config, config.cache_config
    return {
        "quantization": config.model_config.quantization,
        "cudagraph_mode": str(compilation.cudagraph_mode),
        "compile_mode": str(compilation.mode),
        "captured": list(compilation.cudagraph_capture_sizes),
        "max_num_batched_tokens": scheduler.max_num_batched_tokens,
        "async_scheduling": scheduler.async_scheduling,
        "prefix_caching": cache.enable_prefix_caching,
        "cache_dtype": cache.cache_dtype,
        "cache_tokens": (cache.num_gpu_blocks or 0) * cache.block_size,
    }


def available() -> str | None:
    """Why vLLM is missing, else None."""
    return missing("vllm", install="pip install vllm; GPU")


PEER = Peer("vllm", "model", available, open_model, ("vllm", "torch"), draws=True, whole_device=True, divides=True)

"""Hugging Face transformers: the code that the eager and the compiled peer share."""

import time
from collections.abc import Callable
from typing import Any

from bench.peers import NotSupported, Output
from bench.workloads import DRAWN, SEED

INSTALL = "`make peers`, or pip install torch transformers accelerate"
PACKAGES = ("torch", "transformers")


def torch_dtype(dtype: str) -> Any:
    """The torch dtype of a run. Quantised runs are not supported."""
    import torch

    known = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
    if dtype not in known:
        raise NotSupported(f"runs float weights only, not {dtype}")
    return known[dtype]


def torch_device(platform: str) -> Any:
    """The torch device of a run's platform."""
    import torch

    if platform == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise NotSupported("this torch sees no GPU")
    return torch.device("cuda")


def pick_threads(cores: int, work: Callable[[], Any]) -> None:
    """Use all cores, or one thread where that is faster. Torch's threads spin at barriers. For small models, or on a
    busy machine, that costs more than the other cores give."""
    import torch

    times = {}
    for threads in (cores, 1):
        torch.set_num_threads(threads)
        work()
        begin = time.perf_counter()
        work()
        times[threads] = time.perf_counter() - begin
    torch.set_num_threads(min(times, key=lambda n: times[n]))


def peak_bytes() -> int:
    """The peak memory of the GPU; on a CPU, of the process."""
    import torch

    from bench.peers.ours import process_peak

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else process_peak()


class HF:
    """A model that runs `model.generate`, greedy."""

    def __init__(self, job: dict[str, Any], cache: str | None) -> None:
        import torch
        from transformers import AutoModelForCausalLM, LlamaConfig

        self.torch, self.device = torch, torch_device(job["platform"])
        torch.manual_seed(SEED)
        dtype = torch_dtype(job["dtype"])
        if job["model"].startswith(DRAWN):
            with self.device:
                model = AutoModelForCausalLM.from_config(LlamaConfig(**job["config"]), dtype=dtype)
        else:
            model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype)
        self.model = model.to(self.device).eval()
        # Every run has the same length: end-of-sequence does not stop it.
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0
        self.options: dict[str, Any] = {}
        if self.device.type == "cpu":
            pick_threads(job["cores"], lambda: self.generate([[1, 5, 7, 9]], 9))
        if cache == "static":
            from transformers.generation.configuration_utils import CompileConfig

            compile_config = CompileConfig()
            compile_config._compile_all_devices = True  # on a CPU, too: by default `generate` compiles on GPUs only
            self.options = {"cache_implementation": "static", "compile_config": compile_config}

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Output:
        """Generate. The time to the first token is taken where `generate` asks whether to stop."""
        from transformers import StoppingCriteria, StoppingCriteriaList

        torch, device = self.torch, self.device
        stamps: list[float] = []

        class Clock(StoppingCriteria):
            def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
                if not stamps:
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    stamps.append(time.perf_counter())
                return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

        ids = torch.tensor(prompts, device=device)
        begin = time.perf_counter()
        with torch.inference_mode():
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                stopping_criteria=StoppingCriteriaList([Clock()]),
                **self.options,
            )
        new = out[:, ids.shape[1] :].tolist()  # waits for the device
        end = time.perf_counter()
        return Output(new, stamps[0] - begin, end - stamps[0])

    def peak_bytes(self) -> int:
        """See `peak_bytes`."""
        return peak_bytes()

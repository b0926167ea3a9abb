"""vLLM under mixed traffic: its `LLMEngine`, stepped in this process, with its prefix cache."""

import dataclasses
import importlib
from typing import Any

from bench.peers import vllm
from bench.peers._traffic import UnderTraffic
from bench.traffic import Ask


class Server:
    """An `LLMEngine` as a `bench.traffic.Server`."""

    def __init__(self, engine: Any, module: Any, temperature: float) -> None:
        self._engine, self._temperature = engine, temperature
        self._sampling = module.SamplingParams
        self._delta = importlib.import_module("vllm.sampling_params").RequestOutputKind.DELTA

    @property
    def busy(self) -> bool:
        """Whether any text has not ended."""
        return self._engine.has_unfinished_requests()

    def submit(self, text: int, ask: Ask) -> None:
        """Take a prompt. Its name is the number of its first text."""
        how = self._sampling(
            n=ask.samples,
            temperature=self._temperature,
            max_tokens=ask.new_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=self._delta,
        )
        self._engine.add_request(str(text), {"type": "token", "prompt_token_ids": ask.prompt}, how)

    def step(self) -> list[tuple[int, int]]:
        """One turn."""
        return [(int(r.request_id) + o.index, len(o.token_ids)) for r in self._engine.step() for o in r.outputs]


def open_engine(job: dict[str, Any]) -> UnderTraffic:
    """Start the engine."""
    llm, module = vllm.start(job, None, prefix_cache=True)
    server = Server(llm.llm_engine, module, job["traffic"]["temperature"])
    return UnderTraffic(server, job, vllm.chosen(llm.llm_engine.vllm_config))


PEER = dataclasses.replace(vllm.PEER, kind="traffic", open=open_engine)

"""llama.cpp through llama-cpp-python, or `llama-bench` on PATH.

Both read GGUF; `convert` writes it from the job's checkpoint.
"""

import atexit
import importlib
import json
import shutil
import subprocess
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.peers import NotSupported, Output, Peer

INSTALL = "pip install llama-cpp-python, or build github.com/ggml-org/llama.cpp and add llama-bench to PATH"


def available() -> str | None:
    """Why neither the package nor the program can run, else None."""
    found = find_spec("llama_cpp") or shutil.which("llama-bench")
    return None if found else f"neither llama_cpp nor llama-bench found ({INSTALL})"


def gguf_of(job: dict[str, Any], folder: Path) -> str:
    """The job's model as GGUF: the file itself, or written from a checkpoint in its stored dtype."""
    if job["model"].endswith(".gguf"):
        return job["model"]
    from convert.to_gguf import gguf
    from jllama.formats import open_source
    from jllama.formats.native import save

    source = open_source(job["model"])
    stored = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}.get(source.dtype)
    if stored != job["dtype"]:
        raise NotSupported(f"{job['dtype']} needs a GGUF file of that kind (--model FILE.gguf)")
    save(gguf(source), folder / "model.gguf")
    return str(folder / "model.gguf")


def open_model(job: dict[str, Any]) -> Any:
    """Prefer the package, because its tokens can be checked and the program's cannot."""
    folder = tempfile.TemporaryDirectory(prefix="bench-llama-cpp-")
    atexit.register(folder.cleanup)
    gguf = gguf_of(job, Path(folder.name))
    return Library(gguf, job) if find_spec("llama_cpp") else Program(gguf, job)


class Library:
    """llama-cpp-python, one sequence."""

    def __init__(self, gguf: str, job: dict[str, Any]) -> None:
        llama_cpp = importlib.import_module("llama_cpp")  # not `import`: type checkers would resolve that to this file

        layers = 0 if job["platform"] == "cpu" else -1
        self.llama = llama_cpp.Llama(
            gguf, n_ctx=job["max_len"], n_gpu_layers=layers, seed=42, verbose=False, flash_attn=layers != 0
        )

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Output:
        """Prefill, then repeat: take the most likely token and feed it."""
        if len(prompts) > 1:
            raise NotSupported("batch 1 only")
        self.llama.reset()
        begin = time.perf_counter()
        self.llama.eval(prompts[0])
        ids = [int(self.llama.sample(temp=0.0))]
        first = time.perf_counter() - begin
        for _ in range(new_tokens - 1):
            self.llama.eval(ids[-1:])
            ids.append(int(self.llama.sample(temp=0.0)))
        return Output([ids], first, time.perf_counter() - begin - first)

    def peak_bytes(self) -> int:
        """The peak of the process. The library does not report its GPU memory."""
        from bench.peers.ours import process_peak

        return process_peak()


class Program:
    """`llama-bench`. It feeds its own tokens and returns none, so its ids are empty and cannot be checked."""

    def __init__(self, gguf: str, job: dict[str, Any]) -> None:
        self.command = ["llama-bench", "-m", gguf, "-o", "json", "-r", "1"]
        self.command += ["-ngl", "0" if job["platform"] == "cpu" else "99", "-fa", "1"]

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Output:
        """One run of the program for both tests."""
        if len(prompts) > 1:
            raise NotSupported("batch 1 only")
        length = len(prompts[0])
        sizes = ["-p", str(length), "-n", str(new_tokens - 1), "-d", f"0,{length}"]
        done = subprocess.run([*self.command, *sizes], capture_output=True, text=True, check=True)
        rows = json.loads(done.stdout)
        prefill = next(r for r in rows if r["n_prompt"] and not r.get("n_depth"))
        decode = [r for r in rows if r["n_gen"]]
        decode_s = decode[-1]["avg_ns"] / 1e9 if decode else 0.0
        return Output([[]], prefill["avg_ns"] / 1e9, decode_s, steps=new_tokens - 1)

    def peak_bytes(self) -> int:
        """The peak memory of the largest child process."""
        import resource

        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


PEER = Peer("llama.cpp", "model", available, open_model, ("llama_cpp_python",))

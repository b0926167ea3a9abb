"""llama2.c: `run` on PATH (`runq` for int8), on all cores. Batch 1, and no prefill: each prompt token is one step."""

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from bench.peers import NotSupported, Output, Peer
from bench.peers._llama2c_text import from_text, to_text, write_tokenizer

BOS = 1


def available() -> str | None:
    """Why there is no `run` of llama2.c on PATH, else None."""
    program = shutil.which("run")
    if program is None:
        return "no `run` on PATH (build github.com/karpathy/llama2.c with `make runomp`, and add its folder to PATH)"
    said = subprocess.run([program], capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL)
    if "<checkpoint>" not in said.stderr + said.stdout:
        return f"`{Path(program).name}` on PATH is not llama2.c's (add the folder with llama2.c's build first)"
    return None


class Llama2c:
    """llama2.c on one model. The checkpoint is written once; each run is a new process."""

    def __init__(self, job: dict[str, Any], threads: int | None = None) -> None:
        if job["dtype"] not in ("f32", "int8"):
            raise NotSupported(f"runs float32 and int8, not {job['dtype']}")
        if job["platform"] != "cpu":
            raise NotSupported("runs on CPUs only")
        self.threads = threads or job["cores"]
        self.folder = tempfile.TemporaryDirectory(prefix="bench-llama2c-")
        self.checkpoint = Path(self.folder.name) / "model.bin"
        self.vocab_size: int = job["vocab_size"]
        self.max_len: int = job["context"]
        self.peak = 0
        self.program = {"f32": "run", "int8": "runq"}[job["dtype"]]
        if shutil.which(self.program) is None:
            raise NotSupported(f"no `{self.program}` on PATH")
        export(job["model"], self.checkpoint, int8=job["dtype"] == "int8")

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Output:
        """One run. The program's own clock counts milliseconds and starts after the first token."""
        if len(prompts) > 1:
            raise NotSupported("batch 1 only")
        prompt = prompts[0]
        if len(prompt) < 2 or prompt[0] != BOS or BOS in prompt[1:]:
            raise NotSupported("prompts must begin with id 1, have a second id, and no further 1")
        if len(prompt) + new_tokens > self.max_len:
            raise NotSupported(f"prompt and new tokens go past the context of {self.max_len}")
        space = prompt[1]
        write_tokenizer(Path(self.folder.name) / "tokenizer.bin", self.vocab_size, space)
        steps = len(prompt) + new_tokens - 1
        command = [
            self.program,
            "model.bin",
            "-t",
            "0",
            "-n",
            str(steps),
            "-z",
            "tokenizer.bin",
            "-i",
            to_text(prompt, space),
        ]
        done = subprocess.run(
            [*command, "-i", to_text(prompt, space)],
            cwd=self.folder.name,
            capture_output=True,
            env={**os.environ, "OMP_NUM_THREADS": str(self.threads)},
            check=True,
        )
        said = re.search(rb"achieved tok/s: ([\d.]+|inf)", done.stderr)
        if said is None or said[1] == b"inf":
            raise NotSupported("the run is shorter than its clock's millisecond")
        ids = from_text(done.stdout.decode(), space, first_is_space=True)
        if ids[: len(prompt) - 1] != prompt[1:]:
            raise RuntimeError("run changed the prompt's ids")
        made = ids[len(prompt) - 1 :]
        step_s = 1 / float(said[1])
        return Output([made], step_s * len(prompt), step_s * (len(made) - 1))

    def peak_bytes(self) -> int:
        """The peak memory of the largest child process."""
        import resource

        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def export(model: str, target: Path, *, int8: bool) -> None:
    """Write ``model`` as a checkpoint of llama2.c: version 0, or version 2 with int8 weights."""
    from convert.to_llama2c import llama2c
    from jllama.formats import open_source
    from jllama.formats.native import save

    save(llama2c(open_source(model), int8=int8), target)


PEER = Peer("llama2.c", "model", available, Llama2c)

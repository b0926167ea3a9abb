"""Hugging Face transformers with a static cache and `torch.compile`."""

import shutil

from bench.peers import Peer, missing
from bench.peers._hf import HF, INSTALL, PACKAGES


def available() -> str | None:
    """torch.compile needs a C++ compiler on a CPU; on a GPU, Triton needs a C compiler."""
    if not any(shutil.which(name) for name in ("g++", "clang++", "c++", "gcc", "cc")):
        return "torch.compile needs a C++ compiler (install g++)"
    return missing("torch", "transformers", install=INSTALL)


PEER = Peer("hf-compile", "model", available, lambda job: HF(job, cache="static"), PACKAGES, draws=True)

"""Hugging Face transformers in eager mode."""

from bench.peers import Peer, missing
from bench.peers._hf import HF, INSTALL, PACKAGES

PEER = Peer(
    "hf-eager",
    "model",
    lambda: missing("torch", "transformers", install=INSTALL),
    lambda job: HF(job, cache=None),
    PACKAGES,
    draws=True,
)

"""Hugging Face transformers as it comes."""

from bench.peers import Peer, missing
from bench.peers._hf import HF, INSTALL, PACKAGES

PEER = Peer(
    "hf-eager",
    "model",
    lambda: missing("torch", "transformers", install=INSTALL),
    lambda job: HF(job, cache=None),
    PACKAGES,
)

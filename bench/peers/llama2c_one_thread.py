"""llama2.c on one thread: the figure that most projects quote."""

from bench.peers import Peer
from bench.peers.llama2c import Llama2c, available

PEER = Peer("llama2.c-1t", "model", available, lambda job: Llama2c(job, threads=1))

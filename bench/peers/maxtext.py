"""MaxText. It decodes only from orbax checkpoints of its own, so its tokens on our weights cannot be checked here."""

from typing import Any, NoReturn

from bench.peers import NotSupported, Peer, missing

WHY = (
    "reads orbax checkpoints of its own only: tokens on these weights cannot be compared, so its speed would not count"
)


def open_model(job: dict[str, Any]) -> NoReturn:
    """Say why not."""
    raise NotSupported(WHY)


PEER = Peer(
    "maxtext",
    "model",
    lambda: missing("MaxText", install="pip install maxtext; GPU or TPU") or WHY,
    open_model,
)

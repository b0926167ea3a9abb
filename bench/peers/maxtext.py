"""MaxText. It reads only its own orbax checkpoints, so its tokens on our weights cannot be checked."""

from typing import Any, NoReturn

from bench.peers import NotSupported, Peer, missing

WHY = "reads its own orbax checkpoints only: its tokens cannot be checked, so its speed would not count"


def open_model(job: dict[str, Any]) -> NoReturn:
    """Raise `NotSupported` with the reason."""
    raise NotSupported(WHY)


PEER = Peer(
    "maxtext",
    "model",
    lambda: missing("MaxText", install="pip install maxtext; GPU or TPU") or WHY,
    open_model,
)

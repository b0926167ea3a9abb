"""What whoever starts the server decides."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """How a server answers. The bounds of single parameters stand in `jllama.serve.schema`."""

    names: tuple[str, ...] = ("jllama",)  # the model's names for clients; answers carry the first
    api_keys: tuple[str, ...] = ()  # none: everybody may ask
    hosts: tuple[str, ...] = ()  # names by which clients may address it, beside localhost and addresses; none: any
    origins: tuple[str, ...] = ()  # web pages of these origins may ask (CORS)
    queue: int = 1024  # rows that may wait for a slot; more are refused with 429
    body_bytes: int = 4 << 20  # of a request
    bodies_bytes: int = 256 << 20  # of all requests that are read or answered at a time
    body_seconds: float = 30.0  # in which a request's body must have come
    access_log: bool = True

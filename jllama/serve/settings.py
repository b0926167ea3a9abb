"""The operator's settings of a server."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """How a server answers. The bounds of single parameters stand in `jllama.serve.schema`."""

    names: tuple[str, ...] = ("jllama",)  # the model's names for clients; answers carry the first
    api_keys: tuple[str, ...] = ()  # empty: no key is needed
    hosts: tuple[str, ...] = ()  # names by which clients may address it, beside localhost and addresses; empty: any
    origins: tuple[str, ...] = ()  # origins whose web pages may send requests (CORS)
    queue: int = 1024  # rows that may wait for a slot; more are refused with 429
    body_bytes: int = 4 << 20  # of a request
    bodies_bytes: int = 256 << 20  # of all requests that are read or answered at a time
    body_seconds: float = 30.0  # limit for receiving a request's body
    access_log: bool = True
    stream_interval: float = 0.05  # seconds that a stream holds new text after an event, at most

"""Llama-2 inference inside JAX at the speed of the memory bus.

The library in five names::

    params = jllama.load("path/to/checkpoint")            # weights, as a pytree
    logits, cache = jllama.forward(params, tokens)         # pure: jit, grad and vmap it
    out = jllama.generate(params, tokens, max_new_tokens=64)
    tokenizer = jllama.load_tokenizer("path/tokenizer.model")
    jllama.backends(params)                                # what runs where, and why

Names are imported when they are first used, so that ``--help`` need not wait for jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "DEMO": "jllama.demo_model",
    "DecodeState": "jllama.decode",
    "Engine": "jllama.engine.engine",
    "Generated": "jllama.decode",
    "InputError": "jllama.errors",
    "KVCache": "jllama.cache",
    "Layer": "jllama.params",
    "LlamaConfig": "jllama.config",
    "Params": "jllama.params",
    "Request": "jllama.engine.request",
    "Sampling": "jllama.sampling",
    "SamplingSettings": "jllama.engine.request",
    "Session": "jllama.stream",
    "backends": "jllama.backends",
    "decode_step": "jllama.decode",
    "forward": "jllama.model",
    "generate": "jllama.decode",
    "init": "jllama.params",
    "init_cache": "jllama.cache",
    "load": "jllama.formats.checkpoint",
    "load_tokenizer": "jllama.text.tokenizer",
    "make_sampling": "jllama.sampling",
    "preset": "jllama.config",
    "rollout": "jllama.engine.rollout",
    "save": "jllama.formats.checkpoint",
    "stack": "jllama.params",
    "unstack": "jllama.params",
}

__all__ = [*_HOME]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:  # what type checkers and editors see
    from jllama.backends import backends as backends
    from jllama.cache import KVCache as KVCache
    from jllama.cache import init_cache as init_cache
    from jllama.config import LlamaConfig as LlamaConfig
    from jllama.config import preset as preset
    from jllama.decode import (
        DecodeState as DecodeState,
    )
    from jllama.decode import (
        Generated as Generated,
    )
    from jllama.decode import (
        decode_step as decode_step,
    )
    from jllama.decode import (
        generate as generate,
    )
    from jllama.demo_model import DEMO as DEMO
    from jllama.engine.engine import Engine as Engine
    from jllama.engine.request import Request as Request
    from jllama.engine.request import SamplingSettings as SamplingSettings
    from jllama.engine.rollout import rollout as rollout
    from jllama.errors import InputError as InputError
    from jllama.formats.checkpoint import load as load
    from jllama.formats.checkpoint import save as save
    from jllama.model import forward as forward
    from jllama.params import Layer as Layer
    from jllama.params import Params as Params
    from jllama.params import init as init
    from jllama.params import stack as stack
    from jllama.params import unstack as unstack
    from jllama.sampling import Sampling as Sampling
    from jllama.sampling import make_sampling as make_sampling
    from jllama.stream import Session as Session
    from jllama.text.tokenizer import load_tokenizer as load_tokenizer


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'jllama' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value  # also where a submodule of that name was imported in the meantime
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]

"""Llama-2 inference inside JAX at the speed of the memory bus.

A model and its tokenizer::

    lm = jllama.LM.load("path/to/checkpoint")
    print(lm.generate("Once upon a time,", max_new_tokens=64, temperature=0.8, seed=7).text)

And what it is made of::

    params = jllama.load("path/to/checkpoint")            # weights, as a pytree
    logits, cache = jllama.forward(params, tokens)         # pure: jit, grad and vmap it
    out = jllama.generate(params, tokens, max_new_tokens=64)
    tokenizer = jllama.load_tokenizer("path/tokenizer.model")
    jllama.backends(params)                                # what runs where, and why

The stub beside this file, ``__init__.pyi``, lists the public names. Each is imported when it is first used, so that
``--help`` need not wait for jax.
"""

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

# The module that defines each public name.
_HOME = {
    name: module
    for module, name in re.findall(r"^from (\S+) import (\w+) as", Path(__file__).with_suffix(".pyi").read_text(), re.M)
}

__all__ = [*_HOME]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'jllama' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """This package. An import sets a module as an attribute of its package: where that is a public name's place, as
    with ``jllama.generate`` and ``jllama.backends``, which are functions, the name keeps it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _HOME or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

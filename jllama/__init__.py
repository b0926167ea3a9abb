"""Llama-2 inference inside JAX at the speed of the memory bus.

A model and its tokenizer::

    lm = jllama.LM.load("path/to/checkpoint")
    print(lm.generate("Once upon a time,", max_new_tokens=64, temperature=0.8, seed=7).text)

The parts that it consists of::

    params = jllama.load("path/to/checkpoint")            # weights, as a pytree
    logits, cache = jllama.forward(params, tokens)         # pure: jit, grad and vmap it
    out = jllama.generate(params, tokens, max_new_tokens=64)
    tokenizer = jllama.load_tokenizer("path/tokenizer.model")
    jllama.backends(params)                                # the implementation of every op, and why

The stub ``__init__.pyi`` lists the public names. Each is imported when it is first used, so that ``--help`` does not
wait for the import of jax.
"""

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

# The module that defines each public name.
_MODULE_OF = {
    name: module
    for module, name in re.findall(r"^from (\S+) import (\w+) as", Path(__file__).with_suffix(".pyi").read_text(), re.M)
}

__all__ = [*_MODULE_OF]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'jllama' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULE_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """The type of this package. The import of a submodule normally sets it as an attribute of its package. For
    ``jllama.generate`` and ``jllama.backends`` this would replace the public function of the same name, so it is
    skipped."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _MODULE_OF or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

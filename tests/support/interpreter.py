"""Pallas's GPU interpreter with less overhead.

It calls Python at every load, store, copy and wait of a kernel. JAX first puts the arguments of each call onto a
device, most of them scalars, and that takes several times as long as the call. Here the interpreter gets the NumPy
arrays that XLA hands over. It copies what it keeps.
"""

from typing import Any

import jax
import numpy as np
from jax._src import callback as callbacks
from jax._src.pallas.mosaic_gpu.interpret import shared_memory

io_callback_impl = callbacks.io_callback_impl


def call_with_numpy(*args: Any, callback: Any, **how: Any) -> Any:
    """`io_callback_impl`, but for the interpreter's own callbacks."""
    called = callback.callback_func
    if not getattr(called, "func", called).__module__.startswith("jax._src.pallas."):
        return io_callback_impl(*args, callback=callback, **how)
    return jax.tree.map(np.asarray, callback(*(a[()] for a in args)))  # [()]: scalars, not arrays without axes


def install() -> None:
    """Change the interpreter of this process."""
    callbacks.io_callback_impl = call_with_numpy
    shared_memory._to_int = lambda x: x if isinstance(x, jax.core.Tracer) else int(x)

"""Gives Mosaic's modules names that do not depend on what the process has lowered before.

Mosaic names a module, for the files that it may dump, after the kernel and a number that counts the modules of the
process. The name is part of the module's bytes, and these are part of what JAX's cache of compiled programs is asked
for. So a program would be found there only by a process that has lowered as many kernels before it: hardly ever by a
server that compiles what its requests need, or by another script. Nothing in JAX's interface changes that (0.11, 0.12).
"""

import os
from typing import Any

from jax.experimental.mosaic.gpu import core
from jaxlib.mlir import ir

ATTRIBUTE = "mosaic_gpu.dump_basename"


def name_by_kernel() -> None:
    """From now on, name modules by their kernels alone, unless files shall be dumped: one would replace another."""
    options = getattr(core.dialect, "get_or_set_dump_options", None)
    if options is None or any(name.startswith("MOSAIC_GPU_DUMP") for name in os.environ):
        return

    def named(module: Any) -> Any:
        attributes = module.operation.attributes
        if ATTRIBUTE not in attributes:
            attributes[ATTRIBUTE] = ir.StringAttr.get(attributes["sym_name"].value, module.context)
        return options(module)

    core.dialect.get_or_set_dump_options = named

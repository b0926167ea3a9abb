"""How many pages fit into the memory of the devices."""

from collections.abc import Callable

import jax

from jllama.device import default_device, free_on
from jllama.errors import InputError
from jllama.mesh.layout import DATA, MODEL, axis_size, shard_config
from jllama.mesh.run import least
from jllama.paged import page_bytes
from jllama.params import Params

LESS = 0.9  # of the pages, where memory has no room for all
UNKNOWN_MEMORY = 4 << 30  # bytes for pages where the device does not say what is free


def pages_in_memory(params: Params, memory: float) -> int:
    """How many pages fit into this part of the device's free memory, or of that of a mesh's devices together."""
    if not 0 < memory <= 1:
        raise InputError(f"memory: expected a part of the device's, above 0 and at most 1, found {memory}")
    config, mesh = params.config, params.mesh
    if mesh is not None:
        config = shard_config(config, axis_size(mesh, MODEL))
    free, one = free_on(mesh), page_bytes(config, params.dtype)
    if free is None:
        return UNKNOWN_MEMORY // one * axis_size(mesh, DATA)
    if free * memory < one:
        raise InputError(f"memory: expected room for a page of {one} bytes, found {free} bytes free")
    pages = int(free * memory) // one
    return (pages if mesh is None else least(pages)) * axis_size(mesh, DATA)


def page_count(params: Params, pages: int | None, memory: float, most: int | None, enough: int) -> int:
    """How many pages a cache gets: ``pages`` if they fit. By default it gets what fits into this part of free memory,
    but at most ``most``. Where that is None, too, a CPU's cache gets at most ``enough`` for all rows, because other
    programs need the memory. Pages that cannot fit are refused before any is made, with the number that would fit."""
    if pages is None:
        if most is None and default_device().platform == "cpu":
            most = enough
        fits = pages_in_memory(params, memory)
        return fits if most is None else min(fits, most)
    if free_on(params.mesh) is not None and pages > (fits := pages_in_memory(params, 1.0)):
        raise InputError(f"pages: expected at most {fits} (what fits into the device's free memory), found {pages}")
    return pages


def in_memory[T](make: Callable[[int], T], pages: int, *, fewer: bool) -> tuple[int, T]:
    """Wait until ``make(pages)`` is in memory; with ``fewer``, take fewer pages where so many find no room. Returns how
    many they are, too.

    Free memory need not be in one piece: where JAX does not reserve all of it at the start
    (``XLA_PYTHON_CLIENT_PREALLOCATE=false``), it takes pieces, and other arrays lie between. An allocation that fails
    is not reported before its result is used, which here would be the first request."""
    while True:
        try:
            return pages, jax.block_until_ready(make(pages))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
        # Try again only here, after the except block. Inside it, the error still holds the arrays of the failed
        # attempt, and their memory would not be free yet.
        if not fewer or pages < 2:
            raise InputError(f"pages: expected a number that fits into free memory in two pieces, found {pages}")
        pages = int(pages * LESS)

"""How many pages fit into the memory of the devices."""

from jllama.device import free_on
from jllama.errors import InputError
from jllama.mesh.layout import DATA, MODEL, axis_size, shard_config
from jllama.mesh.run import least
from jllama.paged import page_bytes
from jllama.params import Params

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

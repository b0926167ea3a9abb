"""How small arrays lie in the registers of a warpgroup: [8 token rows, columns], or one row."""

from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu

UNIT = plgpu.Layout.TILED(  # [4, 256], a row of 1024 columns: a warp has 256 of them, a thread 8
    plgpu.Tiling(((4, 256), (8,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
)

REPLICATED = plgpu.Replicated(4)  # all 4 warps hold the same


def tokens(width: int) -> Any:
    """[8, n * width], 2 rows a warp, so that a sum along a row stays in a warp; 16 threads read a row's ``width``."""
    return plgpu.Layout.TILED(
        plgpu.Tiling(((8, width), (2, width), (width // 16,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
    )


def pairs() -> Any:
    """[8 * m, 32 * n]: narrow enough for half a head."""
    return plgpu.Layout.TILED(
        plgpu.Tiling(((8, 32), (2, 32), (2,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
    )


def outputs() -> Any:
    """[8, 8 * n], the same in every warp: for strips of any multiple of 8 rows."""
    return plgpu.Layout.TILED(plgpu.Tiling(((8, 8), (2,))), warp_dims=(REPLICATED,), lane_dims=(-3, -2), vector_dim=-1)


def line(width: int) -> Any:
    """[width], the same in every warp: one head of one token."""
    return plgpu.Layout.TILED(
        plgpu.Tiling(((width,), (width // 32,))), warp_dims=(REPLICATED,), lane_dims=(-2,), vector_dim=-1
    )

"""How small arrays lie in the registers of a warpgroup: [8 token rows, columns], or one row."""

from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu

# [4, 32, 8], a row of 1024 columns: warps, lanes, 8 neighbouring columns in a thread.
EIGHT_PER_THREAD = plgpu.Layout.TILED(plgpu.Tiling(((4, 32, 8),)), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
REPLICATED = plgpu.Replicated(4)  # all 4 warps hold the same


def pair_per_thread() -> Any:
    """[8 * m, 32 * n]: two neighbouring columns in a thread. Narrow enough for half a head."""
    return plgpu.Layout.TILED(
        plgpu.Tiling(((8, 32), (2, 32), (2,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
    )


def pair_per_lane() -> Any:
    """[8, 8 * n]: two neighbouring columns in a lane, the same in every warp. For N tiles of any multiple of 8 rows."""
    return plgpu.Layout.TILED(plgpu.Tiling(((8, 8), (2,))), warp_dims=(REPLICATED,), lane_dims=(-3, -2), vector_dim=-1)


def one_per_thread(width: int) -> Any:
    """[width], 64 or 128: one number in a thread. With 64, pairs of lanes hold the same."""
    lanes = (-2,) if width == 128 else (-2, plgpu.Replicated(2))
    tiling = plgpu.Tiling(((width,), (width // 4,), (1,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=lanes, vector_dim=-1)


def one_per_lane(width: int) -> Any:
    """[width], 8, 16 or 32: one number in a lane, the same in every warp, and repeated within a warp."""
    lanes = (-2,) if width == 32 else (-2, plgpu.Replicated(32 // width))
    return plgpu.Layout.TILED(plgpu.Tiling(((width,), (1,))), warp_dims=(REPLICATED,), lane_dims=lanes, vector_dim=-1)

"""How small arrays lie in the registers of a warpgroup: [8 token rows, columns], or one row."""

from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu

EIGHT_PER_THREAD = plgpu.Layout.TILED(  # [4, 32, 8], a row of 1024 columns: warps, threads, 8 neighbours in a thread
    plgpu.Tiling(((4, 32, 8),)), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
)
REPLICATED = plgpu.Replicated(4)  # all 4 warps hold the same


def pair_per_thread() -> Any:
    """[8 * m, 32 * n]: narrow enough for half a head."""
    return plgpu.Layout.TILED(
        plgpu.Tiling(((8, 32), (2, 32), (2,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
    )


def pair_per_lane() -> Any:
    """[8, 8 * n], the same in every warp: for strips of any multiple of 8 rows."""
    return plgpu.Layout.TILED(plgpu.Tiling(((8, 8), (2,))), warp_dims=(REPLICATED,), lane_dims=(-3, -2), vector_dim=-1)


def one_per_thread(width: int) -> Any:
    """[width], one head of one token, 64 or 128 numbers: one a thread, the same in several where there are fewer."""
    lanes = (-2,) if width == 128 else (-2, plgpu.Replicated(2))
    tiling = plgpu.Tiling(((width,), (width // 4,), (1,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=lanes, vector_dim=-1)


def one_per_lane(width: int) -> Any:
    """[width], 8, 16 or 32 numbers: one a thread, the same in every warp and again until all threads have one."""
    lanes = (-2,) if width == 32 else (-2, plgpu.Replicated(32 // width))
    return plgpu.Layout.TILED(plgpu.Tiling(((width,), (1,))), warp_dims=(REPLICATED,), lane_dims=lanes, vector_dim=-1)

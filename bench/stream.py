"""A kernel that only reads, to measure the read rate of a Hopper GPU's memory.

XLA's copy also writes, and its product with one row also computes. Both are slower than a kernel in which every
multiprocessor keeps a ring of TMA copies full. The kernel adds every word to a sum, so that a test can check that it
read all of them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.arch import planned
from pallas_kernels.hopper.common.ring import acquire, drain, fold_own_stages

STAGE = (32, 128)  # words of 4 bytes: 16 KB, contiguous in memory
DEPTH = 12  # stages in flight: 192 KB of the 227 that a block may have


@functools.partial(jax.jit, static_argnames=("blocks", "interpret", "passes"))
def stream(words: jax.Array, *, passes: int = 1, blocks: int | None = None, interpret: Any = False) -> jax.Array:
    """Read int32 words [stages, *STAGE] ``passes`` times -> [blocks, *STAGE]: the sums of the stages that each block
    read, which are block, block + blocks, ..."""
    blocks = blocks or planned().sms
    return plgpu.kernel(
        functools.partial(_body, passes=passes, blocks=blocks),
        out_type=jax.ShapeDtypeStruct((blocks, *STAGE), words.dtype),
        scratch_types={
            "ring": plgpu.SMEM((DEPTH, *STAGE), words.dtype),
            "full": plgpu.Barrier(num_arrivals=1, num_barriers=DEPTH),
            "free": plgpu.Barrier(num_arrivals=1, num_barriers=DEPTH),
        },
        grid=(blocks,),
        grid_names=("block",),
        num_threads=2,
        thread_name="warpgroup",
        interpret=interpret,
        kernel_name="stream",
    )(words)


def _body(words_ref: Any, sums_ref: Any, *, passes: int, blocks: int, ring: Any, full: Any, free: Any) -> None:
    block, me = lax.axis_index("block"), lax.axis_index("warpgroup")
    mine = (words_ref.shape[0] - block + blocks - 1) // blocks
    stages = mine * passes

    @pl.when(me == 1)
    def _() -> None:
        def fetch(i: Any, _: Any) -> None:
            slot = acquire(i, DEPTH, free)
            place = lax.rem(i, mine) * blocks + block
            plgpu.copy_gmem_to_smem(words_ref.at[place], ring.at[slot], full.at[slot])

        lax.fori_loop(0, stages, fetch, None)
        drain(stages, DEPTH, free)

    @pl.when(me == 0)
    def _() -> None:
        layout = plgpu.Layout.WG_STRIDED(STAGE, vec_size=4)

        def add(_: Any, slot: Any, sums: Any) -> Any:
            sums = sums + plgpu.load(ring.at[slot], layout=layout)
            plgpu.commit_smem()  # a proxy fence: this read must end before TMA overwrites the stage
            return sums

        zero = plgpu.layout_cast(jnp.zeros(STAGE, words_ref.dtype), layout)
        sums_ref[block] = fold_own_stages(0, 1, 0, stages, DEPTH, full, free, add, zero)

"""Reductions over all warps that hold a row: those of one block, or of the blocks of a cluster.

In a cluster, every warp writes its number into the shared memory of all blocks. So each block reads only its own
memory, adds in the same order, and finds the same bits. The interpreter has no shared memory of other blocks: there the
numbers go through an array in global memory, with the same barriers.
"""

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu.fragmented_array import FragmentedArray
from jax.experimental.mosaic.gpu.utils import inline_ptx, memref_ptr, shfl_bfly, thread_idx, warpgroup_barrier, when
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, vector

from ..common.thread_ops import SCALAR, add, as_i32, as_indices, div, mul, rem, thread_in_warpgroup
from .split import WARP_SIZE, WARPS, RowSplit


@dataclass(frozen=True)
class Warps:
    """Reductions over all warps of a row.

    Two buffers alternate with ``time``, the count of reductions so far. One barrier a reduction is enough: a warpgroup
    that reaches the next use of a buffer has passed the barrier between, so all others have read this one. In a cluster
    there is a barrier a buffer, too, because an arrival of the next reduction may overtake another block's of this
    one."""

    split: RowSplit
    me: Any  # index of this warpgroup in its block
    block: Any  # index of this block in its row
    sums: Any  # [2, warpgroups of the row, WARPS]
    barrier: Any  # a cluster: [2]
    interpret: bool

    def all_of(self, time: Any, numbers: jax.Array) -> list[jax.Array]:
        """The ``numbers`` [4] of every warpgroup, one a warp, as a list over all warps."""
        turn = self._share(time, numbers)
        return [self.sums[turn, i // WARPS, i % WARPS] for i in range(self.split.blocks * self.split.warps)]

    def total(self, time: Any, numbers: jax.Array) -> jax.Array:
        """The sum over [4, 32, n] of all warpgroups."""
        return self._reduce(time, numbers.sum(axis=2).sum(axis=1), operator.add, arith.addf)

    def largest(self, time: Any, numbers: jax.Array) -> jax.Array:
        """The maximum over [4, 32, n] of all warpgroups."""
        return self._reduce(time, numbers.max(axis=2).max(axis=1), jnp.maximum, arith.maximumf)

    def _reduce(
        self, time: Any, numbers: jax.Array, join: Callable[..., Any], join_registers: Callable[..., Any]
    ) -> jax.Array:
        if self.split.blocks == 1:
            return functools.reduce(join, self.all_of(time, numbers))
        turn = self._share(time, numbers)
        if self.interpret:
            return functools.reduce(join, list(self.sums[turn].ravel()))
        return _reduce_by_lanes(self.sums.at[turn], self.split.blocks * self.split.warps, join_registers)

    def _share(self, time: Any, numbers: jax.Array) -> Any:
        """Give every block of the row the ``numbers`` [4] of this warpgroup. Returns the buffer that has all."""
        turn, one_block = time % 2, self.split.blocks == 1
        group = self.block * self.split.warpgroups + self.me
        if one_block or self.interpret:
            self.sums.at[turn, group][...] = numbers
        else:
            _write_to_cluster(self.split, self.sums.at[turn], numbers, group)
        barrier = self.barrier if one_block else self.barrier.at[turn]
        plgpu.barrier_arrive(barrier)
        plgpu.barrier_wait(barrier)
        return turn


def _write_to_cluster(split: RowSplit, sums: Any, numbers: jax.Array, group: jax.Array) -> None:
    """Write ``numbers`` [4], one a warp, as row ``group`` of ``sums`` [warpgroups of the row, WARPS] of every block of
    the cluster. Lane i of a warp writes to block i. Afterwards all warps of the warpgroup have written."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), split.layout.reduce(2).reduce(1), SCALAR))
    def write(_: Any, sums: Any, numbers: Any, group: Any) -> None:
        lane = rem(thread_idx(), WARP_SIZE)
        byte = mul(add(mul(group.registers.item(), WARPS), div(thread_in_warpgroup(), WARP_SIZE)), 4)
        address = add(llvm.ptrtoint(ir.IntegerType.get_signless(32), memref_ptr(sums)), byte)
        with when(arith.cmpi(arith.CmpIPredicate.ult, lane, as_i32(split.blocks))):
            # The barrier's arrival orders writes within a block only; the fence does so within the cluster.
            inline_ptx(
                """
                {
                    .reg .b32 there;
                    mapa.shared::cluster.u32 there, $0, $1;
                    st.shared::cluster.f32 [there], $2;
                    fence.acq_rel.cluster;
                }""",
                address,
                lane,
                vector.extract(numbers.registers.item(), [], [0]),
                has_side_effects=True,
            )
        warpgroup_barrier()  # a few threads arrive at the cluster's barrier for all

    write(sums, numbers, group)  # type: ignore[call-arg]


def _reduce_by_lanes(sums: Any, count: int, join: Callable[..., Any]) -> jax.Array:
    """``sums`` [count / WARPS, WARPS] in shared memory, joined by every warp: first in each lane, then across lanes
    in pairs."""
    scalar = plgpu.ShapeDtypeStruct((), jnp.float32, layout=SCALAR)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=scalar)
    def reduce(_: Any, sums: Any) -> Any:
        lane = rem(thread_idx(), WARP_SIZE)
        places = [add(lane, i) for i in range(0, count, WARP_SIZE)]
        own = [memref.load(sums, as_indices(div(i, WARPS), rem(i, WARPS))) for i in places]
        joined = functools.reduce(join, own)
        for distance in (16, 8, 4, 2, 1):
            joined = join(joined, shfl_bfly(joined, distance))
        return FragmentedArray.splat(joined, ())

    assert count % WARP_SIZE == 0
    return reduce(sums)  # type: ignore[call-arg]

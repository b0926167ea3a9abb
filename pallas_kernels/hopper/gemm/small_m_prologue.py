"""Prologue of a small-M GEMM with limbs: a block splits its inputs into limbs once, while the ring of weights fills."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.fragmented_array import FragmentedArray
from jax.experimental.mosaic.gpu.utils import c
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith, memref

from ..common.layouts import EIGHT_PER_THREAD
from ..common.limbs import (
    lowest_limb_value,
    max_abs_bits,
    scale_and_inverse,
    split_into_limbs,
    swizzled_store,
    to_fixed_point,
    to_floats,
    warp_max,
    write_limbs,
)
from ..common.ring import consumer_barrier
from ..common.thread_ops import (
    SCALAR,
    WARPGROUP_SIZE,
    add,
    aligned_load,
    as_indices,
    div,
    min_,
    mul,
    rem,
    sub,
    thread_in_warpgroup,
)
from ..common.tiles import transforms_of
from .small_m_block import Block, LimbScratch, Ref
from .small_m_plan import LIMBS

WARPS = WARPGROUP_SIZE // 32
PER_THREAD = 8  # neighbouring inputs that a thread reads at a time
UNIT = (WARPS, 32, PER_THREAD)  # 1024 inputs of a row: what a warpgroup reads at a time


def split_inputs(block: Block, scratch: LimbScratch, first: Any, last: Any) -> None:
    """Write the limbs of x [rows, inputs], from input ``first`` to ``last``, to ``scratch.x``, and what they are worth
    against these weights to ``scratch.factors``.

    The consumers share the inputs of a row. First they find the row's largest input, which gives its scale."""
    p = block.plan
    if p.interpret:
        _split_interpreted(block, scratch, first, last)
        plgpu.commit_smem()
        consumer_barrier(scratch.consumers_meet)
        return
    # A thread whose inputs would lie past the end takes the last 8 once more.
    count = math.ceil(p.split_steps * p.step / PER_THREAD / WARPGROUP_SIZE / p.consumers)
    units = [block.me + i * p.consumers for i in range(count)]
    loaded = [[_load(block.x, row, unit, first, last) for unit in units] for row in range(p.rows)]
    for row, values in enumerate(loaded):
        _store_max_abs(block, scratch, values, row)
    consumer_barrier(scratch.consumers_meet)
    for row, values in enumerate(loaded):
        _store_limbs(block, scratch, values, units, row, first, last)
    plgpu.commit_smem()
    consumer_barrier(scratch.consumers_meet)


def _own_inputs(unit: Any, first: Any, last: Any) -> Any:
    """The first of this thread's inputs of a unit."""
    number = add(mul(unit, WARPGROUP_SIZE), thread_in_warpgroup())
    return min_(add(first, mul(number, PER_THREAD)), sub(last, PER_THREAD))


def _load(x_ref: Ref, row: Any, unit: Any, first: Any, last: Any) -> jax.Array:
    """The inputs of one unit of a row, 8 to a thread."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), *[SCALAR] * 4),
        return_type=plgpu.ShapeDtypeStruct(UNIT, x_ref.dtype, layout=EIGHT_PER_THREAD),
    )
    def load(_: Any, x_ref: Any, row: Any, unit: Any, first: Any, last: Any) -> Any:
        row, unit, first, last = (a.registers.item() for a in (row, unit, first, last))
        layout = EIGHT_PER_THREAD.to_mgpu()
        registers = np.empty(layout.registers_shape(UNIT), dtype=object)
        registers[...] = aligned_load(x_ref, as_indices(row, _own_inputs(unit, first, last)), PER_THREAD)
        return FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return load(x_ref, row, unit, first, last)  # type: ignore[call-arg]


def _store_max_abs(block: Block, scratch: LimbScratch, values: list[jax.Array], row: Any) -> None:
    """Write the largest input of a row that each warp of this consumer has."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), (EIGHT_PER_THREAD,) * len(values), SCALAR, SCALAR))
    def store(_: Any, max_abs: Any, values: Any, row: Any, me: Any) -> None:
        own = [max_abs_bits(to_floats(a.registers.item())) for a in values]
        warp = add(mul(me.registers.item(), WARPS), div(thread_in_warpgroup(), 32))
        # All threads of a warp write the same value.
        memref.store(warp_max(functools.reduce(arith.maxui, own)), max_abs, as_indices(row.registers.item(), warp))

    store(scratch.max_abs, tuple(values), row, block.me)  # type: ignore[call-arg]


def _store_limbs(block: Block, scratch: LimbScratch, values: list[jax.Array], units: list[Any], row: Any, first: Any,
                 last: Any) -> None:  # fmt: skip
    """Write this thread's inputs of a row as limbs."""
    p = block.plan
    transforms = transforms_of(p.step, jnp.int8, p.fmt.group)
    refs = plgpu.RefType(transforms), plgpu.RefType(), plgpu.RefType()

    @plgpu.inline_mgpu(arg_types=(refs, (EIGHT_PER_THREAD,) * len(values), (SCALAR,) * len(units), *[SCALAR] * 3))
    def store(_: Any, refs: Any, values: Any, units: Any, row: Any, first: Any, last: Any) -> None:
        x, max_abs, factors = refs
        row, first, last = (a.registers.item() for a in (row, first, last))
        of_warps = [memref.load(max_abs, as_indices(row, warp)) for warp in range(WARPS * p.consumers)]
        scale, inverse = scale_and_inverse(functools.reduce(arith.maxui, of_warps))

        def column(limb: int) -> Any:
            return add(row, p.limb_column(limb, 0))

        for unit, eight in zip(units, values, strict=True):
            own = sub(_own_inputs(unit.registers.item(), first, last), first)
            step = div(own, p.step)

            def write(limb: int, within: Any, value: Any, step: Any = step) -> None:
                swizzled_store(value, x, transforms, 16, step, column(limb), within)

            fixed = to_fixed_point(to_floats(eight.registers.item()), inverse, LIMBS)
            write_limbs(fixed, LIMBS, p.fmt.bits, rem(own, p.step), write)
        lowest = lowest_limb_value(LIMBS, p.fmt.bits)
        for limb in range(LIMBS):  # all threads write the same values
            worth = arith.mulf(scale, c(lowest * 256 ** (LIMBS - 1 - limb), scale.type))
            memref.store(worth, factors, as_indices(column(limb)))

    refs = scratch.x, scratch.max_abs, scratch.factors
    store(refs, tuple(values), tuple(units), row, first, last)  # type: ignore[call-arg]


def _split_interpreted(block: Block, scratch: LimbScratch, first: Any, last: Any) -> None:
    """The same in `jax.numpy`; consumers take rows in turn."""
    p = block.plan

    def steps_of(row: int) -> list[jax.Array]:
        begins = [jnp.minimum(first + i * p.step, last - p.step) for i in range(p.split_steps)]
        return [block.x[row, pl.ds(begin, p.step)] for begin in begins]

    for row in range(p.rows):

        @pl.when(block.me == row % p.consumers)
        def _(row: int = row) -> None:
            limbs, scale = split_into_limbs(jnp.stack(steps_of(row)).reshape(1, -1), LIMBS)
            lowest = lowest_limb_value(LIMBS, p.fmt.bits)
            for number, limb in enumerate(limbs):
                column = p.limb_column(number, row)
                scratch.factors[column] = scale[0] * (lowest * 256 ** (LIMBS - 1 - number))
                for i, step in enumerate(limb.reshape(p.split_steps, p.step)):
                    scratch.x.at[i, column][...] = step

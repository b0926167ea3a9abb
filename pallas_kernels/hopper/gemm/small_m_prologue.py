"""How a block of a product for few rows makes digits of its range of x, once, while its ring of weights fills."""

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
from ..common.tiles import Format, transforms_of
from .small_m_plan import DIGITS, Plan, SkinnyTiles

WARPS = WARPGROUP_SIZE // 32
NEIGHBOURS = 8  # inputs that a thread takes at a time


def fill(x_ref: Any, first: Any, last: Any, fmt: Format, p: Plan, tiles: SkinnyTiles, me: Any, smem: Any) -> None:
    """Put the digits of x [rows, inputs], from input ``first`` to ``last``, into shared memory, and into ``factors``
    what they are worth against these weights. Consumers share the inputs of a row; first they look for its largest."""
    if p.interpret:
        _fill_interpreted(x_ref, first, last, fmt, p, tiles, me, smem)
        plgpu.commit_smem()
        consumer_barrier(smem["together"])
        return
    # Where a thread's inputs of a row begin, 8 at a time; the last of all once more where there are none left.
    count = math.ceil(p.cut_steps * tiles.step / NEIGHBOURS / WARPGROUP_SIZE / tiles.consumers)
    units = [me + i * tiles.consumers for i in range(count)]
    fetched = [[_fetch(x_ref, row, unit, first, last) for unit in units] for row in range(p.rows)]
    for row, values in enumerate(fetched):
        _measure(values, row, me, smem["sizes"])
    consumer_barrier(smem["together"])
    for row, values in enumerate(fetched):
        _put(values, units, row, first, last, fmt, p, tiles, smem)
    plgpu.commit_smem()
    consumer_barrier(smem["together"])


def _begin(unit: Any, first: Any, last: Any) -> Any:
    """Where this thread's inputs of a unit of 1024 begin."""
    number = add(mul(unit, WARPGROUP_SIZE), thread_in_warpgroup())
    return min_(add(first, mul(number, NEIGHBOURS)), sub(last, NEIGHBOURS))


def _fetch(x_ref: Any, row: Any, unit: Any, first: Any, last: Any) -> jax.Array:
    """A unit's inputs of a row, 8 to a thread."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), *[SCALAR] * 4),
        return_type=plgpu.ShapeDtypeStruct((WARPS, 32, NEIGHBOURS), x_ref.dtype, layout=EIGHT_PER_THREAD),
    )
    def load(_: Any, x_ref: Any, row: Any, unit: Any, first: Any, last: Any) -> Any:
        row, unit, first, last = (a.registers.item() for a in (row, unit, first, last))
        layout = EIGHT_PER_THREAD.to_mgpu()
        registers = np.empty(layout.registers_shape((WARPS, 32, NEIGHBOURS)), dtype=object)
        registers[...] = aligned_load(x_ref, as_indices(row, _begin(unit, first, last)), NEIGHBOURS)
        return FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return load(x_ref, row, unit, first, last)  # type: ignore[call-arg]


def _measure(values: list[jax.Array], row: Any, me: Any, sizes: Any) -> None:
    """Write the largest of a warp's inputs of a row to ``sizes`` [rows, warps]."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), (EIGHT_PER_THREAD,) * len(values), SCALAR, SCALAR))
    def measure(_: Any, sizes: Any, values: Any, row: Any, me: Any) -> None:
        mine = [max_abs_bits(to_floats(a.registers.item())) for a in values]
        warp = add(mul(me.registers.item(), WARPS), div(thread_in_warpgroup(), 32))
        # A warp's threads write the same.
        memref.store(warp_max(functools.reduce(arith.maxui, mine)), sizes, as_indices(row.registers.item(), warp))

    measure(sizes, tuple(values), row, me)  # type: ignore[call-arg]


def _put(values: list[jax.Array], units: list[Any], row: Any, first: Any, last: Any, fmt: Format, p: Plan,
         tiles: SkinnyTiles, smem: Any) -> None:  # fmt: skip
    """Write a thread's inputs of a row as digits."""
    transforms = transforms_of(tiles.step, jnp.int8, fmt.group)
    refs = plgpu.RefType(transforms), plgpu.RefType(), plgpu.RefType()

    @plgpu.inline_mgpu(arg_types=(refs, (EIGHT_PER_THREAD,) * len(values), (SCALAR,) * len(units), *[SCALAR] * 3))
    def put(_: Any, refs: Any, values: Any, units: Any, row: Any, first: Any, last: Any) -> None:
        x, sizes, factors = refs
        row, first, last = (a.registers.item() for a in (row, first, last))
        all_sizes = [memref.load(sizes, as_indices(row, warp)) for warp in range(WARPS * tiles.consumers)]
        scale, inverse = scale_and_inverse(functools.reduce(arith.maxui, all_sizes))

        def column(number: int) -> Any:
            return add(row, p.column(number, 0))

        for unit, eight in zip(units, values, strict=True):
            own = sub(_begin(unit.registers.item(), first, last), first)
            slab = div(own, tiles.step)

            def write(number: int, within: Any, value: Any, slab: Any = slab) -> None:
                swizzled_store(value, x, transforms, 16, slab, column(number), within)

            whole = to_fixed_point(to_floats(eight.registers.item()), inverse, DIGITS)
            write_limbs(whole, DIGITS, fmt.bits, rem(own, tiles.step), write)
        worth = lowest_limb_value(DIGITS, fmt.bits)
        for number in range(DIGITS):  # all threads write the same
            here = arith.mulf(scale, c(worth * 256 ** (DIGITS - 1 - number), scale.type))
            memref.store(here, factors, as_indices(column(number)))

    refs = smem["x"], smem["sizes"], smem["factors"]
    put(refs, tuple(values), tuple(units), row, first, last)  # type: ignore[call-arg]


def _fill_interpreted(x_ref: Any, first: Any, last: Any, fmt: Format, p: Plan, tiles: SkinnyTiles, me: Any,
                      smem: Any) -> None:  # fmt: skip
    def steps_of(row: int) -> list[jax.Array]:
        begins = [jnp.minimum(first + i * tiles.step, last - tiles.step) for i in range(p.cut_steps)]
        return [x_ref[row, pl.ds(begin, tiles.step)] for begin in begins]

    for row in range(p.rows):

        @pl.when(me == row % tiles.consumers)
        def _(row: int = row) -> None:
            digits, scale = split_into_limbs(jnp.stack(steps_of(row)).reshape(1, -1), DIGITS)
            worth = lowest_limb_value(DIGITS, fmt.bits)
            for number, digit in enumerate(digits):
                column = p.column(number, row)
                smem["factors"][column] = scale[0] * (worth * 256 ** (DIGITS - 1 - number))
                for i, some in enumerate(digit.reshape(p.cut_steps, tiles.step)):
                    smem["x"].at[i, column][...] = some

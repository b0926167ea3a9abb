"""Which thread reads and writes what: operations of the decode step that Pallas cannot express, in Mosaic's terms.

`interpreted` has the meaning of each in jax.numpy.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu.fragmented_array import WGMMA_ROW_LAYOUT, FragmentedArray, concatenate
from jax.experimental.mosaic.gpu.utils import c, ds, memref_slice, when
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, math, memref, vector

from ..common.layouts import EIGHT_PER_THREAD, one_per_thread, pair_per_thread
from ..common.limbs import (
    load_int4_as_int8,
    lowest_limb_value,
    max_abs_bits,
    scale_and_inverse,
    swizzled_store,
    to_fixed_point,
    to_floats,
    warp_max,
    write_limbs,
)
from ..common.thread_ops import (
    SCALAR,
    WARPGROUP_SIZE,
    add,
    aligned_load,
    as_i32,
    as_indices,
    div,
    min_,
    mul,
    rem,
    thread_in_warpgroup,
    volatile_thread_in_warpgroup,
)
from ..common.tiles import WGMMA_ROWS, transforms_of
from .block import Block, TileOps
from .exchange import find_peers, receive, send
from .memory import Ref, x_slice
from .phase import ProductPhase
from .plan import LIMB_BLOCK, LIMBS, MAX_TOKENS, UNIT_COLUMNS, scales_in_line

SUMS = plgpu.Layout.TILED(  # sums [64 * m, 4 * n] of tokens: a thread has those whose limbs wgmma gave it
    plgpu.Tiling(((64, 4), (16, 4), (8, 4), (1,))), warp_dims=(-7,), lane_dims=(-3, -2), vector_dim=-1
)


def load(ref: Ref, layout: Any) -> jax.Array:
    """A small array from shared or global memory, where bank conflicts and coalescing hardly matter.

    `plgpu.load` casts what it loads to ``layout``: Mosaic must guess the layout of the load itself, and goes through
    all equations of the kernel after each guess. Here there is nothing to guess."""
    loaded = plgpu.ShapeDtypeStruct(ref.shape, ref.dtype, layout=layout)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=loaded)
    def read(_: Any, ref: Any) -> Any:
        return FragmentedArray.load_untiled(ref, layout=layout.to_mgpu(), optimized=False)

    return read(ref)  # type: ignore[call-arg]


def load_units(rows: Ref, begins: Sequence[Any], neighbours: int = 8) -> list[list[jax.Array]]:
    """128 times ``neighbours`` numbers from each of ``begins`` on, of all rows [..., columns] in global memory, in the
    order of the threads: [4, 32, 8] for 8 neighbours per thread, [4, 32] for 1. A list for every row.

    All in one operation, which computes the thread's place once: a kernel has hundreds of such loads, and Mosaic takes
    longer for each of its operations the more operations it has."""
    layout = EIGHT_PER_THREAD if neighbours == 8 else EIGHT_PER_THREAD.reduce(2)
    shape = (4, 32, 8)[: 3 if neighbours == 8 else 2]
    unit, lead = plgpu.ShapeDtypeStruct(shape, rows.dtype, layout=layout), rows.shape[:-1]

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), (SCALAR,) * len(begins)), return_type=[[unit] * len(begins)] * int(np.prod(lead))
    )
    def read(_: Any, rows: Any, begins: Any) -> list[Any]:
        own = mul(thread_in_warpgroup(), neighbours)
        columns = [as_indices(add(begin.registers.item(), own)) for begin in begins]

        def load(row: list[Any], column: list[Any]) -> Any:
            registers = np.empty(layout.to_mgpu().registers_shape(shape), dtype=object)
            registers[...] = aligned_load(rows, [*row, *column], neighbours)
            return FragmentedArray(_registers=registers, _layout=layout.to_mgpu(), _is_signed=None)

        return [load(as_indices(*row), column) for row in np.ndindex(lead) for column in columns]

    return read(rows, tuple(begins))  # type: ignore[call-arg]


def load_rows(rows: Ref, numbers: Sequence[Any]) -> list[jax.Array]:
    """Rows [64 or 128] of an array in shared memory, each as `one_per_thread`."""
    width = rows.shape[1]
    layout = one_per_thread(width)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), (SCALAR,) * len(numbers)),
        return_type=[plgpu.ShapeDtypeStruct((width,), rows.dtype, layout=layout)] * len(numbers),
    )
    def read(_: Any, rows: Any, numbers: Any) -> list[Any]:
        own = div(thread_in_warpgroup(), WARPGROUP_SIZE // width)

        def load(row: Any) -> Any:
            registers = np.empty(layout.to_mgpu().registers_shape((width,)), dtype=object)
            registers[...] = aligned_load(rows, as_indices(row.registers.item(), own), 1)
            return FragmentedArray(_registers=registers, _layout=layout.to_mgpu(), _is_signed=None)

        return [load(row) for row in numbers]

    return read(rows, tuple(numbers))  # type: ignore[call-arg]


def load_scalars(numbers: Ref, places: Sequence[tuple[Any, ...]]) -> list[jax.Array]:
    """Single numbers of an array in any memory, the same for all threads."""
    scalar = plgpu.ShapeDtypeStruct((), numbers.dtype, layout=SCALAR)
    types = jax.tree.map(lambda _: SCALAR, tuple(places))

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), types), return_type=[scalar] * len(places))
    def read(_: Any, numbers: Any, places: Any) -> list[Any]:
        indices = [as_indices(*(index.registers.item() for index in place)) for place in places]
        return [FragmentedArray.splat(memref.load(numbers, place), ()) for place in indices]

    return read(numbers, jax.tree.map(jnp.int32, tuple(places)))  # type: ignore[call-arg]


def rotate_heads(b: Block, head: Any, count: int) -> jax.Array:
    """``count`` heads of all tokens from ``head`` on, rotated by the tokens' positions: [8 * count, head_dim]. In
    float32, as the reference does it. ``head`` counts the columns of ``qkv``: query heads, then key heads."""
    D, layout = b.plan.shape.head_dim, pair_per_thread()
    heads = plgpu.ShapeDtypeStruct((MAX_TOKENS * count, D), jnp.bfloat16, layout=layout)

    @plgpu.inline_mgpu(arg_types=((plgpu.RefType(),) * 3, SCALAR), return_type=heads)
    def rotate(_: Any, refs: Any, head: Any) -> Any:
        qkv, cos, sin = refs
        f32, bf16 = ir.F32Type.get(), ir.BF16Type.get()

        def load(ref: Any) -> Any:
            return FragmentedArray.load_untiled(ref, layout=layout.to_mgpu(), optimized=False)

        def half(number: int) -> Any:
            (begin,) = as_indices(add(mul(head.registers.item(), D), number * (D // 2)))
            return load(memref_slice(qkv, (slice(None), ds(begin, D // 2)))).astype(f32)

        halves = [(half(2 * i), half(2 * i + 1)) for i in range(count)]
        cos, sin = load(cos), load(sin)
        rotated = [concatenate([a * cos - c * sin, c * cos + a * sin], axis=1).astype(bf16) for a, c in halves]
        return concatenate(rotated, axis=0)

    return rotate((b.buffers.qkv, b.inputs.cos, b.inputs.sin), head)  # type: ignore[call-arg]


def broadcast_to_unit(factors: jax.Array) -> jax.Array:
    """[4, 32] -> [4, 32, 8], a factor for 8 neighbours of a unit, in a layout that Mosaic need not guess."""
    shape = (4, 32, 8)
    unit = plgpu.ShapeDtypeStruct(shape, factors.dtype, layout=EIGHT_PER_THREAD)

    @plgpu.inline_mgpu(arg_types=(EIGHT_PER_THREAD.reduce(2),), return_type=unit)
    def broadcast(_: Any, factors: Any) -> Any:
        return factors.broadcast_in_dim(shape, (0, 1), EIGHT_PER_THREAD.to_mgpu())

    return broadcast(factors)  # type: ignore[call-arg]


def store_x(b: Block, phase: ProductPhase, units: Sequence[jax.Array], numbers: Sequence[Any], token: Any) -> None:
    """Write ``units`` [4, 32, 8] with these ``numbers`` (see `ProductPlan.column`), 1024 inputs of a token each, to the
    phase's x [steps, columns of all K splits, step] in shared memory. Numbers past the end are no-ops. Pallas writes
    whole tiles of 8 columns, and most often there is one.

    For integer weights a token has two columns side by side, of its limbs (see `split_into_limbs`), and the scale of
    the lower limb goes to the phase's ``limb_scales`` [blocks of inputs, tokens of all K splits]."""
    p, memory, shape, integers = b.product(phase), b.memory(phase), b.plan.shape, b.plan.shape.fmt.quantized
    dtype = jnp.dtype(jnp.int8 if integers else jnp.bfloat16)
    transforms = transforms_of(memory.x.shape[-1], dtype, x_slice(b.plan))
    refs = (memory.x, memory.limb_scales) if integers else (memory.x,)
    types = (plgpu.RefType(transforms), plgpu.RefType())[: len(refs)]
    some, count = len(units), p.k_splits * p.held_units

    @plgpu.inline_mgpu(arg_types=(types, (EIGHT_PER_THREAD,) * some, (SCALAR,) * some, SCALAR))
    def store(_: Any, refs: Any, units: Any, numbers: Any, token: Any) -> None:
        for unit, number in zip(units, numbers, strict=True):
            number = number.registers.item()
            with when(arith.cmpi(arith.CmpIPredicate.ult, number, as_i32(count))):
                one_unit(refs, unit, number, token.registers.item())

    def one_unit(refs: Any, unit: Any, number: Any, token: Any) -> None:
        split, step = div(number, p.held_units), mul(rem(number, p.held_units), UNIT_COLUMNS // p.step)
        (eight,) = unit.registers.flat  # this thread's inputs: 8 from 8 * thread on
        first = mul(volatile_thread_in_warpgroup(), 8)
        slab, within = add(step, div(first, p.step)), rem(first, p.step)
        column = add(mul(split, shape.columns), mul(token, shape.limbs))

        def write(limb: int, at: Any, value: Any) -> None:
            swizzled_store(value, refs[0], transforms, 16 // dtype.itemsize, slab, add(column, limb), at)

        if not integers:
            write(0, within, eight)
            return
        numbers = to_floats(eight)
        scale, inverse = scale_and_inverse(warp_max(max_abs_bits(numbers)))
        write_limbs(to_fixed_point(numbers, inverse, LIMBS), LIMBS, shape.fmt.bits, within, write)
        block = add(div(mul(step, p.step), LIMB_BLOCK), div(first, LIMB_BLOCK))
        limb_scale = arith.mulf(scale, c(lowest_limb_value(LIMBS, shape.fmt.bits), scale.type))
        # The threads of a block of limbs write the same.
        memref.store(limb_scale, refs[1], as_indices(block, add(mul(split, shape.token_slots), token)))

    store(refs, tuple(units), tuple(numbers), token)  # type: ignore[call-arg]


def load_scales(b: Block, phase: ProductPhase, tile: Any, group: Any) -> jax.Array:
    """The scales [64] of a wgmma tile's rows for the ``group``-th group of their K splits, in float32."""
    p, scales, size = b.product(phase), b.scales(phase), b.plan.shape.fmt.group or 1
    groups, split_groups = p.inner // size, p.split_steps * p.step // size
    line = scales_in_line(groups)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), SCALAR, SCALAR),
        return_type=plgpu.ShapeDtypeStruct((WGMMA_ROWS,), jnp.float32, layout=plgpu.Layout.WGMMA.reduce(1)),
    )
    def read(_: Any, scales: Any, tile: Any, group: Any) -> Any:
        tile, group, thread = tile.registers.item(), group.registers.item(), thread_in_warpgroup()
        row = first_row_of(thread)
        registers = np.empty(WGMMA_ROW_LAYOUT.registers_shape((WGMMA_ROWS,)), dtype=object)
        for i, index in enumerate(np.ndindex(registers.shape)):  # rows r and r + 8
            stacked = add(add(row, 8 * i), mul(tile, WGMMA_ROWS))
            if p.wgmma_tiles * WGMMA_ROWS > p.stacked_rows:
                stacked = min_(stacked, p.stacked_rows - 1)
            part, within = div(stacked, p.n_tile), rem(stacked, p.n_tile)
            half, split = div(part, p.k_splits), rem(part, p.k_splits)
            column = add(group, mul(split, split_groups))
            if p.k_splits > 1 or p.inner % p.step:
                column = min_(column, groups - 1)
            flat = add(mul(rem(within, 8), groups), column)
            scale = memref.load(scales, as_indices(half, div(within, 8), div(flat, line), rem(flat, line)))
            wide = arith.extf(ir.F32Type.get(), scale)
            registers[index] = vector.broadcast(ir.VectorType.get((1,), ir.F32Type.get()), wide)
        return FragmentedArray(_registers=registers, _layout=WGMMA_ROW_LAYOUT, _is_signed=None)

    return read(scales, tile, group)  # type: ignore[call-arg]


def combine_limbs(b: Block, phase: ProductPhase, sums: jax.Array, limb_scales: Ref, scales: list[jax.Array],
                  tile: Any, total: jax.Array) -> jax.Array:  # fmt: skip
    """``total`` [64, tokens] plus the value of integer sums [64, columns of all K splits]: a token's limbs combined,
    of each row's own K split, times ``limb_scales`` [tokens of all K splits] and, where there are, ``scales`` [64]."""
    p, slots = b.product(phase), b.plan.shape.token_slots
    types = plgpu.Layout.WGMMA, plgpu.RefType(), (plgpu.Layout.WGMMA.reduce(1),) * len(scales), SCALAR, SUMS

    @plgpu.inline_mgpu(
        arg_types=types, return_type=plgpu.ShapeDtypeStruct((WGMMA_ROWS, slots), jnp.float32, layout=SUMS)
    )
    def combine(_: Any, sums: Any, limb_scales: Any, scales: Any, tile: Any, total: Any) -> Any:
        f32, tile, thread = ir.F32Type.get(), tile.registers.item(), thread_in_warpgroup()
        registers = np.empty_like(total.registers)
        for index in np.ndindex(registers.shape):
            column, half = index[1], index[4]  # of 8 columns, and of rows r and r + 8
            row = add(mul(tile, WGMMA_ROWS), add(first_row_of(thread), 8 * half))
            split = rem(div(row, p.n_tile), p.k_splits)
            own, at = None, add(mul(split, slots), add(4 * column, rem(thread, 4)))
            for i in range(p.k_splits):
                pair = sums.registers[0, i * (slots // 4) + column, *index[2:]]
                upper, lower = (vector.extract(pair, [], [limb]) for limb in range(LIMBS))
                whole = add(mul(upper, 256), lower)
                is_own = arith.cmpi(arith.CmpIPredicate.eq, split, as_i32(i))
                own = whole if own is None else arith.select(is_own, whole, own)
            scale = memref.load(limb_scales, as_indices(at))
            for row_scales in scales:
                scale = arith.mulf(scale, vector.extract(row_scales.registers.flat[half], [], [0]))
            before = vector.extract(total.registers[index], [], [0])
            after = math.fma(arith.sitofp(f32, own), scale, before)
            registers[index] = vector.broadcast(ir.VectorType.get((1,), f32), after)
        return FragmentedArray(_registers=registers, _layout=total.layout, _is_signed=None)

    return combine(sums, limb_scales, tuple(scales), tile, total)  # type: ignore[call-arg]


def store_sums(b: Block, sums: Ref, total: jax.Array, tile: Any, accumulate: Any) -> None:
    """Write ``total`` [64, tokens] to its tile of ``sums`` [tokens, outputs]; ``accumulate``: add it to them."""
    del b

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SUMS, SCALAR, SCALAR))
    def store(_: Any, sums: Any, total: Any, tile: Any, accumulate: Any) -> None:
        tile, accumulate = tile.registers.item(), accumulate.registers.item()
        thread = volatile_thread_in_warpgroup()
        for index, value in np.ndenumerate(total.registers):
            token = add(4 * index[1], rem(thread, 4))
            here = as_indices(token, add(mul(tile, WGMMA_ROWS), add(first_row_of(thread), 8 * index[4])))
            one = vector.extract(value, [], [0])
            before = arith.select(accumulate, memref.load(sums, here), c(0.0, one.type))
            memref.store(arith.addf(before, one), sums, here)

    store(sums, total, tile, accumulate)  # type: ignore[call-arg]


def load_int4(b: Block, slot: Any, ranges: int) -> list[jax.Array]:
    """A stage of 4-bit weights as wgmma's left operand in registers, in so many ranges of inputs. The slot is free as
    soon as they are there: the next stage may arrive while this one is multiplied."""
    weights = load_int4_as_int8(b.scratch.ring.at[slot], ranges)
    plgpu.barrier_arrive(b.scratch.ring_free.at[slot])
    return weights


def first_row_of(thread: Any) -> Any:
    """The first of a thread's two rows of wgmma's 64; the second is 8 further."""
    return add(mul(div(thread, 32), 16), div(rem(thread, 32), 4))


MOSAIC = TileOps(
    load, load_units, load_rows, load_scalars, rotate_heads, broadcast_to_unit, store_x,
    load_scales, combine_limbs, store_sums, load_int4, find_peers, send, receive, int4_frees_slot=True,
)  # fmt: skip

"""Where a decode step must say which thread does what: reads and writes of shared memory that Pallas has no words for.

Each function says what it means in `jax.numpy` terms for the interpreter, and in Mosaic's terms for a GPU.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu.fragmented_array import WGMMA_ROW_LAYOUT, FragmentedArray
from jax.experimental.mosaic.gpu.utils import c, thread_idx, vector_slice
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref, vector

from pallas_kernels.persistent_layouts import UNIT
from pallas_kernels.persistent_plan import ROW_UNIT, ROWS, Plan, Product
from pallas_kernels.tiles import WGMMA_ROWS, transforms_of

SHUFFLED = 32  # inputs whose order changes where weights are widened in registers
SCALAR = plgpu.Layout.WG_SPLAT


def put_row(plan: Plan, p: Product, x: Any, values: jax.Array, cut: int, step: Any, row: Any) -> None:
    """Write ``values`` [4, 256], the next 1024 inputs of one token from ``step`` of a cut on, to x [steps, 8 * cuts,
    inputs] in shared memory: the row of the token among the cut's 8, in the order of `shuffle_inputs` where weights are
    quantised. Pallas writes whole tiles of 8 tokens only, and most often there is one."""
    if plan.interpret:
        steps = ROW_UNIT // p.step
        for i in range(steps):
            x.at[step + i, cut * ROWS + row][...] = values.reshape(steps, p.step)[i]
        return
    dtype, run = jnp.dtype(jnp.bfloat16), plan.shape.fmt.group
    transforms = transforms_of(x.shape[-1], dtype, run)
    width = transforms[0].tiling[-1]  # inputs of a swizzled tile: 64, or 32 or 16 where groups are small
    chunks = width // 8
    shuffled = plan.shape.fmt.quantized

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(transforms), UNIT, SCALAR, SCALAR))
    def put(_: Any, x: Any, values: Any, step: Any, row: Any) -> None:
        step, row = step.registers.item(), row.registers.item()
        (eight,) = values.registers.flat  # this thread's inputs: 8 * thread and on
        first = times(thread_in_warpgroup(), 8)
        slab = plus(step, over(first, p.step))
        within = rest(first, p.step)

        def write(at: Any, value: Any) -> None:
            """``value`` at input ``at`` of the slab: the swizzle moves lines of 8 inputs about within a row."""
            line = over(rest(at, width), 8)
            line = arith.xori(line, over(row, 8 // chunks))
            vector.store(value, x, place(slab, cut, over(at, width), row, plus(times(line, 8), rest(at, 8))))

        if not shuffled:
            write(within, eight)
            return
        # A thread has a quarter of 32 inputs; its pair b goes to line b of the 4, at the thread's place in it.
        quarter = rest(over(within, 8), 4)
        start = minus(within, times(quarter, 8))
        for b in range(4):
            pair = vector_slice(eight, slice(2 * b, 2 * b + 2))
            write(plus(plus(start, 8 * b), times(quarter, 2)), pair)

    put(x, values, step, row)


def scale_rows(plan: Plan, p: Product, scales: Any, tile: Any, group: Any) -> jax.Array:
    """The scales [64] of a tile's rows for the ``group``-th group of their ranges of inputs, in float32. ``scales`` is
    shared memory in the form of `scales_shape`."""
    groups = p.inner // plan.shape.fmt.group
    cut_groups = p.cut_steps * p.step // plan.shape.fmt.group
    if plan.interpret:
        stacked = jnp.minimum(tile * WGMMA_ROWS + jax.lax.iota(jnp.int32, WGMMA_ROWS), p.stacked - 1)
        part, row = stacked // p.strip, stacked % p.strip
        flat = scales[...].reshape(p.halves * p.strip * groups)
        column = jnp.minimum(group + part % p.cuts * cut_groups, groups - 1)
        return flat[((part // p.cuts) * p.strip + row) * groups + column].astype(jnp.float32)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), SCALAR, SCALAR),
        return_type=plgpu.ShapeDtypeStruct((WGMMA_ROWS,), jnp.float32, layout=plgpu.Layout.WGMMA.reduce(1)),
    )
    def read(_: Any, scales: Any, tile: Any, group: Any) -> Any:
        tile, group, thread = tile.registers.item(), group.registers.item(), thread_in_warpgroup()
        row = plus(times(over(thread, 32), 16), over(rest(thread, 32), 4))
        registers = np.empty(WGMMA_ROW_LAYOUT.registers_shape((WGMMA_ROWS,)), dtype=object)
        for i, index in enumerate(np.ndindex(registers.shape)):  # rows r and r + 8
            stacked = plus(plus(row, 8 * i), times(tile, WGMMA_ROWS))
            if p.tiles * WGMMA_ROWS > p.stacked:
                stacked = least(stacked, p.stacked - 1)
            part, inside = over(stacked, p.strip), rest(stacked, p.strip)
            half, cut = over(part, p.cuts), rest(part, p.cuts)
            column = plus(group, times(cut, cut_groups))
            if p.cuts > 1:
                column = least(column, groups - 1)
            flat = plus(times(rest(inside, 8), groups), column)
            scale = memref.load(scales, place(half, over(inside, 8), over(flat, 16), rest(flat, 16)))
            one = arith.extf(ir.F32Type.get(), scale)
            registers[index] = vector.broadcast(ir.VectorType.get((1,), ir.F32Type.get()), one)
        return FragmentedArray(_registers=registers, _layout=WGMMA_ROW_LAYOUT, _is_signed=None)

    return read(scales, tile, group)


def thread_in_warpgroup() -> Any:
    return rest(thread_idx(), 128)


def _int(value: Any) -> Any:
    return c(value, ir.IntegerType.get_signless(32)) if isinstance(value, int) else value


def plus(a: Any, b: Any) -> Any:
    return arith.addi(_int(a), _int(b))


def minus(a: Any, b: Any) -> Any:
    return arith.subi(_int(a), _int(b))


def times(a: Any, n: int) -> Any:
    return arith.muli(a, _int(n))


def over(a: Any, n: int) -> Any:
    return arith.divui(a, _int(n))


def rest(a: Any, n: int) -> Any:
    return arith.remui(a, _int(n))


def least(a: Any, n: int) -> Any:
    return arith.minui(a, _int(n))


def place(*indices: Any) -> list[Any]:
    """Numbers as indices of a reference."""
    return [arith.index_castui(ir.IndexType.get(), _int(i)) for i in indices]

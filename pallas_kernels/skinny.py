"""Products for few rows (1 to 64): the weight is read once, at the speed of memory, by every multiprocessor.

The weight is cut into *pieces*: a strip of output rows over a range of the inputs. Every block takes the same number of
pieces, so the 132 blocks of an H200 are busy to 95 % or more whatever the shape, and no block waits for another. Where
the inputs are cut, the partial sums are added in one fixed order afterwards, in the operation that transposes the
(small) result, so the same arguments always give the same bits.

Inside a block one warpgroup issues TMA copies into a ring of stages; the others take the stages in turn, each with
accumulators of its own, and add those up through shared memory when the piece is done.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dispatch import Unsupported
from pallas_kernels.skinny_plan import Plan, SkinnyTiles, plan, tiles_for
from pallas_kernels.tiles import (
    WGMMA_ROWS,
    Format,
    Weight,
    check_product,
    format_of,
    layer_index,
    scale_column,
    shuffle_inputs,
    sm_count,
    split,
    spread,
    swizzled,
    widen_shuffled,
)

MAX_ROWS = 64


def check_skinny(x: jax.Array, w: Weight, *, tiles: SkinnyTiles | None = None) -> None:
    """Raise `Unsupported` where `skinny` cannot run; ``x`` is [rows, in]."""
    check_product(x, w)
    fmt = format_of(w)
    rows, inner = x.shape
    out = w.shape[-2]
    tiles = tiles or tiles_for(fmt, inner, rows)
    if rows > MAX_ROWS:
        raise Unsupported(f"at most {MAX_ROWS} rows, found {rows}")
    if inner % tiles.step:
        raise Unsupported(f"{inner} inputs: must be a multiple of {tiles.step}")
    grain = WGMMA_ROWS if fmt.grouped else 8
    if out % grain:
        raise Unsupported(f"{out} outputs: must be a multiple of {grain}")
    if fmt.group is not None and tiles.step % fmt.group:
        raise Unsupported(f"groups of {fmt.group} inputs: must divide {tiles.step}")


def skinny(
    x: jax.Array,
    w: Weight,
    *,
    layer: jax.Array | int | None = None,
    residual: jax.Array | None = None,
    swiglu: bool = False,
    out_dtype: Any = None,
    tiles: SkinnyTiles | None = None,
    sms: int | None = None,
    interpret: Any = False,
) -> jax.Array:
    """x [rows, in] · w [out, in] -> [rows, out] (+ residual), or silu(gate) * up of w [2 * out, in] with ``swiglu``.

    With ``layer``, w is stacked [layers, out, in] and read in place.
    """
    fmt = format_of(w)
    tiles = tiles or tiles_for(fmt, x.shape[1], x.shape[0])
    return _skinny(
        x,
        w,
        layer_index(layer),
        residual,
        swiglu=swiglu,
        out_dtype=jnp.dtype(out_dtype or x.dtype),
        tiles=tiles,
        sms=sms or sm_count(),
        interpret=interpret,
    )


# Compiled as a function of its own: the layers of a model then share one trace and one lowering.
@functools.partial(jax.jit, static_argnames=("interpret", "out_dtype", "sms", "swiglu", "tiles"))
def _skinny(x: jax.Array, w: Weight, layer: jax.Array, residual: jax.Array | None, *, swiglu: bool, out_dtype: Any,
            tiles: SkinnyTiles, sms: int, interpret: Any) -> jax.Array:  # fmt: skip
    fmt = format_of(w)
    rows, inner = x.shape
    padded = 8 * math.ceil(rows / 8)
    p = plan(w.shape[-2], inner, padded, fmt, tiles, sms)
    data, scale = split(w)
    x = jnp.pad(x, ((0, padded - rows), (0, 0)))
    arguments = [layer, shuffle_inputs(x) if fmt.quantized and not interpret else x, data]
    if fmt.grouped:
        arguments.append(scale)
    parts = _kernel(fmt, p, tiles, x.dtype, interpret)(*arguments)
    # All that follows works on the small sums and is one XLA fusion.
    y = functools.reduce(jnp.add, [parts[i] for i in range(p.cuts)])[:, :rows]  # a fixed order
    if scale is not None and not fmt.grouped:
        y = y * scale[layer[0]].astype(jnp.float32)
    if swiglu:
        gate, up = jnp.split(y, 2)
        y = jax.nn.silu(gate) * up
    y = y.T if residual is None else y.T + residual.astype(jnp.float32)
    return y.astype(out_dtype)


def _kernel(fmt: Format, p: Plan, tiles: SkinnyTiles, dtype: Any, interpret: Any) -> Any:
    """The launch: partial sums, float32 [cuts, out, rows]."""
    others = tiles.consumers - 1
    scratch = {
        "w_ring": swizzled((p.depth, p.height, tiles.step), fmt.dtype),
        "x_ring": swizzled((p.depth, p.rows, tiles.step), dtype, run=fmt.group),
        "sums": plgpu.SMEM((max(1, others), p.height, p.rows), jnp.float32),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=p.depth),
        "free": plgpu.Barrier(num_arrivals=1, num_barriers=p.depth),
    }
    if others:
        scratch["summed"] = plgpu.Barrier(num_arrivals=others)
        scratch["stored"] = plgpu.Barrier(num_arrivals=1)
    if interpret and fmt.quantized:
        scratch["widened"] = swizzled((tiles.consumers, WGMMA_ROWS, tiles.step), dtype, run=fmt.group)
    return plgpu.kernel(
        functools.partial(_body, fmt=fmt, p=p, tiles=tiles, dtype=dtype, interpret=interpret),
        out_type=jax.ShapeDtypeStruct((p.cuts, p.out, p.rows), jnp.float32),
        scratch_types=scratch,
        grid=(p.blocks,),
        grid_names=("block",),
        num_threads=tiles.consumers + 1,
        thread_name="warpgroup",
        interpret=interpret,
        kernel_name="skinny_product",
    )


def _body(*refs: Any, fmt: Format, p: Plan, tiles: SkinnyTiles, dtype: Any, interpret: Any, **scratch: Any) -> None:
    layer_ref, x_ref, w_ref, *scale_ref, out_ref = refs
    layer = layer_ref[0]
    block, me = lax.axis_index("block"), lax.axis_index("warpgroup")
    turns = (p.strips * p.cuts - block + p.blocks - 1) // p.blocks

    def piece(turn: Any) -> tuple[Any, Any, Any, Any]:
        """First row, cut, first step and end of the piece that this block takes at this turn."""
        index = turn * p.blocks + block
        strip, cut = index // p.cuts, lax.rem(index, p.cuts)
        # The last strip is moved up where it would pass the end: two blocks then write the same values there.
        row = pl.multiple_of(jnp.minimum(strip * p.strip, p.out - p.strip), 8)
        return row, cut, cut * p.steps // p.cuts, (cut + 1) * p.steps // p.cuts

    registers = 65536 // (128 * (tiles.consumers + 1)) // 8 * 8  # what the launch gives each thread

    @pl.when(me == tiles.consumers)
    def _() -> None:
        if tiles.consumers > 1 and not interpret:
            plgpu.set_max_registers(24, action="decrease")
        _produce(x_ref, w_ref.at[layer], turns, piece, p, tiles.step, **scratch)

    @pl.when(me < tiles.consumers)
    def _() -> None:
        if tiles.consumers > 1 and not interpret:
            spare = (registers - 24) // tiles.consumers
            plgpu.set_max_registers(min(240, (registers + spare) // 8 * 8), action="increase")
        scales = scale_ref[0].at[layer] if scale_ref else None
        _consume(me, scales, out_ref, turns, piece, fmt, p, tiles, dtype, **scratch)


def _produce(x_ref: Any, w_ref: Any, turns: Any, piece: Any, p: Plan, step: int, *, w_ring: Any, x_ring: Any,
             full: Any, free: Any, **_: Any) -> None:  # fmt: skip
    """Keep the ring full. Copies run ahead of the sums, across pieces too."""

    def turn(t: Any, count: Any) -> Any:
        row, _, start, end = piece(t)

        def stage(i: Any, count: Any) -> Any:
            slot = lax.rem(count, p.depth)

            @pl.when(count >= p.depth)
            def _() -> None:
                plgpu.barrier_wait(free.at[slot])

            inputs = pl.ds(i * step, step)
            plgpu.copy_gmem_to_smem(
                w_ref.at[pl.ds(row, p.strip), inputs], w_ring.at[slot, pl.ds(0, p.strip)], full.at[slot]
            )
            plgpu.copy_gmem_to_smem(x_ref.at[:, inputs], x_ring.at[slot], full.at[slot])
            return count + 1

        return lax.fori_loop(start, end, stage, count)

    count = lax.fori_loop(0, turns, turn, jnp.int32(0))

    def drain(i: Any, _: Any) -> None:  # a barrier's every completion must be awaited before the block ends
        plgpu.barrier_wait(free.at[lax.rem(i, p.depth)])

    lax.fori_loop(jnp.maximum(count - p.depth, 0), count, drain, None)


def _consume(me: Any, scales: Any, out_ref: Any, turns: Any, piece: Any, fmt: Format, p: Plan, tiles: SkinnyTiles,
             dtype: Any, *, w_ring: Any, x_ring: Any, sums: Any, full: Any, free: Any, summed: Any = None,
             stored: Any = None, widened: Any = None) -> None:  # fmt: skip
    """Multiply the stages whose turn it is, then add up what the consumers have."""
    tiles_of_64 = p.height // WGMMA_ROWS
    last = tiles.consumers - 1
    accumulators = [plgpu.ACC((WGMMA_ROWS, p.rows), jnp.float32)] * tiles_of_64

    def operand(slot: Any, tile: int) -> Any:
        """One 64-row tile of a stage, as wgmma's left operand: where it lies, or widened in registers."""
        weights = w_ring.at[slot, pl.ds(tile * WGMMA_ROWS, WGMMA_ROWS)]
        if not fmt.quantized:
            return weights
        if widened is None:
            return widen_shuffled(weights, dtype)
        # The interpreter has no wgmma with an operand in registers.
        widened[me] = weights[...].astype(dtype)
        plgpu.commit_smem()
        return widened.at[me]

    def multiply(acc: Any, weights: Any, slot: Any, group: slice = slice(None)) -> None:
        """acc += a tile of weights, over one group of its inputs."""
        in_registers = fmt.quantized and widened is None
        weights = weights[:, group] if in_registers else weights.at[:, group]
        plgpu.wgmma(acc, weights, x_ring.at[slot, :, group].T)
        if widened is not None:
            plgpu.wgmma_wait(0)

    def my_stages(start: Any, end: Any, count: Any, stage: Any, carry: Any) -> Any:
        """Fold ``stage(step, slot, carry)`` over the stages of a piece that are this consumer's.

        A slot of the ring always belongs to the same consumer, across pieces too: a warpgroup keeps count of a
        barrier's phases by waiting for each of them."""
        first = lax.rem(me + tiles.consumers - lax.rem(count, tiles.consumers), tiles.consumers)

        def body(j: Any, carry: Any) -> Any:
            offset = first + j * tiles.consumers
            slot = lax.rem(count + offset, p.depth)
            plgpu.barrier_wait(full.at[slot])
            carry = stage(start + offset, slot, carry)
            plgpu.barrier_arrive(free.at[slot])
            return carry

        return lax.fori_loop(0, (end - start - first + last) // tiles.consumers, body, carry)

    def one_scale_a_row(start: Any, end: Any, count: Any) -> Any:
        def scoped(*accs: Any) -> list[jax.Array]:
            def stage(_: Any, slot: Any, carry: Any) -> Any:
                for tile, acc in enumerate(accs):
                    multiply(acc, operand(slot, tile), slot)
                plgpu.wgmma_wait(0)
                return carry

            my_stages(start, end, count, stage, None)
            return [acc[...] for acc in accs]

        return pl.run_scoped(scoped, *accumulators)

    def one_scale_a_group(start: Any, end: Any, count: Any, row: Any) -> Any:
        groups = tiles.step // fmt.group

        together = math.gcd(groups, max(1, WGMMA_ROWS // p.rows))  # groups in flight: as registers allow

        def stage(step: Any, slot: Any, totals: Any) -> Any:
            totals = list(totals)
            for tile in range(tiles_of_64):
                weights = operand(slot, tile)
                for g in range(0, groups, together):

                    def scoped(*accs: Any, weights: Any = weights, g: int = g) -> list[jax.Array]:
                        for i, acc in enumerate(accs):
                            multiply(acc, weights, slot, slice((g + i) * fmt.group, (g + i + 1) * fmt.group))
                        plgpu.wgmma_wait(0)
                        return [acc[...] for acc in accs]

                    for i, part in enumerate(pl.run_scoped(scoped, *[accumulators[tile]] * together)):
                        scale = scale_column(scales, row + tile * WGMMA_ROWS, step * groups + g + i, WGMMA_ROWS)
                        totals[tile] = totals[tile] + part * spread(scale, part.shape)
            return totals

        zero = plgpu.layout_cast(jnp.zeros((WGMMA_ROWS, p.rows), jnp.float32), plgpu.Layout.WGMMA)
        return my_stages(start, end, count, stage, [zero] * tiles_of_64)

    def turn(t: Any, count: Any) -> Any:
        row, cut, start, end = piece(t)
        totals = one_scale_a_group(start, end, count, row) if fmt.grouped else one_scale_a_row(start, end, count)

        def save() -> None:
            for tile, total in enumerate(totals):
                sums[me, pl.ds(tile * WGMMA_ROWS, WGMMA_ROWS)] = total

        if not last:
            save()
        else:

            @pl.when(me < last)
            def _() -> None:
                save()
                plgpu.barrier_arrive(summed)
                plgpu.barrier_wait(stored)

        @pl.when(me == last)
        def _() -> None:
            if last:
                plgpu.barrier_wait(summed)
                for tile, total in enumerate(totals):
                    part = pl.ds(tile * WGMMA_ROWS, WGMMA_ROWS)
                    for other in range(last):
                        total = total + plgpu.load(sums.at[other, part], layout=plgpu.Layout.WGMMA)
                    sums[0, part] = total  # where each thread has just read
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(sums.at[0, pl.ds(0, p.strip)], out_ref.at[cut, pl.ds(row, p.strip)])
            plgpu.wait_smem_to_gmem(0)
            if last:
                plgpu.barrier_arrive(stored)

        return count + end - start

    lax.fori_loop(0, turns, turn, jnp.int32(0))

"""Small-M GEMM: products for 1 to 64 rows of x. The weight is read once, at the speed of memory, by every SM.

The output is divided into work tiles: an N tile over one K split (see `small_m_plan`). Every block takes the same
number of work tiles, so the 132 SMs of an H200 are at least 95 % busy for every shape, and no block waits for another.

- Without K splits, as for most shapes, the kernel writes the finished result.
- With K splits, one XLA fusion transposes the (small) partial sums and adds them in a fixed order, so the same
  arguments always give the same bits.

Inside a block the producer warpgroup copies stages of weights into a ring by TMA. The consumers take the stages in
turn, each with its own accumulators, and add these up through shared memory at the end of a work tile.
`small_m_floats` has the consumers that multiply floats. `small_m_limbs` has those that multiply one or two rows with
integer weights in integers.
"""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ...arch import planned
from ...dispatch import Unsupported
from ...layer_view import layer_index
from ..common.ring import acquire, drain
from ..common.tiles import (
    WGMMA_ROWS,
    Weight,
    check_operands,
    data_and_scale,
    format_of,
    pad_rows_unless_short,
)
from ..common.warp_specialize import warp_specialize
from ..common.widen import shuffle_inputs
from .small_m_block import Block, FloatScratch, LimbScratch, WorkTile
from .small_m_floats import consume_floats, float_scratch
from .small_m_limbs import consume_limbs, limb_scratch
from .small_m_plan import MAX_ROWS_AS_LIMBS, SmallMPlan, SmallMTiles, plan, tiles_for

SMALL_M_MAX = 8  # rows
PRODUCER_REGISTERS = 24


def check_small_m(x: jax.Array, w: Weight, *, tiles: SmallMTiles | None = None) -> None:
    """Raise `Unsupported` where `small_m_gemm` cannot run; ``x`` is [rows, in]."""
    check_operands(x, w)
    fmt = format_of(w)
    rows, inner = x.shape
    out = w.shape[-2]
    tiles = tiles or tiles_for(fmt, out, inner, rows)
    if rows > SMALL_M_MAX:
        raise Unsupported(f"at most {SMALL_M_MAX} rows, found {rows}")
    if inner % tiles.step:
        raise Unsupported(f"{inner} inputs: must be a multiple of {tiles.step}")
    if out % 8 or (fmt.quantized and out < WGMMA_ROWS):
        raise Unsupported(f"{out} outputs: must be a multiple of 8" + ", at least 64" * fmt.quantized)
    if fmt.group is not None and tiles.step % fmt.group:
        raise Unsupported(f"groups of {fmt.group} inputs: must divide {tiles.step}")
    if tiles.limbs and rows > MAX_ROWS_AS_LIMBS:
        raise Unsupported(f"limbs of at most {MAX_ROWS_AS_LIMBS} rows, found {rows}")
    if tiles.limbs and (not fmt.quantized or tiles.step % 128 or (fmt.group or 128) % 128):
        raise Unsupported("limbs are for integer weights with one scale a row or a multiple of 128 inputs")


def small_m_gemm(
    x: jax.Array,
    w: Weight,
    *,
    layer: jax.Array | int | None = None,
    residual: jax.Array | None = None,
    swiglu: bool = False,
    out_dtype: Any = None,
    tiles: SmallMTiles | None = None,
    sms: int | None = None,
    interpret: Any = False,
) -> jax.Array:
    """x [rows, in] · w [out, in] -> [rows, out] (+ residual), or silu(gate) * up of w [2 * out, in] with ``swiglu``.

    With ``layer``, w is stacked [layers, out, in] and read in place.
    """
    tiles = tiles or tiles_for(format_of(w), w.shape[-2], x.shape[1], x.shape[0])
    return _small_m_gemm(
        x,
        w,
        None if layer is None else layer_index(layer),
        residual,
        swiglu=swiglu,
        out_dtype=jnp.dtype(out_dtype or x.dtype),
        tiles=tiles,
        sms=sms or planned().sms,
        interpret=interpret,
    )


# A jit of its own: all layers of a model share one trace and one lowering.
@functools.partial(jax.jit, static_argnames=("interpret", "out_dtype", "sms", "swiglu", "tiles"))
def _small_m_gemm(x: jax.Array, w: Weight, layer: jax.Array | None, residual: jax.Array | None, *, swiglu: bool,
                  out_dtype: Any, tiles: SmallMTiles, sms: int, interpret: Any) -> jax.Array:  # fmt: skip
    fmt = format_of(w)
    rows, inner = x.shape
    p = replace(plan(w.shape[-2], inner, rows, fmt, tiles, sms), interpret=bool(interpret))
    data, scale = data_and_scale(w)
    if not p.limbs:
        x = pad_rows_unless_short(x, 0)
        x = shuffle_inputs(x) if fmt.quantized and not interpret else x
    arguments = {"layer": layer, "x": x, "w": data}
    if fmt.grouped or (fmt.quantized and (p.direct or p.limbs)):
        arguments["scale"] = scale
    arguments = {name: a for name, a in arguments.items() if a is not None}
    # One XLA fusion follows: it adds the K splits, if there are any, and applies what was asked for after the product.
    if p.direct:
        result = jax.ShapeDtypeStruct((rows, p.out), jnp.float32 if swiglu or residual is not None else out_dtype)
        y = _launch(p, arguments, result, interpret)
    else:
        shape = (rows, p.out) if p.limbs else (p.out, p.padded)
        partial_sums = _launch(p, arguments, jax.ShapeDtypeStruct((p.k_splits, *shape), jnp.float32), interpret)
        y = functools.reduce(jnp.add, [partial_sums[i] for i in range(p.k_splits)])  # a fixed order
        if not p.limbs:
            y = y[:, :rows]
            if scale is not None and not fmt.grouped:
                y = y * scale[0 if layer is None else layer[0]].astype(jnp.float32)
            y = y.T
    if swiglu:
        gate, up = jnp.split(y, 2, axis=-1)
        y = jax.nn.silu(gate) * up
    if residual is not None:
        y = y + residual.astype(jnp.float32)
    return y.astype(out_dtype)


def _launch(p: SmallMPlan, arguments: dict[str, jax.Array], result: jax.ShapeDtypeStruct, interpret: Any) -> jax.Array:
    """The kernel's result: finished sums [rows, out], or float32 K splits: [k_splits, rows, out] from limbs, otherwise
    [k_splits, out, padded rows]."""
    x = arguments["x"]
    return plgpu.kernel(
        functools.partial(_block, names=tuple(arguments), p=p, dtype=x.dtype),
        out_type=result,
        scratch_types=(limb_scratch(p) if p.limbs else float_scratch(p, x.dtype, result.dtype),),
        grid=(p.blocks,),
        grid_names=("block",),
        num_threads=p.consumers + 1,
        thread_name="warpgroup",
        interpret=interpret,
        kernel_name="small_m_gemm",
    )(*arguments.values())


def _block(*refs: Any, names: tuple[str, ...], p: SmallMPlan, dtype: Any) -> None:
    """What one block does. ``refs`` are the arguments of these ``names``, the result and the scratch."""
    *arguments, out_ref, scratch = refs
    given = dict(zip(names, arguments, strict=True))
    # Without a stack there is no layer index to read, which the first copy would wait for.
    layer = given["layer"][0] if "layer" in given else 0
    block, me = lax.axis_index("block"), lax.axis_index("warpgroup")
    turns = (p.n_tiles * p.k_splits - block + p.blocks - 1) // p.blocks
    context = Block(p, dtype, me, block, turns, given["x"], given["w"], given.get("scale"), out_ref, layer)

    def consumer() -> None:
        if p.limbs:
            consume_limbs(context, scratch)
        else:
            consume_floats(context, scratch)

    warp_specialize(
        me,
        lambda: _produce(context, scratch),
        consumer,
        consumers=p.consumers,
        producer_registers=None if p.interpret else PRODUCER_REGISTERS,
    )


def _produce(block: Block, scratch: FloatScratch | LimbScratch) -> None:
    """Keep the ring full. Copies run ahead of the products, from one work tile into the next."""
    p, weights = block.plan, block.w.at[block.layer]
    rows = pl.ds(block.turns * 0, p.columns)  # JAX 0.12 refuses to copy past the end of x from a constant start
    x_ring = None if isinstance(scratch, LimbScratch) else scratch.x_ring  # limbs are made by the consumers

    def turn(t: Any, count: Any) -> Any:
        tile: WorkTile = block.work_tile(t)
        place = pl.ds(p.shift(tile.row), p.n_tile)

        def stage(i: Any, count: Any) -> Any:
            slot = acquire(count, p.depth, scratch.free)
            inputs = pl.ds(i * p.step, p.step)
            source = weights.at[pl.ds(tile.row, p.n_tile), inputs]
            plgpu.copy_gmem_to_smem(source, scratch.w_ring.at[slot, place], scratch.full.at[slot])
            if x_ring is not None:
                plgpu.copy_gmem_to_smem(block.x.at[rows, inputs], x_ring.at[slot], scratch.full.at[slot])
            return count + 1

        return lax.fori_loop(tile.start, tile.end, stage, count)

    drain(lax.fori_loop(0, block.turns, turn, jnp.int32(0)), p.depth, scratch.free)

"""Products for few rows (1 to 64): the weight is read once, at the speed of memory, by every multiprocessor.

The weight is cut into *pieces*: a strip of output rows over a range of the inputs. Every block takes the same number of
pieces, so the 132 blocks of an H200 are busy to 95 % or more whatever the shape, and no block waits for another. Where
the inputs are cut, the partial sums are added in one fixed order afterwards, in the operation that transposes the
(small) result, so the same arguments always give the same bits.

Where the inputs are not cut, as for most shapes, the kernel finishes its sums itself and no operation follows it.

Inside a block one warpgroup issues TMA copies into a ring of stages; the others take the stages in turn, each with
accumulators of its own, and add those up through shared memory when the piece is done. Against integer weights few rows
are multiplied as digits, see `small_m_limbs`.
"""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ...dispatch import Unsupported
from ...layer_view import layer_index
from ..common.ring import acquire, drain
from ..common.warp_specialize import consumer_registers
from ..common.tiles import (
    WGMMA_ROWS,
    Format,
    Weight,
    check_operands,
    data_and_scale,
    format_of,
    pad_rows_unless_short,
    sm_count,
    swizzled,
)
from ..common.widen import shuffle_inputs
from .small_m_consumer import consume
from .small_m_limbs import consume_integers, scratch_of
from .small_m_plan import MOST_ROWS_AS_DIGITS, Plan, SkinnyTiles, plan, tiles_for

MAX_ROWS = 64
PRODUCER_REGISTERS = 24


def check_skinny(x: jax.Array, w: Weight, *, tiles: SkinnyTiles | None = None) -> None:
    """Raise `Unsupported` where `skinny` cannot run; ``x`` is [rows, in]."""
    check_operands(x, w)
    fmt = format_of(w)
    rows, inner = x.shape
    out = w.shape[-2]
    tiles = tiles or tiles_for(fmt, out, inner, rows)
    if rows > MAX_ROWS:
        raise Unsupported(f"at most {MAX_ROWS} rows, found {rows}")
    if inner % tiles.step:
        raise Unsupported(f"{inner} inputs: must be a multiple of {tiles.step}")
    if out % 8 or (fmt.quantized and out < WGMMA_ROWS):
        raise Unsupported(f"{out} outputs: must be a multiple of 8" + ", at least 64" * fmt.quantized)
    if fmt.group is not None and tiles.step % fmt.group:
        raise Unsupported(f"groups of {fmt.group} inputs: must divide {tiles.step}")
    if tiles.digits and rows > MOST_ROWS_AS_DIGITS:
        raise Unsupported(f"digits of at most {MOST_ROWS_AS_DIGITS} rows, found {rows}")
    if tiles.digits and (not fmt.quantized or tiles.step % 128 or (fmt.group or 128) % 128):
        raise Unsupported("digits are for integer weights, one scale a row or for a multiple of 128 inputs")


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
    tiles = tiles or tiles_for(fmt, w.shape[-2], x.shape[1], x.shape[0])
    return _skinny(
        x,
        w,
        None if layer is None else layer_index(layer),
        residual,
        swiglu=swiglu,
        out_dtype=jnp.dtype(out_dtype or x.dtype),
        tiles=tiles,
        sms=sms or sm_count(),
        interpret=interpret,
    )


# Compiled as a function of its own: the layers of a model then share one trace and one lowering.
@functools.partial(jax.jit, static_argnames=("interpret", "out_dtype", "sms", "swiglu", "tiles"))
def _skinny(x: jax.Array, w: Weight, layer: jax.Array | None, residual: jax.Array | None, *, swiglu: bool,
            out_dtype: Any, tiles: SkinnyTiles, sms: int, interpret: Any) -> jax.Array:  # fmt: skip
    fmt = format_of(w)
    rows, inner = x.shape
    p = replace(plan(w.shape[-2], inner, rows, fmt, tiles, sms), interpret=bool(interpret))
    data, scale = data_and_scale(w)
    if not tiles.digits:
        x = pad_rows_unless_short(x, 0)
        x = shuffle_inputs(x) if fmt.quantized and not interpret else x
    arguments = {"layer": layer, "x": x, "w": data}
    if fmt.grouped or (fmt.quantized and (p.direct or tiles.digits)):
        arguments["scale"] = scale
    arguments = {name: a for name, a in arguments.items() if a is not None}
    # What follows a finished product, if anything, or what works on the small parts, is one XLA fusion.
    if p.direct:
        done = jax.ShapeDtypeStruct((rows, p.out), jnp.float32 if swiglu or residual is not None else out_dtype)
        y = _kernel(tuple(arguments), fmt, p, tiles, x.dtype, done, interpret)(*arguments.values())
    else:
        shape = (rows, p.out) if tiles.digits else (p.out, p.padded)
        done = jax.ShapeDtypeStruct((p.cuts, *shape), jnp.float32)
        parts = _kernel(tuple(arguments), fmt, p, tiles, x.dtype, done, interpret)(*arguments.values())
        y = functools.reduce(jnp.add, [parts[i] for i in range(p.cuts)])  # a fixed order
        if not tiles.digits:
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


def _kernel(names: tuple[str, ...], fmt: Format, p: Plan, tiles: SkinnyTiles, dtype: Any, done: jax.ShapeDtypeStruct,
            interpret: Any) -> Any:  # fmt: skip
    """The launch. It leaves finished sums [rows, out], or float32 parts: of digits [cuts, rows, out], else [cuts, out,
    padded rows]."""
    scratch = {
        "w_ring": swizzled((p.depth, p.height, tiles.step), fmt.dtype),
        "full": plgpu.Barrier(num_arrivals=1 if tiles.digits else 2, num_barriers=p.depth),
        "free": plgpu.Barrier(num_arrivals=1, num_barriers=p.depth),
    }
    scratch |= scratch_of(fmt, p, tiles) if tiles.digits else _scratch_of_floats(fmt, p, tiles, dtype, done)
    return plgpu.kernel(
        functools.partial(_body, names=names, fmt=fmt, p=p, tiles=tiles, dtype=dtype, interpret=interpret),
        out_type=done,
        scratch_types=scratch,
        grid=(p.blocks,),
        grid_names=("block",),
        num_threads=tiles.consumers + 1,
        thread_name="warpgroup",
        interpret=interpret,
        kernel_name="skinny_product",
    )


def _scratch_of_floats(fmt: Format, p: Plan, tiles: SkinnyTiles, dtype: Any, done: Any) -> dict[str, Any]:
    others = tiles.consumers - 1
    scratch = {
        "x_ring": swizzled((p.depth, p.columns, tiles.step), dtype, min_slice=fmt.group),
        "sums": plgpu.SMEM((max(1, others), p.height, p.columns), jnp.float32),
    }
    if others:
        scratch["summed"] = plgpu.Barrier(num_arrivals=others)
        scratch["stored"] = plgpu.Barrier(num_arrivals=1)
    if p.direct:
        scratch["turned"] = plgpu.SMEM((p.columns, p.height), jnp.float32)
        scratch["finished"] = plgpu.SMEM((p.columns, p.strip), done.dtype)
    if p.interpret and fmt.quantized:
        scratch["widened"] = swizzled((tiles.consumers, WGMMA_ROWS, tiles.step), dtype, min_slice=fmt.group)
    return scratch


def _body(*refs: Any, names: tuple[str, ...], fmt: Format, p: Plan, tiles: SkinnyTiles, dtype: Any, interpret: Any,
          **scratch: Any) -> None:  # fmt: skip
    *arguments, out_ref = refs
    given = dict(zip(names, arguments, strict=True))
    x_ref, w_ref, scale_ref = given["x"], given["w"], given.get("scale")
    layer = given["layer"][0] if "layer" in given else 0  # a number that the first copy would wait for
    block, me = lax.axis_index("block"), lax.axis_index("warpgroup")
    turns = (p.strips * p.cuts - block + p.blocks - 1) // p.blocks

    def piece(turn: Any) -> tuple[Any, Any, Any, Any]:
        """First row, cut, first step and end of the piece that this block takes at this turn."""
        index = turn * p.blocks + block
        strip, cut = index // p.cuts, lax.rem(index, p.cuts)
        # The last strip is moved up where it would pass the end: two blocks then write the same values there.
        row = pl.multiple_of(jnp.minimum(strip * p.strip, p.out - p.strip), 8)
        return row, cut, cut * p.steps // p.cuts, (cut + 1) * p.steps // p.cuts

    @pl.when(me == tiles.consumers)
    def _() -> None:
        if tiles.consumers > 1 and not interpret:
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        _produce(x_ref, w_ref.at[layer], turns, piece, p, tiles.step, **scratch)

    @pl.when(me < tiles.consumers)
    def _() -> None:
        if tiles.consumers > 1 and not interpret:
            plgpu.set_max_registers(consumer_registers(tiles.consumers, PRODUCER_REGISTERS), action="increase")
        scales = None if scale_ref is None else scale_ref.at[layer]
        if tiles.digits:
            consume_integers(me, x_ref, scales, out_ref, turns, piece, fmt, p, tiles, **scratch)
        else:
            consume(me, scales, out_ref, turns, piece, fmt, p, tiles, dtype, **scratch)


def _produce(x_ref: Any, w_ref: Any, turns: Any, piece: Any, p: Plan, step: int, *, w_ring: Any, full: Any,
             free: Any, x_ring: Any = None, **_: Any) -> None:  # fmt: skip
    """Keep the ring full; digits of x are not in it. Copies run ahead of the sums, across pieces too."""
    rows = pl.ds(turns * 0, p.columns)  # JAX 0.12 refuses more rows than there are where they start at a constant

    def turn(t: Any, count: Any) -> Any:
        row, _, start, end = piece(t)
        place = pl.ds(p.shift(row), p.strip)

        def stage(i: Any, count: Any) -> Any:
            slot = acquire(count, p.depth, free)
            inputs = pl.ds(i * step, step)
            plgpu.copy_gmem_to_smem(w_ref.at[pl.ds(row, p.strip), inputs], w_ring.at[slot, place], full.at[slot])
            if x_ring is not None:
                plgpu.copy_gmem_to_smem(x_ref.at[rows, inputs], x_ring.at[slot], full.at[slot])
            return count + 1

        return lax.fori_loop(start, end, stage, count)

    drain(lax.fori_loop(0, turns, turn, jnp.int32(0)), p.depth, free)

"""Medium-M GEMM: products for 9 to 256 rows of x. The weight is read once, at the speed of memory, by every SM.

The output is divided into work tiles: an N tile over one K split (see `medium_m_plan`). Inside a block the producer
warpgroup copies stages of weights and of x into a ring by TMA. Every consumer multiplies some rows of each stage: of x
with float weights, of the weight with integers. So nothing is added up between consumers, and the kernel writes
finished rows: [rows, out] in the result's dtype, after SwiGLU where it is asked for. With K splits it writes float32
sums [k_splits, rows, out], for a kernel or a fusion that adds them in a fixed order. So the same arguments always give
the same bits.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ...arch import planned
from ...dispatch import Unsupported
from ...layer_view import layer_index
from ...split_rows import SplitRows
from ..common.ring import acquire, drain
from ..common.tiles import Weight, check_operands, data_and_scale, format_of, pad_rows
from ..common.warp_specialize import warp_specialize
from .medium_m_block import Block, scratch_of
from .medium_m_consumer import consume
from .medium_m_plan import PRODUCER_REGISTERS, MediumMPlan, MediumMProblem, MediumMTiles, check_problem, make_plan

MEDIUM_M_MAX = 256  # rows


def check_medium_m(x: jax.Array, w: Weight, *, swiglu: bool = False) -> None:
    """Raise `Unsupported` where `medium_m_gemm` cannot run; ``x`` is [rows, in]."""
    check_operands(x, w)
    if x.shape[0] > MEDIUM_M_MAX:
        raise Unsupported(f"at most {MEDIUM_M_MAX} rows, found {x.shape[0]}")
    check_problem(_problem(x, w, swiglu, x.dtype), planned().sms)


def medium_m_gemm(
    x: jax.Array | SplitRows,
    w: Weight,
    *,
    layer: jax.Array | int | None = None,
    residual: jax.Array | None = None,
    swiglu: bool = False,
    out_dtype: Any = None,
    **options: Any,
) -> jax.Array:
    """x [rows, in] · w [out, in] -> [rows, out] (+ residual), or silu(gate) * up of w [2 * out, in] with ``swiglu``.

    With ``layer``, w is stacked [layers, out, in] and read in place. If x is `SplitRows`, w is int8 with one scale a
    row, and multiplies its limbs. ``options`` are those of `medium_m_sums`.
    """
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    y = medium_m_sums(x, w, layer=layer, swiglu=swiglu, out_dtype=out_dtype, splittable=False, **options)
    if y.shape[0] > 1 or residual is not None:  # one fusion, with the K splits in a fixed order
        y = functools.reduce(jnp.add, [y[i].astype(jnp.float32) for i in range(y.shape[0])])
        y = y if residual is None else y + residual.astype(jnp.float32)
        return y.astype(out_dtype)
    return y[0]


def medium_m_sums(
    x: jax.Array | SplitRows,
    w: Weight,
    *,
    layer: jax.Array | int | None = None,
    swiglu: bool = False,
    out_dtype: Any = jnp.float32,
    splittable: bool = True,
    tiles: MediumMTiles | None = None,
    sms: int | None = None,
    interpret: Any = False,
) -> jax.Array:
    """The product [k_splits, rows, out] in float32 K splits, or without them, finished in ``out_dtype``. If it is not
    ``splittable``, the plan avoids K splits."""
    problem = _problem(x, w, swiglu, out_dtype, splittable)
    p = make_plan(problem, tiles, sms or planned().sms, interpret=bool(interpret))
    x, x_scale = (_padded_limbs(x), pad_rows(x.scale, 0)) if isinstance(x, SplitRows) else (pad_rows(x, 0), None)
    return _launch(x, x_scale, w, None if layer is None else layer_index(layer), p=p, interpret=interpret)


def _padded_limbs(x: SplitRows) -> jax.Array:
    """The limbs [2 * rows, in], those of the upper limbs first, of rows up to a multiple of 8."""
    return pad_rows(x.limbs, 1).reshape(-1, x.shape[-1])


def _problem(
    x: jax.Array | SplitRows, w: Weight, swiglu: bool, out_dtype: Any, splittable: bool = False
) -> MediumMProblem:
    limbs = isinstance(x, SplitRows)
    return MediumMProblem(
        fmt=format_of(w),
        rows=x.shape[0],
        inner=x.shape[1],
        out=w.shape[-2],
        swiglu=swiglu,
        dtype=jnp.dtype(jnp.int8 if limbs else x.dtype),
        out_dtype=jnp.dtype(out_dtype),
        splittable=splittable,
        limbs=limbs,
    )


# A jit of its own: all layers of a model share one trace and one lowering.
@functools.partial(jax.jit, static_argnames=("p", "interpret"))
def _launch(
    x: jax.Array, x_scale: jax.Array | None, w: Weight, layer: jax.Array | None, *, p: MediumMPlan, interpret: Any
) -> jax.Array:
    data, scale = data_and_scale(w)
    arguments = {"layer": layer, "x": x, "x_scale": x_scale, "w": data, "scale": scale}
    arguments = {name: a for name, a in arguments.items() if a is not None}
    problem = p.problem
    return plgpu.kernel(
        functools.partial(_block, names=tuple(arguments), p=p),
        out_type=jax.ShapeDtypeStruct((p.k_splits, problem.rows, problem.outputs), p.result_dtype),
        scratch_types=(scratch_of(p),),
        grid=(p.blocks,),
        grid_names=("block",),
        num_threads=p.consumers + 1,
        thread_name="warpgroup",
        interpret=interpret,
        compiler_params=None if interpret else plgpu.CompilerParams(approx_math=True),
        kernel_name="medium_m_gemm",
    )(*arguments.values())


def _block(*refs: Any, names: tuple[str, ...], p: MediumMPlan) -> None:
    """What one block does. ``refs`` are the arguments of these ``names``, the result and the scratch."""
    *arguments, out_ref, scratch = refs
    given = dict(zip(names, arguments, strict=True))
    # Without a stack there is no layer index to read, which the first copy would wait for.
    layer = given["layer"][0] if "layer" in given else 0
    scale = given["scale"].at[layer] if "scale" in given else None
    me = lax.axis_index("warpgroup")
    x, x_scale = given["x"], given.get("x_scale")
    block = Block(p, me, lax.axis_index("block"), x, x_scale, given["w"].at[layer], scale, out_ref, scratch)
    warp_specialize(
        me,
        lambda: _produce(block),
        lambda: consume(block),
        consumers=p.consumers,
        producer_registers=None if p.interpret else PRODUCER_REGISTERS,
    )


def _produce(block: Block) -> None:
    """Keep the ring full. Copies run ahead of the products, from one work tile into the next."""
    p, scratch = block.plan, block.scratch

    def turn(t: Any, count: Any) -> Any:
        tile = block.work_tile(t)

        def stage(i: Any, count: Any) -> Any:
            slot = acquire(count, p.depth, scratch.free)
            inputs, full = pl.ds(i * p.step, p.step), scratch.full.at[slot]
            for projection in range(p.n_tile // p.n_out):
                source = block.w.at[pl.ds(projection * p.problem.outputs + tile.out, p.n_out), inputs]
                place = scratch.w_ring.at[slot, pl.ds(projection * p.n_out, p.n_out)]
                plgpu.copy_gmem_to_smem(source, place, full)
            plgpu.copy_gmem_to_smem(block.x.at[:, inputs], scratch.x_ring.at[slot, pl.ds(0, p.problem.x_rows)], full)
            return count + 1

        return lax.fori_loop(tile.start, tile.end, stage, count)

    drain(lax.fori_loop(0, block.turns, turn, jnp.int32(0)), p.depth, scratch.free)

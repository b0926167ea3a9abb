"""Products for many rows (prefill): tiles of the result, kept busy by a pipeline of TMA copies and two consumers.

The blocks are persistent: each works through a list of tiles, and the warpgroup that copies runs ahead of the two that
multiply, across tiles too, so the tensor cores wait only while a finished tile is written. Integer weights are widened
in registers on their way to wgmma, so prefill needs no float copy of them. With ``swiglu`` the tile holds the rows of
w_gate and of w_up that belong together, and only their product ever reaches memory.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ...layer_view import layer_index
from ..common.ring import acquire, drain
from ..common.tiles import (
    SHARED_BYTES,
    Weight,
    data_and_scale,
    format_of,
    nbytes,
    sm_count,
    swizzled,
)
from .large_m_consumer import consume
from .large_m_plan import CONSUMERS, Pass, Problem, Refs, WideTiles, check_wide, passes, tiles_for

__all__ = ["WideTiles", "check_wide", "wide"]


def wide(
    x: jax.Array,
    w: Weight,
    *,
    layer: jax.Array | int | None = None,
    residual: jax.Array | None = None,
    swiglu: bool = False,
    out_dtype: Any = None,
    tiles: WideTiles | None = None,
    sms: int | None = None,
    interpret: Any = False,
) -> jax.Array:
    """x [rows, in] · w [out, in] -> [rows, out] (+ residual), or silu(gate) * up of w [2 * out, in] with ``swiglu``.

    With ``layer``, w is stacked [layers, out, in] and read in place.
    """
    out, sms = w.shape[-2] // (2 if swiglu else 1), sms or sm_count()
    tiles = tiles or tiles_for(format_of(w), x.shape[0], out, swiglu, sms)
    if residual is not None and (swiglu or tiles.by_rows or tiles.out != CONSUMERS * tiles.step):
        raise ValueError(f"a residual needs tiles of {CONSUMERS} * step outputs, halved by outputs; found {tiles}")
    return _wide(
        x,
        w,
        layer_index(layer),
        residual,
        swiglu=swiglu,
        out_dtype=jnp.dtype(out_dtype or x.dtype),
        tiles=tiles,
        sms=sms,
        interpret=interpret,
    )


# Compiled as a function of its own: the layers of a model then share one trace and one lowering.
@functools.partial(jax.jit, static_argnames=("interpret", "out_dtype", "sms", "swiglu", "tiles"))
def _wide(x: jax.Array, w: Weight, layer: jax.Array, residual: jax.Array | None, *, swiglu: bool, out_dtype: Any,
          tiles: WideTiles, sms: int, interpret: Any) -> jax.Array:  # fmt: skip
    rows, padded = x.shape[0], whole_tiles(x, tiles)
    problem = Problem(
        fmt=format_of(w),
        rows=padded.shape[0],
        inner=x.shape[1],
        out=w.shape[-2] // (2 if swiglu else 1),
        dtype=x.dtype,
        out_dtype=out_dtype,
        swiglu=swiglu,
        residual=residual is not None,
    )
    data, scale = data_and_scale(w)
    residual = None if residual is None else whole_tiles(residual, tiles)
    arguments = {"layer": layer, "x": padded, "w": data, "scale": scale, "residual": residual}
    return launch(problem, tiles, sms, interpret, arguments)[:rows]


def whole_tiles(x: jax.Array, tiles: WideTiles) -> jax.Array:
    """x with zero rows behind, so that no tile has too few."""
    return jnp.pad(x, ((0, -x.shape[0] % tiles.rows), (0, 0)))


def launch(problem: Problem, tiles: WideTiles, sms: int, interpret: Any, arguments: dict[str, Any]) -> jax.Array:
    """The product of what is named ``x`` and ``w`` in ``arguments``, of which those that are None are left out."""
    arguments = {name: a for name, a in arguments.items() if a is not None}
    fmt = problem.fmt
    size = 2 if tiles.pair else 1
    plan = passes(problem, tiles, sms // size)
    units = min(sms // size, max(p.count for p in plan))
    part = tiles.part
    finished = (2, CONSUMERS, tiles.chunk, part)
    stage = nbytes((problem.heads * tiles.out, tiles.step), fmt.bits) + nbytes((tiles.rows, tiles.step), 16)
    room = SHARED_BYTES - 2048 - nbytes(finished, 8 * jnp.dtype(problem.out_dtype).itemsize)
    trade = tiles.trade or problem.rotary is not None
    room -= nbytes(finished, 16) if trade else 0
    depth = min(tiles.depth, room // stage)
    scratch = {
        "w_ring": swizzled((depth, problem.heads * tiles.out, tiles.step), fmt.dtype),
        "x_ring": swizzled((depth, tiles.rows, tiles.step), problem.dtype, min_slice=fmt.group),
        # A cache is written from any row on: then tiles of single rows.
        "finished": swizzled(finished, problem.out_dtype, rows=1 if problem.rotary else 8),
        "full": plgpu.Barrier(num_arrivals=problem.heads + 1, num_barriers=depth),
        "free": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=depth),
    }
    if tiles.pair:  # what one block fetches lands in both: both must have room
        scratch["free"] = plgpu.ClusterBarrier(collective_axes=("member",), num_arrivals=CONSUMERS, num_barriers=depth)
    if trade:
        scratch["traded"] = swizzled((CONSUMERS, 2 * part, tiles.chunk), problem.dtype)
        scratch["given"] = plgpu.Barrier(num_barriers=2 * CONSUMERS)
        scratch["taken"] = plgpu.Barrier(num_barriers=2 * CONSUMERS)
    if interpret and fmt.quantized:
        scratch["widened"] = swizzled((CONSUMERS, problem.heads * part, tiles.step), problem.dtype, min_slice=fmt.group)
    return plgpu.kernel(
        functools.partial(
            _body,
            names=(*arguments, "out"),
            problem=problem,
            tiles=tiles,
            plan=plan,
            units=units,
            depth=depth,
            registers=not interpret,
        ),
        out_type=jax.ShapeDtypeStruct((problem.rows, problem.columns), problem.out_dtype),
        scratch_types=scratch,
        grid=(units,),
        grid_names=("unit",),
        cluster=(size,),
        cluster_names=("member",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        interpret=interpret,
        compiler_params=None if interpret else plgpu.CompilerParams(approx_math=True),
        kernel_name="wide_qkv" if problem.rotary else "wide_product",
    )(*arguments.values())


def _body(*arguments: Any, names: tuple[str, ...], problem: Problem, tiles: WideTiles, plan: list[Pass], units: int,
          depth: int, registers: bool, **scratch: Any) -> None:  # fmt: skip
    refs = dict(zip(names, arguments, strict=True))
    layer = refs["layer"][0]
    refs |= {name: refs[name].at[layer] for name in ("w", "scale") if name in refs}
    unit, me = lax.axis_index("unit"), lax.axis_index("warpgroup")
    size = 2 if tiles.pair else 1
    member = lax.axis_index("member") if tiles.pair else 0
    grid = (problem.rows // tiles.rows, problem.out // tiles.out // size)

    def tile(p: Pass, turn: Any) -> tuple[Any, Any]:
        """First row and first output of the tile that this block computes at this turn of a pass."""
        index = p.first + turn * units + unit
        row, out = plgpu.planar_snake(index // p.parts, grid, 0, min(tiles.band, grid[0]))
        return row * tiles.rows + lax.rem(index, p.parts) * p.tiles.rows, (out * size + member) * tiles.out

    def each_pass(work: Callable[..., None]) -> Any:
        """Do ``work`` on the tiles of every pass; returns how many stages of the ring that took."""
        done = jnp.int32(0)
        for p in plan:
            turns = (p.count - unit + units - 1) // units
            work(turns, done, functools.partial(tile, p), p.tiles)
            done += turns * problem.stages(tiles)
        return done

    @pl.when(me == CONSUMERS)
    def _() -> None:
        if registers:
            plgpu.set_max_registers(40, action="decrease")
        done = each_pass(functools.partial(_produce, refs, problem, depth, **scratch))
        drain(done, depth, scratch["free"])

    @pl.when(me < CONSUMERS)
    def _() -> None:
        if registers:
            plgpu.set_max_registers(232, action="increase")
        each_pass(functools.partial(consume, me, refs, problem, depth, **scratch))
        plgpu.wait_smem_to_gmem(0)


def _produce(refs: Refs, problem: Problem, depth: int, turns: Any, done: Any, tile: Any, tiles: WideTiles, *,
             w_ring: Any, x_ring: Any, full: Any, free: Any, **_: Any) -> None:  # fmt: skip
    """Keep the ring full, across tiles. What is to be added to a tile travels behind its inputs, in the same ring."""
    steps, stages = problem.inner // tiles.step, problem.stages(tiles)
    rows, half = pl.ds(0, tiles.rows), tiles.rows // 2

    def turn(t: Any, _: Any) -> None:
        row, out = tile(t)

        def next_slot(k: Any) -> Any:
            return acquire(done + t * stages + k, depth, free)

        def stage(k: Any, _: Any) -> None:
            slot = next_slot(k)
            inputs = pl.ds(k * tiles.step, tiles.step)
            plgpu.copy_gmem_to_smem(
                refs["x"].at[pl.ds(row, tiles.rows), inputs],
                x_ring.at[slot, rows],
                full.at[slot],
                collective_axes="member" if tiles.pair else None,
            )
            for head in range(problem.heads):
                plgpu.copy_gmem_to_smem(
                    refs["w"].at[pl.ds(head * problem.out + out, tiles.out), inputs],
                    w_ring.at[slot, pl.ds(head * tiles.out, tiles.out)],
                    full.at[slot],
                )

        lax.fori_loop(0, steps, stage, None)
        for j in range(problem.behind(tiles)):
            slot = next_slot(steps + j)
            for part in range(2):  # as many copies as a stage of inputs has, for the barrier counts them
                plgpu.copy_gmem_to_smem(
                    refs["residual"].at[pl.ds(row + part * half, half), pl.ds(out + j * tiles.step, tiles.step)],
                    x_ring.at[slot, pl.ds(part * half, half)],
                    full.at[slot],
                )

    lax.fori_loop(0, turns, turn, None)

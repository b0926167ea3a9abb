"""Large-M GEMM: products for many rows (prefill). A TMA producer keeps two consumer warpgroups busy.

The blocks are persistent: each works through a list of tiles. The producer runs ahead of the consumers, from one tile
into the next, so the tensor cores wait only while a finished tile is written. Integer weights are widened in registers
on their way to wgmma, so prefill needs no float copy of them. With ``swiglu`` a tile holds the rows of w_gate and of
w_up that belong together, and only their product reaches memory.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ...arch import planned
from ...layer_view import layer_index
from ..common.ring import acquire, drain
from ..common.tiles import Weight, data_and_scale, format_of, nbytes, swizzled
from ..common.warp_specialize import warp_specialize
from .large_m_block import Block, Operands, PassWork, Scratch
from .large_m_consumer import consume
from .large_m_plan import CONSUMERS, LargeMProblem, LargeMTiles, Pass, check_large_m, passes, tiles_for

__all__ = ["LargeMTiles", "check_large_m", "large_m_gemm"]

PRODUCER_REGISTERS = 40
SCRATCH_RESERVE = 2048  # bytes of shared memory for barriers, and for scratch that the compiler adds


def large_m_gemm(
    x: jax.Array,
    w: Weight,
    *,
    layer: jax.Array | int | None = None,
    residual: jax.Array | None = None,
    swiglu: bool = False,
    out_dtype: Any = None,
    tiles: LargeMTiles | None = None,
    sms: int | None = None,
    interpret: Any = False,
) -> jax.Array:
    """x [rows, in] · w [out, in] -> [rows, out] (+ residual), or silu(gate) * up of w [2 * out, in] with ``swiglu``.

    With ``layer``, w is stacked [layers, out, in] and read in place.
    """
    out, sms = w.shape[-2] // (2 if swiglu else 1), sms or planned().sms
    tiles = tiles or tiles_for(format_of(w), x.shape[0], out, swiglu, sms)
    if residual is not None and (swiglu or tiles.split_rows or tiles.out != CONSUMERS * tiles.step):
        raise ValueError(f"a residual needs tiles of {CONSUMERS} * step outputs, halved by outputs; found {tiles}")
    return _large_m_gemm(
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


# A jit of its own: all layers of a model share one trace and one lowering.
@functools.partial(jax.jit, static_argnames=("interpret", "out_dtype", "sms", "swiglu", "tiles"))
def _large_m_gemm(x: jax.Array, w: Weight, layer: jax.Array, residual: jax.Array | None, *, swiglu: bool,
                  out_dtype: Any, tiles: LargeMTiles, sms: int, interpret: Any) -> jax.Array:  # fmt: skip
    rows, padded = x.shape[0], pad_to_tiles(x, tiles)
    problem = LargeMProblem(
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
    residual = None if residual is None else pad_to_tiles(residual, tiles)
    arguments = {"layer": layer, "x": padded, "w": data, "scale": scale, "residual": residual}
    return launch(problem, tiles, sms, interpret, arguments)[:rows]


def pad_to_tiles(x: jax.Array, tiles: LargeMTiles) -> jax.Array:
    """``x`` with zero rows at the end, so that all tiles are whole."""
    missing = -x.shape[0] % tiles.rows
    return jnp.pad(x, ((0, missing), (0, 0))) if missing else x


def launch(
    problem: LargeMProblem, tiles: LargeMTiles, sms: int, interpret: Any, arguments: dict[str, jax.Array | None]
) -> jax.Array:
    """Run the kernel. ``arguments`` are ``layer`` and the fields of `Operands` by name; those that are None are not
    passed."""
    given = {name: a for name, a in arguments.items() if a is not None}
    pass_list = passes(problem, tiles, sms // tiles.cluster)
    units = min(sms // tiles.cluster, max(p.count for p in pass_list))
    scratch, depth = _scratch(problem, tiles, interpret)
    return plgpu.kernel(
        functools.partial(
            _block,
            names=(*given, "out"),
            problem=problem,
            tiles=tiles,
            pass_list=pass_list,
            units=units,
            depth=depth,
            interpret=bool(interpret),
        ),
        out_type=jax.ShapeDtypeStruct((problem.rows, problem.columns), problem.out_dtype),
        scratch_types=(scratch,),
        grid=(units,),
        grid_names=("unit",),
        cluster=(tiles.cluster,),
        cluster_names=("member",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        interpret=interpret,
        compiler_params=None if interpret else plgpu.CompilerParams(approx_math=True),
        kernel_name="large_m_qkv" if problem.rotary else "large_m_gemm",
    )(*given.values())


def _scratch(problem: LargeMProblem, tiles: LargeMTiles, interpret: Any) -> tuple[Scratch, int]:
    """Shared memory and barriers of a block, and how many stages the ring has."""
    fmt, projections = problem.fmt, problem.projections
    finished = (2, CONSUMERS, tiles.chunk, tiles.consumer_out)
    exchange = tiles.exchange or problem.rotary is not None
    stage = nbytes((projections * tiles.out, tiles.step), fmt.bits) + nbytes((tiles.rows, tiles.step), 16)
    room = planned().shared_bytes - SCRATCH_RESERVE - nbytes(finished, 8 * jnp.dtype(problem.out_dtype).itemsize)
    room -= nbytes(finished, 16) if exchange else 0
    depth = min(tiles.depth, room // stage)
    widened = (CONSUMERS, projections * tiles.consumer_out, tiles.step)
    free: Any = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=depth)
    if tiles.pair:  # a copy of one block arrives in both, so both must have room
        free = plgpu.ClusterBarrier(collective_axes=("member",), num_arrivals=CONSUMERS, num_barriers=depth)
    scratch = Scratch(
        # Rows of the cache are written from any row on: that needs shared memory tiles of single rows.
        finished=swizzled(finished, problem.out_dtype, rows=1 if problem.rotary else 8),
        free=free,
        full=plgpu.Barrier(num_arrivals=projections + 1, num_barriers=depth),
        sent=plgpu.Barrier(num_barriers=2 * CONSUMERS) if exchange else None,
        received=plgpu.Barrier(num_barriers=2 * CONSUMERS) if exchange else None,
        exchanged=swizzled((CONSUMERS, 2 * tiles.consumer_out, tiles.chunk), problem.dtype) if exchange else None,
        w_ring=swizzled((depth, projections * tiles.out, tiles.step), fmt.dtype),
        widened=swizzled(widened, problem.dtype, fmt.group) if interpret and fmt.quantized else None,
        x_ring=swizzled((depth, tiles.rows, tiles.step), problem.dtype, fmt.group),
    )
    return scratch, depth


def _block(*arguments: Any, names: tuple[str, ...], problem: LargeMProblem, tiles: LargeMTiles, pass_list: list[Pass],
           units: int, depth: int, interpret: bool) -> None:  # fmt: skip
    """What one block does. ``arguments`` are references of these ``names``, then the scratch."""
    *given, scratch = arguments
    refs = dict(zip(names, given, strict=True))
    layer = refs.pop("layer")[0]
    refs |= {name: refs[name].at[layer] for name in ("w", "scale") if name in refs}
    unit, me = lax.axis_index("unit"), lax.axis_index("warpgroup")
    member = lax.axis_index("member") if tiles.pair else 0
    block = Block(problem, tiles, pass_list, units, depth, me, unit, member, Operands(**refs), scratch)

    def consumer() -> None:
        block.each_pass(functools.partial(consume, block))
        plgpu.wait_smem_to_gmem(0)

    warp_specialize(
        me,
        lambda: drain(block.each_pass(functools.partial(_produce, block)), depth, scratch.free),
        consumer,
        consumers=CONSUMERS,
        producer_registers=None if interpret else PRODUCER_REGISTERS,
    )


def _produce(block: Block, work: PassWork) -> None:
    """Keep the ring full, from one tile into the next. The residual of a tile follows its inputs in the same ring."""
    problem, operands, scratch, tiles = block.problem, block.operands, block.scratch, work.tiles
    steps, stages = problem.inner // tiles.step, problem.stages(tiles)
    rows, half = pl.ds(0, tiles.rows), tiles.rows // 2

    def turn(t: Any, _: Any) -> None:
        row, out = work.tile(t)

        def next_slot(k: Any) -> Any:
            return acquire(work.done + t * stages + k, block.depth, scratch.free)

        def stage(k: Any, _: Any) -> None:
            slot = next_slot(k)
            inputs = pl.ds(k * tiles.step, tiles.step)
            plgpu.copy_gmem_to_smem(
                operands.x.at[pl.ds(row, tiles.rows), inputs],
                scratch.x_ring.at[slot, rows],
                scratch.full.at[slot],
                collective_axes="member" if tiles.pair else None,
            )
            for projection in range(problem.projections):
                plgpu.copy_gmem_to_smem(
                    operands.w.at[pl.ds(projection * problem.out + out, tiles.out), inputs],
                    scratch.w_ring.at[slot, pl.ds(projection * tiles.out, tiles.out)],
                    scratch.full.at[slot],
                )

        lax.fori_loop(0, steps, stage, None)
        for j in range(problem.residual_stages(tiles)):
            slot = next_slot(steps + j)
            for part in range(2):  # the barrier counts copies: as many as a stage of inputs has
                plgpu.copy_gmem_to_smem(
                    operands.residual.at[pl.ds(row + part * half, half), pl.ds(out + j * tiles.step, tiles.step)],
                    scratch.x_ring.at[slot, pl.ds(part * half, half)],
                    scratch.full.at[slot],
                )

    lax.fori_loop(0, work.turns, turn, None)

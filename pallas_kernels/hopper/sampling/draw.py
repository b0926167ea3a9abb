"""Sampling in one launch: a block, or a cluster of blocks, holds one row of logits in registers and finds each cut-off
by bisection.

XLA needs about thirty launches for the same. Here a pass over the row costs its arithmetic and one barrier.
Neighbouring numbers belong to one thread, and neighbouring threads to one warp. So a token is found by the sums of the
warps, then by those of a warp's lanes, then among the numbers of one thread.

A number's *mass* is its probability relative to the largest one: exp((logit - max) / temperature).
"""

import functools
import itertools
import operator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ...dispatch import Unsupported
from ..common.thread_ops import WARPGROUP_SIZE
from .split import LARGEST, WARP_SIZE, WARPS, RowSplit, split_row
from .warps import Warps

MIN_MASS = 1e-36  # smaller masses are never kept by a cut
GREEDY_INVERSE_TEMPERATURE = 3e38  # only the largest logit keeps any mass

Ref = Any  # Pallas has no public type for a reference


def skip_reason(logits: jax.Array, u: jax.Array | None, **_: Any) -> str | None:
    """Why XLA draws from such logits, if it does."""
    if u is None:
        return "greedy: the largest logit is one reduction"
    vocab = logits.shape[-1]
    if split_row(vocab) is None:
        return (
            f"a vocabulary of {vocab}: the kernel holds a row in registers, in lines of {WARPGROUP_SIZE} tokens, "
            f"{LARGEST} at most; XLA draws from any"
        )
    return None


def check_draw(logits: jax.Array, *_: Any, **__: Any) -> None:
    """Raise `Unsupported` where `draw_rows` cannot run."""
    if logits.dtype != jnp.float32:
        raise Unsupported(f"logits must be float32, found {logits.dtype}")


def draw_rows(
    logits: jax.Array,
    u: jax.Array,
    *,
    temperature: jax.Array,
    split: RowSplit | None = None,  # None: `split_row`
    interpret: Any = False,
    **cuts: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """A token of every row [B], and its log-probability [B]: see `draw_reference`."""
    given = {name: cut for name, cut in cuts.items() if cut is not None}
    rows, vocab = logits.shape
    split = split or split_row(vocab)
    assert split is not None
    assert 0 <= split.repeated(vocab) < split.numbers
    cluster = split.blocks > 1
    held, groups = split.warpgroups * split.numbers, split.blocks * split.warpgroups
    out = [jax.ShapeDtypeStruct((rows,), dtype) for dtype in (jnp.int32, jnp.float32)]
    if cluster and interpret:
        out.append(jax.ShapeDtypeStruct((rows, 2, groups, WARPS), jnp.float32))  # see `warps`
    token, logprob, *_ = plgpu.kernel(
        functools.partial(_body, names=tuple(given), split=split, interpret=bool(interpret)),
        out_type=out,
        grid=(rows,),
        grid_names=("row",),
        cluster=(split.blocks,) if cluster else (),
        cluster_names=("block",) if cluster else (),
        num_threads=split.warpgroups,
        thread_name="warpgroup",
        scratch_types=(
            Scratch(
                lane_sums=plgpu.SMEM((split.warps, WARP_SIZE), jnp.float32),
                loaded=plgpu.Barrier(num_barriers=split.warpgroups),
                numbers=plgpu.SMEM((held, WARPGROUP_SIZE), jnp.float32),
                sums=plgpu.SMEM((2, groups, WARPS), jnp.float32),
                summed=plgpu.ClusterBarrier(collective_axes=("block",), num_arrivals=split.warpgroups, num_barriers=2)
                if cluster
                else plgpu.Barrier(num_arrivals=split.warpgroups),
            ),
        ),
        interpret=interpret,
        kernel_name="draw_rows",
    )(logits.reshape(rows, vocab // WARPGROUP_SIZE, WARPGROUP_SIZE), u, temperature, *given.values())
    return token, logprob


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scratch:
    """Shared memory and barriers of a block. Pallas lays them out in the order of the fields."""

    lane_sums: Ref  # [warps, WARP_SIZE]
    loaded: Ref  # a barrier a warpgroup: its logits have arrived
    numbers: Ref  # [numbers of all warpgroups, WARPGROUP_SIZE]: the logits, then the masses
    sums: Ref  # [2, warpgroups of the row, WARPS], see `Warps`
    summed: Ref  # barrier of all warpgroups of the row: `sums` are written; in a cluster two


def _body(logits_ref: Ref, u_ref: Ref, temperature_ref: Ref, *refs: Any, names: tuple[str, ...], split: RowSplit,
          interpret: bool) -> None:  # fmt: skip
    """One row, or a block's part of it. ``refs``: the cuts of these ``names``, the token, its log-probability, in the
    interpreter of a cluster what its blocks exchange, the scratch."""
    cut_refs, (token_ref, logprob_ref, *exchanged, scratch) = refs[: len(names)], refs[len(names) :]
    row, me = lax.axis_index("row"), lax.axis_index("warpgroup")
    block = lax.axis_index("block") if split.blocks > 1 else 0
    cuts = {name: ref[row] for name, ref in zip(names, cut_refs, strict=True)}
    sums = exchanged[0].at[row] if exchanged else scratch.sums
    warps = Warps(split, me, block, sums, scratch.summed, interpret)
    repeated = split.repeated(logits_ref.shape[1] * WARPGROUP_SIZE)
    # Lines at the start of this warpgroup's part that belong to the part before: none but in the last part.
    masked = jnp.where(block * split.warpgroups + me == split.blocks * split.warpgroups - 1, repeated, 0)
    first_line = (block * split.warpgroups + me) * split.numbers - masked
    mine = scratch.numbers.at[pl.ds(me * split.numbers, split.numbers)]
    shape = (WARPS, WARP_SIZE, split.numbers)

    plgpu.copy_gmem_to_smem(logits_ref.at[row, pl.ds(first_line, split.numbers)], mine, scratch.loaded.at[me])
    plgpu.barrier_wait(scratch.loaded.at[me])
    if interpret:  # the interpreter reshapes arrays, but not references
        logits = mine[...].reshape(shape)
    else:
        logits = plgpu.load(mine.reshape(shape), layout=split.layout, optimized=False)
    if repeated:
        warp, lane, number = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(3))
        place = (warp * WARP_SIZE + lane) * split.numbers + number
        logits = jnp.where(place >= masked * WARPGROUP_SIZE, logits, -jnp.inf)

    top = warps.largest(0, logits)
    log_total = jnp.log(warps.total(1, jnp.exp(logits - top)))
    # At temperature 0 only the largest logit has any mass, and u = 0 takes the first of equal ones.
    temperature = temperature_ref[row]
    u = jnp.where(temperature > 0, u_ref[row], 0.0)
    inverse_temperature = jnp.where(temperature > 0, 1 / jnp.maximum(temperature, 1e-6), GREEDY_INVERSE_TEMPERATURE)
    time, mass = _cut(warps, jnp.int32(2), jnp.exp((logits - top) * inverse_temperature), cuts)

    if interpret:
        mine[...] = mass.reshape(mine.shape)
    else:
        mine.reshape(shape)[...] = mass
    by_lane = mass.sum(axis=2)
    scratch.lane_sums.at[pl.ds(me * WARPS, WARPS)][...] = by_lane
    by_warp = warps.all_of(time, by_lane.sum(axis=1))

    found, wanted = _passing(by_warp, u * functools.reduce(operator.add, by_warp))
    # In a cluster, the block that has this warp finds the token. The others go on with their first warp, and drop it.
    here = lax.div(found, split.warps) == block
    warp = jnp.where(here, lax.rem(found, split.warps), 0)
    lane, wanted = _passing([scratch.lane_sums[warp, i] for i in range(WARP_SIZE)], wanted)
    first = (warp * WARP_SIZE + lane) * split.numbers
    indices = [first + i for i in range(split.numbers)]
    own = [scratch.numbers[lax.div(i, WARPGROUP_SIZE), lax.rem(i, WARPGROUP_SIZE)] for i in indices]
    number, _ = _passing(own, wanted)
    last = found >= split.blocks * split.warps - WARPS
    token = block * split.warpgroups * split.numbers * WARPGROUP_SIZE + first + number
    token -= jnp.where(last, repeated * WARPGROUP_SIZE, 0)

    @pl.when((me == 0) & here)
    def _() -> None:
        token_ref[row] = token
        logprob_ref[row] = (
            logits_ref[row, lax.div(token, WARPGROUP_SIZE), lax.rem(token, WARPGROUP_SIZE)] - top - log_total
        )


def _cut(warps: Warps, time: jax.Array, mass: jax.Array, cuts: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """``mass`` [4, 32, n], whose largest is 1, with 0 for what top-k, top-p and min-p exclude; and the new time."""
    if "top_k" in cuts:
        top_k = cuts["top_k"]
        time, threshold = _threshold(warps, time, mass, None, top_k.astype(jnp.float32), jnp.float32(MIN_MASS))
        mass = jnp.where(mass < jnp.where(top_k > 0, threshold, 0.0), 0.0, mass)
    if "top_p" in cuts:
        top_p, total = cuts["top_p"], warps.total(time, mass)
        # If every mass that is cut were this small, their sum would be half of what top-p allows to cut.
        low = jnp.maximum((1 - top_p) * total / (2 * mass.size * warps.split.warpgroups * warps.split.blocks), MIN_MASS)
        time, threshold = _threshold(warps, time + 1, mass, mass, top_p * total, low)
        mass = jnp.where(mass < jnp.where(top_p < 1, threshold, 0.0), 0.0, mass)
    if "min_p" in cuts:
        mass = jnp.where(mass < cuts["min_p"], 0.0, mass)
    return time, mass


def _threshold(
    warps: Warps, time: jax.Array, mass: jax.Array, weight: jax.Array | None, wanted: jax.Array, low: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A threshold that keeps just the largest masses whose weights (None: 1) add up to ``wanted``. It is at least
    ``low`` and at most 1. Returns the new time, too.

    Bisection on a logarithmic scale: two bounds close in until one mass is left between them."""

    def more(carry: tuple[jax.Array, ...]) -> jax.Array:
        _, low, high, _, between = carry
        middle = jnp.sqrt(low * high)
        several = between >= 1.5 * (1 if weight is None else low)  # two masses weigh twice as much, but for rounding
        return several & (middle > low) & (middle < high)

    def halve(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        time, low, high, above_high, between = carry
        middle = jnp.sqrt(low * high)
        stays = (mass >= middle).astype(jnp.float32)
        # Two instructions a number. A select would make it three.
        above = warps.total(time, stays if weight is None else stays * weight)
        up = above >= wanted
        return (
            time + 1,
            jnp.where(up, middle, low),
            jnp.where(up, high, middle),
            jnp.where(up, above_high, above),
            jnp.where(up, above - above_high, above_high + between - above),
        )

    start = time, low, jnp.float32(1 + 2**-23), jnp.float32(0), jnp.float32(jnp.inf)
    time, low, *_ = lax.while_loop(more, halve, start)
    return time, low


def _passing(numbers: list[jax.Array], wanted: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The index at which the running sum of ``numbers`` passes ``wanted``, and how much is still wanted there. If
    rounding leaves the sum too small, it is the last index with any mass."""
    totals = list(itertools.accumulate(numbers, operator.add))
    place, before = jnp.int32(0), jnp.float32(0)
    for total in totals:
        passed = (total <= wanted) & (total < totals[-1])
        place = jnp.where(passed, place + 1, place)
        before = jnp.where(passed, total, before)
    return place, jnp.maximum(wanted - before, 0)

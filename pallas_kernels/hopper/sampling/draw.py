"""Drawing as a kernel: a block has a row, all of it in registers, and halves what may be the smallest mass that stays.

What XLA does in some thirty launches is one, in which a look at the row costs its arithmetic and one barrier. The
numbers of a thread are neighbours, and so are threads: a token is found by the sums of warps, then of a warp's threads,
then among a thread's own numbers.
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

WARPS, LANES = 4, 32  # of a warpgroup, of a warp
THREADS = WARPS * LANES
MAX_WARPGROUPS = 5  # leaves a thread 96 registers
MAX_NUMBERS = 64  # of a thread
LEAST = 1e-36  # of a mass that counts
COLD = 3e38


@dataclass(frozen=True)
class Split:
    """Of a row: to so many warpgroups, so many numbers a thread."""

    warpgroups: int
    numbers: int

    @property
    def warps(self) -> int:
        return self.warpgroups * WARPS

    @property
    def layout(self) -> Any:
        """[4, 32, numbers]: a thread's are read in pairs where they can be."""
        pair = 2 - self.numbers % 2
        return plgpu.Layout.TILED(
            plgpu.Tiling(((WARPS, LANES, pair),)), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
        )


def split_of(vocab: int) -> Split | None:
    """The fewest warpgroups that hold a row, if some do."""
    for warpgroups in range(1, MAX_WARPGROUPS + 1):
        numbers, left = divmod(vocab, warpgroups * THREADS)
        if not left and 0 < numbers <= MAX_NUMBERS:
            return Split(warpgroups, numbers)
    return None


def skip_reason(logits: jax.Array, u: jax.Array | None, **_: Any) -> str | None:
    """Why XLA draws from such logits, if it does."""
    if u is None:
        return "greedy: the largest logit is one reduction"
    vocab = logits.shape[-1]
    if split_of(vocab) is None:
        return f"a vocabulary of {vocab} cannot be dealt to {MAX_WARPGROUPS} warpgroups, up to {MAX_NUMBERS} a thread"
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
    interpret: Any = False,
    **cuts: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """A token of every row [B], and its log-probability [B]: see `draw_reference`."""
    given = {name: cut for name, cut in cuts.items() if cut is not None}
    rows, vocab = logits.shape
    split = split_of(vocab)
    assert split is not None
    numbers = split.warpgroups * split.numbers
    token, logprob = plgpu.kernel(
        functools.partial(_body, names=tuple(given), split=split, interpret=bool(interpret)),
        out_type=[jax.ShapeDtypeStruct((rows,), dtype) for dtype in (jnp.int32, jnp.float32)],
        grid=(rows,),
        grid_names=("row",),
        num_threads=split.warpgroups,
        thread_name="warpgroup",
        scratch_types=dict(
            numbers=plgpu.SMEM((numbers, THREADS), jnp.float32),
            lane_sums=plgpu.SMEM((split.warps, LANES), jnp.float32),
            sums=plgpu.SMEM((2, split.warpgroups, WARPS), jnp.float32),
            loaded=plgpu.Barrier(num_barriers=split.warpgroups),
            together=plgpu.Barrier(num_arrivals=split.warpgroups),
        ),
        interpret=interpret,
        kernel_name="draw_rows",
    )(logits.reshape(rows, numbers, THREADS), u, temperature, *given.values())
    return token, logprob


@dataclass(frozen=True)
class Warps:
    """What the warps of a block put together, in one of two places by turns: who comes first to the next but one has
    seen all others leave this one. ``time`` counts."""

    split: Split
    me: Any
    sums: Any
    barrier: Any

    def all_of(self, time: Any, numbers: jax.Array) -> list[jax.Array]:
        """What each warp found [4], of all of them."""
        turn = time % 2
        self.sums.at[turn, self.me][...] = numbers
        plgpu.barrier_arrive(self.barrier)
        plgpu.barrier_wait(self.barrier)
        return [self.sums[turn, i // WARPS, i % WARPS] for i in range(self.split.warps)]

    def total(self, time: Any, numbers: jax.Array) -> jax.Array:
        """The sum of all [4, 32, n] of all warpgroups."""
        return functools.reduce(operator.add, self.all_of(time, numbers.sum(axis=2).sum(axis=1)))

    def largest(self, time: Any, numbers: jax.Array) -> jax.Array:
        return functools.reduce(jnp.maximum, self.all_of(time, numbers.max(axis=2).max(axis=1)))


def _body(
    logits_ref: Any,
    u_ref: Any,
    temperature_ref: Any,
    *refs: Any,
    names: tuple[str, ...],
    split: Split,
    interpret: bool,
    numbers: Any,
    lane_sums: Any,
    sums: Any,
    loaded: Any,
    together: Any,
) -> None:
    *cut_refs, token_ref, logprob_ref = refs
    row, me = lax.axis_index("row"), lax.axis_index("warpgroup")
    cuts = {name: ref[row] for name, ref in zip(names, cut_refs, strict=True)}
    warps = Warps(split, me, sums, together)
    lines = pl.ds(me * split.numbers, split.numbers)
    mine = numbers.at[lines]
    shape = (WARPS, LANES, split.numbers)

    plgpu.copy_gmem_to_smem(logits_ref.at[row, lines], mine, loaded.at[me])
    plgpu.barrier_wait(loaded.at[me])
    if interpret:  # it reshapes arrays, but no references
        logits = mine[...].reshape(shape)
    else:
        logits = plgpu.load(mine.reshape(shape), layout=split.layout, optimized=False)

    top = warps.largest(0, logits)
    log_total = jnp.log(warps.total(1, jnp.exp(logits - top)))
    # A row without a temperature is so cold that its largest logit alone has any mass, and takes the first of those.
    temperature = temperature_ref[row]
    u = jnp.where(temperature > 0, u_ref[row], 0.0)
    warmth = jnp.where(temperature > 0, 1 / jnp.maximum(temperature, 1e-6), COLD)
    time, mass = _cut(warps, jnp.int32(2), jnp.exp((logits - top) * warmth), cuts)

    if interpret:
        mine[...] = mass.reshape(mine.shape)
    else:
        mine.reshape(shape)[...] = mass
    by_lane = mass.sum(axis=2)
    lane_sums.at[pl.ds(me * WARPS, WARPS)][...] = by_lane
    by_warp = warps.all_of(time, by_lane.sum(axis=1))

    warp, wanted = _passing(by_warp, u * functools.reduce(operator.add, by_warp))
    lane, wanted = _passing([lane_sums[warp, i] for i in range(LANES)], wanted)
    first = (warp * LANES + lane) * split.numbers
    places = [first + i for i in range(split.numbers)]
    number, _ = _passing([numbers[lax.div(i, THREADS), lax.rem(i, THREADS)] for i in places], wanted)
    token = first + number

    @pl.when(me == 0)
    def _() -> None:
        token_ref[row] = token
        logprob_ref[row] = logits_ref[row, lax.div(token, THREADS), lax.rem(token, THREADS)] - top - log_total


def _cut(warps: Warps, time: jax.Array, mass: jax.Array, cuts: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """``mass`` [4, 32, n], of which the largest is 1, with what the cuts exclude at 0."""
    if "top_k" in cuts:
        top_k = cuts["top_k"]
        time, least = _least(warps, time, mass, None, top_k.astype(jnp.float32), jnp.float32(LEAST))
        mass = jnp.where(mass < jnp.where(top_k > 0, least, 0.0), 0.0, mass)
    if "top_p" in cuts:
        top_p, total = cuts["top_p"], warps.total(time, mass)
        # Were all that is cut below this, it would be half of what may be cut.
        low = jnp.maximum((1 - top_p) * total / (2 * mass.size * warps.split.warpgroups), LEAST)
        time, least = _least(warps, time + 1, mass, mass, top_p * total, low)
        mass = jnp.where(mass < jnp.where(top_p < 1, least, 0.0), 0.0, mass)
    if "min_p" in cuts:
        mass = jnp.where(mass < cuts["min_p"], 0.0, mass)
    return time, mass


def _least(
    warps: Warps, time: jax.Array, mass: jax.Array, weight: jax.Array | None, wanted: jax.Array, low: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A bound that cuts off all but the largest masses whose weights (None: 1) together reach ``wanted``: not below
    ``low``, not above 1. Two bounds close in, by halves of what they differ in size, until one mass is between them."""

    def more(carry: tuple[jax.Array, ...]) -> jax.Array:
        _, low, high, _, between = carry
        middle = jnp.sqrt(low * high)
        several = between >= 1.5 * (1 if weight is None else low)  # two are twice as much, but for rounding
        return several & (middle > low) & (middle < high)

    def halve(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        time, low, high, above_high, between = carry
        middle = jnp.sqrt(low * high)
        stays = (mass >= middle).astype(jnp.float32)
        above = warps.total(time, stays if weight is None else stays * weight)  # two instructions; with a choice, three
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
    """The place of the first at which the running sum passes ``wanted``, and what is then still wanted. Where rounding
    has left too little, the last with any mass."""
    totals = list(itertools.accumulate(numbers, operator.add))
    place, before = jnp.int32(0), jnp.float32(0)
    for total in totals:
        passed = (total <= wanted) & (total < totals[-1])
        place = jnp.where(passed, place + 1, place)
        before = jnp.where(passed, total, before)
    return place, jnp.maximum(wanted - before, 0)

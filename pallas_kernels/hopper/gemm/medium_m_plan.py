"""How a medium-M GEMM is divided among the multiprocessors: plain arithmetic, no kernel.

A work tile is an N tile (a range of rows of the weight) over one K split (a range of its inputs), for all rows of x.
wgmma takes the rows of its left operand 64 at a time. With float weights those are rows of x, so an N tile may be any
multiple of 8. Integers are widened in registers, from which wgmma takes only its left operand, so there those are rows
of the weight, and an N tile of 96 costs as much as one of 128.
The plan is the cheapest candidate of a cost model: what bounds the busiest block, the launch, and what K splits add.
"""

import functools
import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp

from ...arch import Arch, planned
from ...dispatch import Unsupported
from ..common.tiles import WGMMA_ROWS, Format, nbytes
from ..common.warp_specialize import MAX_REGISTERS, consumer_registers, launch_registers

# Rates of one multiprocessor of an H200, a nanosecond. They are fitted to measurements, of which they miss 6 % (rms).
MEMORY_BYTES = 35  # its share of the memory bus
CACHE_BYTES = 130  # from the L2 cache, from which x comes once for every N tile
WRITTEN_BYTES = 66  # its share of what the kernel writes, which the L2 cache takes
PRODUCTS = 2900  # multiply-adds of 16-bit numbers, or half of those of limbs
WIDENED = 32  # integers that become floats
BOUNDS_NORM = 4  # what bounds a stage by itself hinders the rest: their norm of this order is the time of the stage
LATENCY_NS = 600  # until a stage has arrived; as many are on their way as the ring has, but two that are multiplied
STAGE_NS = 20  # of a stage, besides
START_NS = 3000  # from the launch to the first products, and after the last ones
FUSION_NS = 4000  # the launch of the XLA fusion that adds K splits where no kernel does

MAX_CONSUMERS = 4
PRODUCER_REGISTERS = 24
OTHER_REGISTERS = 28  # of a consumer's thread, besides its sums and weights
STAGED_ROWS = 64  # rows of the result that are transposed at a time
WGMMA_REGISTERS = 32  # that one wgmma needs besides its sums
HALF_COLUMNS = 128
MIN_COLUMNS = 32  # of an N tile, where the weight's rows are wgmma's columns
LIMB_ROWS = 96  # rows of x in two limbs. From about as many on, operations bound the product, not bytes
EXACT_COLUMNS = 64  # of more columns, sums of one group are not kept apart
SCRATCH_RESERVE = 3072  # bytes of shared memory for barriers, and for scratch that the compiler adds
MIN_DEPTH = 3
UNCROWDED_DEPTH = 5  # of a ring whose stages are the same for all blocks


@dataclass(frozen=True)
class MediumMTiles:
    """What can be tuned."""

    n_tile: int  # rows of the weight of a work tile; with SwiGLU half of them are gate's, half are up's
    step: int = 128  # inputs of a stage
    k_splits: int = 1
    depth: int = 12  # stages in flight, at most


@dataclass(frozen=True)
class MediumMProblem:
    """One product."""

    fmt: Format
    rows: int  # of x
    inner: int
    out: int  # rows of the weight
    swiglu: bool
    dtype: Any  # of x
    out_dtype: Any
    splittable: bool = False  # whether a kernel follows that adds K splits, however many there are
    limbs: bool = False  # whether x comes as two int8 limbs, which int8 weights multiply as they are

    @property
    def columns(self) -> int:
        """Rows of x, rounded up to what wgmma takes as columns of its right operand."""
        return 8 * math.ceil(self.rows / 8)

    @property
    def x_rows(self) -> int:
        """Columns of wgmma's right operand in all: the lower limbs follow the upper ones."""
        return self.columns * (2 if self.limbs else 1)

    @property
    def widens(self) -> bool:
        """Whether integer weights become floats."""
        return self.fmt.quantized and not self.limbs

    @property
    def rows_first(self) -> bool:
        """Whether rows of x, not those of the weight, are wgmma's left operand."""
        return not self.fmt.quantized

    @property
    def outputs(self) -> int:
        """Outputs, after SwiGLU."""
        return self.out // 2 if self.swiglu else self.out


@dataclass(frozen=True)
class MediumMPlan:
    """`MediumMTiles` made concrete for one product."""

    problem: MediumMProblem
    tiles: MediumMTiles
    sms: int
    interpret: bool = False

    @property
    def k_splits(self) -> int:
        """Ranges of inputs."""
        return self.tiles.k_splits

    @property
    def step(self) -> int:
        """Inputs of a stage."""
        return self.tiles.step

    @property
    def steps(self) -> int:
        """Stages over all inputs."""
        return self.problem.inner // self.step

    @property
    def n_tile(self) -> int:
        """Rows of the weight of a work tile."""
        return self.tiles.n_tile

    @property
    def n_out(self) -> int:
        """Outputs of a work tile, after SwiGLU."""
        return self.n_tile // 2 if self.problem.swiglu else self.n_tile

    @property
    def work_tiles(self) -> int:
        """N tiles times K splits."""
        return math.ceil(self.problem.outputs / self.n_out) * self.k_splits

    @property
    def blocks(self) -> int:
        """At most one a multiprocessor."""
        return min(self.sms, self.work_tiles)

    @property
    def turns(self) -> int:
        """Work tiles of the busiest block."""
        return math.ceil(self.work_tiles / self.blocks)

    @property
    def x_rows(self) -> int:
        """Rows of x in a stage: all, and as many as a consumer has. Of those past the end nothing is written."""
        return max(self.problem.x_rows, self.consumer_rows) if self.problem.rows_first else self.problem.x_rows

    @property
    def consumers(self) -> int:
        """Warpgroups that multiply: each has its rows of every stage. The last one's are moved up if they would pass
        the end: some rows are then computed twice."""
        return math.ceil(self.left_rows / self.consumer_rows)

    @property
    def left_rows(self) -> int:
        """Rows of wgmma's left operand, of all consumers."""
        return self.x_rows if self.problem.rows_first else self.n_tile

    @property
    def consumer_rows(self) -> int:
        """Those of one consumer: 64, or 128 where those of x would need more than three consumers, to which ptxas would
        give too few registers for long rows of sums."""
        many = self.problem.rows_first and self.problem.columns > (MAX_CONSUMERS - 1) * WGMMA_ROWS
        return 2 * WGMMA_ROWS if many else WGMMA_ROWS

    @property
    def group(self) -> int:
        """Inputs of a stage that share a scale."""
        return min(self.problem.fmt.group or self.step, self.step)

    @property
    def accumulators(self) -> list[tuple[int, int]]:
        """First column and number of columns of each accumulator of 64 rows: one for all columns, or two if one wgmma
        would need more registers than a thread has; with rows of x, one for each 64 of them."""
        if self.problem.rows_first:
            return [(0, self.n_tile)] * (self.consumer_rows // WGMMA_ROWS)
        columns = self.problem.x_rows
        parts = self.problem.columns if self.problem.limbs else HALF_COLUMNS
        most = columns if self._issuable(columns) else parts
        return [(first, min(most, columns - first)) for first in range(0, columns, most)]

    def _issuable(self, columns: int) -> bool:
        """Whether ptxas has registers for a wgmma of so many columns."""
        return columns // 2 + WGMMA_REGISTERS <= launch_registers(self.consumers)

    @property
    def scales_weights(self) -> bool:
        """Whether the scales of groups multiply the weights, before these are rounded, and not the sums of a group."""
        return self.problem.fmt.grouped and self.problem.columns > EXACT_COLUMNS

    @property
    def registers(self) -> int:
        """How many registers a thread of a consumer needs. It keeps its sums, and a second set where each group of
        inputs is added up on its own. Of integer weights it also keeps those of this stage and of the next."""
        fmt, threads = self.problem.fmt, 128
        sums = sum(WGMMA_ROWS * columns // threads for _, columns in self.accumulators)
        if fmt.grouped and not self.scales_weights:
            sums *= 2
        weights = WGMMA_ROWS * self.step * (16 + 2 * fmt.bits) // 32 // threads if self.problem.widens else 0
        return sums + weights + OTHER_REGISTERS

    @property
    def result_dtype(self) -> Any:
        """The dtype in which the kernel writes: K splits stay float32."""
        return jnp.dtype(jnp.float32 if self.k_splits > 1 else self.problem.out_dtype)

    @property
    def staged_shape(self) -> tuple[int, int]:
        """Of the buffer in which sums are transposed. Rows are a multiple of 16 and 8 long, so that the threads of a
        warp, which write 8 rows at a time, meet different banks."""
        many = self.problem.columns > STAGED_ROWS and self.result_dtype.itemsize > 2
        rows = STAGED_ROWS // 2 if many else STAGED_ROWS
        return min(self.problem.columns, rows), 16 * math.ceil((self.n_tile - 8) / 16) + 8

    @property
    def depth(self) -> int:
        """Stages of the ring: as many as shared memory has room for."""
        p = self.problem
        stage = nbytes((self.n_tile, self.step), p.fmt.bits) + nbytes((self.x_rows, self.step), 8 if p.limbs else 16)
        room = planned().shared_bytes - SCRATCH_RESERVE
        if not self.problem.rows_first:
            room -= nbytes(self.staged_shape, 8 * self.result_dtype.itemsize)
        return min(self.tiles.depth, room // stage)

    @property
    def nanoseconds(self) -> float:
        """The cost model: what the busiest block takes, and what K splits cost whoever adds them."""
        p = self.problem
        numbers = self.consumers * self.consumer_rows * self.step  # of wgmma's left operand
        products = numbers * (self.n_tile if p.rows_first else p.columns) / PRODUCTS
        widening = numbers / WIDENED if p.widens else 0
        if self.consumers == 1:  # no other one multiplies while it widens
            products, widening = products + widening, 0
        weights = nbytes((self.n_tile, self.step), p.fmt.bits)
        memory = weights * self.blocks / (MEMORY_BYTES * self.sms)
        cache = (weights + nbytes((p.columns, self.step), 16)) / CACHE_BYTES
        bounds = memory, cache, products, widening, LATENCY_NS / (self.depth - 2)
        stage = STAGE_NS + sum(bound**BOUNDS_NORM for bound in bounds) ** (1 / BOUNDS_NORM)
        result = self.k_splits * nbytes((p.rows, p.outputs), 8 * self.result_dtype.itemsize) / self.sms
        sums = result / MEMORY_BYTES if self.k_splits > 1 else 0  # read again
        sums += FUSION_NS if self.k_splits > 1 and not p.splittable else 0
        return START_NS + self.turns * math.ceil(self.steps / self.k_splits) * stage + result / WRITTEN_BYTES + sums


def make_plan(problem: MediumMProblem, tiles: MediumMTiles | None, sms: int, *, interpret: bool = False) -> MediumMPlan:
    """The plan with these tiles, or with the cheapest."""
    if tiles is not None:
        return MediumMPlan(problem, tiles, sms, interpret)
    best = _cheapest(problem, sms, planned())
    if best is None:
        raise Unsupported(f"no tiles for {problem.out} outputs of {problem.inner} inputs")
    return replace(best, interpret=interpret)


@functools.lru_cache(maxsize=256)  # check and launch of a product ask for the same plan
def _cheapest(problem: MediumMProblem, sms: int, _: Arch) -> MediumMPlan | None:
    """The cheapest plan on a device, whose sizes plans take from `planned`."""
    return min(_candidates(problem, sms), key=lambda p: p.nanoseconds, default=None)


def _candidates(problem: MediumMProblem, sms: int) -> list[MediumMPlan]:
    fmt, unit = problem.fmt, 16 if problem.swiglu else 8
    steps = [s for s in (64, 128) if problem.inner % s == 0 and 0 in (s % (fmt.group or s), (fmt.group or s) % s)]
    steps = steps[-1:] if fmt.quantized and problem.columns <= EXACT_COLUMNS else steps
    splits = [1] if problem.swiglu else range(1, 9)
    fewest = MIN_COLUMNS if problem.rows_first else WGMMA_ROWS
    n_tiles = range(fewest, min(WGMMA_ROWS * MAX_CONSUMERS, problem.out) + 1, unit)
    candidates = itertools.product(n_tiles, steps, splits)
    made = [p for tiles in candidates if _fits(p := MediumMPlan(problem, MediumMTiles(*tiles), sms))]
    return [p for p in made if not _crowds(p)] or made


def _crowds(p: MediumMPlan) -> bool:
    """Whether all blocks load the same long stages of many rows of x, and have few on their way. The QKV product of 128
    rows took 30.3 us so, and 28.2 with stages half as long. Blocks of other K splits load other inputs."""
    long = p.step > 64 and p.problem.columns >= 2 * WGMMA_ROWS
    return long and p.depth < UNCROWDED_DEPTH and p.k_splits == 1


def _fits(p: MediumMPlan) -> bool:
    """Whether a plan has enough shared memory, registers and stages."""
    registers = consumer_registers(p.consumers, PRODUCER_REGISTERS) if p.consumers > 1 else MAX_REGISTERS
    enough = p.depth >= MIN_DEPTH and p.registers <= registers
    enough = enough and all(p._issuable(columns) for _, columns in p.accumulators)
    return enough and p.steps >= p.k_splits and p.k_splits <= p.sms


def check_problem(problem: MediumMProblem, sms: int) -> None:
    """Raise `Unsupported` where there is no plan."""
    fmt, unit = problem.fmt, 16 if problem.swiglu else 8
    if problem.inner % 64:
        raise Unsupported(f"{problem.inner} inputs: must be a multiple of 64")
    if fmt.group is not None and 128 % fmt.group and fmt.group % 128:
        raise Unsupported(f"groups of {fmt.group} inputs: must divide 128, or be a multiple of it")
    if problem.out % unit or problem.out < WGMMA_ROWS:
        raise Unsupported(f"{problem.out} outputs: must be a multiple of {unit}, at least {WGMMA_ROWS}")
    make_plan(problem, None, sms)

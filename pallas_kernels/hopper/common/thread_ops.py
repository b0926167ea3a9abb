"""What single threads do, which Pallas cannot express: arithmetic on a thread's own integers, and rows of numbers in
any memory, one a thread. The arithmetic emits MLIR and is for use inside `plgpu.inline_mgpu`.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.fragmented_array import FragmentedArray
from jax.experimental.mosaic.gpu.utils import bitwidth, c, inline_ptx, memref_ptr, thread_idx, when
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, vector

from .layouts import one_per_thread

WARPGROUP_SIZE = 128  # threads of a warpgroup
ONE_PER_THREAD = one_per_thread(WARPGROUP_SIZE).to_mgpu()
SCALAR = plgpu.Layout.WG_SPLAT


class Interpretable(Protocol):
    """A kernel's plan, which knows whether the interpreter runs the kernel."""

    @property
    def interpret(self) -> bool: ...


Place = tuple[Any, ...]  # the indices of a row in an array of any number of axes, and where in the row numbers begin


def load_per_thread(plan: Interpretable, numbers: Any, places: Sequence[Place], count: int) -> list[jax.Array]:
    """``count`` numbers from each of ``places`` on, in any memory, one a thread. Further threads repeat the last.

    One operation for all places, with indices in place of a reference to each row: Mosaic takes longer for each
    reference the more operations a kernel has."""
    if plan.interpret:
        rows = [numbers[(*row, pl.ds(begin, count))] for *row, begin in places]
        return [jnp.concatenate([a, jnp.broadcast_to(a[-1:], (WARPGROUP_SIZE - count,))]) for a in rows]

    row = plgpu.ShapeDtypeStruct((WARPGROUP_SIZE,), numbers.dtype, layout=one_per_thread(WARPGROUP_SIZE))

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _scalars(places)), return_type=[row] * len(places))
    def read(_: Any, numbers: Any, places: Any) -> list[Any]:
        thread, values = min_(volatile_thread_in_warpgroup(), count - 1), []
        for *row, begin in _registers_of(places):
            number = memref.load(numbers, as_indices(*row, add(begin, thread)))
            registers = np.empty(ONE_PER_THREAD.registers_shape((WARPGROUP_SIZE,)), dtype=object)
            registers[...] = vector.broadcast(ir.VectorType.get((1,), number.type), number)
            values.append(FragmentedArray(_registers=registers, _layout=ONE_PER_THREAD, _is_signed=None))
        return values

    return read(numbers, _as_arrays(places))  # type: ignore[call-arg]


def store_per_thread(
    plan: Interpretable, numbers: Any, places: Sequence[Place], values: Sequence[jax.Array], count: int
) -> None:
    """Write the first ``count`` of each of ``values`` from its place on, one a thread.

    Each number is stored once only: in the persistent step the next phase waits for these stores."""
    if plan.interpret:
        for (*row, begin), value in zip(places, values, strict=True):
            numbers[(*row, pl.ds(begin, count))] = value[:count]
        return

    layouts = (one_per_thread(WARPGROUP_SIZE),) * len(values)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _scalars(places), layouts))
    def put(_: Any, numbers: Any, places: Any, values: Any) -> None:
        thread = volatile_thread_in_warpgroup()
        with when(arith.cmpi(arith.CmpIPredicate.ult, thread, as_i32(count))):
            for (*row, begin), value in zip(_registers_of(places), values, strict=True):
                vector.store(value.registers.item(), numbers, as_indices(*row, add(begin, thread)))

    put(numbers, _as_arrays(places), tuple(values))  # type: ignore[call-arg]


def _scalars(places: Sequence[Place]) -> Any:
    return jax.tree.map(lambda _: SCALAR, tuple(places))


def _as_arrays(places: Sequence[Place]) -> Any:
    return jax.tree.map(jnp.int32, tuple(places))


def _registers_of(places: Any) -> Any:
    return [[index.registers.item() for index in place] for place in places]


def aligned_store(value: Any, ref: Any, indices: list[Any]) -> None:
    """Store a vector at an address aligned to its size. Without the promise the compiler stores single elements."""
    vector.store(value, ref, indices, alignment=value.type.shape[0] * bitwidth(value.type.element_type) // 8)


def aligned_load(ref: Any, indices: list[Any], count: int) -> Any:
    """Load ``count`` neighbours from an address that is aligned to their size."""
    element = ir.MemRefType(ref.type).element_type
    return vector.load(ir.VectorType.get((count,), element), ref, indices, alignment=count * bitwidth(element) // 8)


def prefetch_cache_line(ref: Any, byte: Any, wanted: Any) -> None:
    """Prefetch the line with this byte of an array into the L2 cache, if ``wanted``."""
    i64 = ir.IntegerType.get_signless(64)
    address = arith.addi(llvm.ptrtoint(i64, memref_ptr(ref)), arith.extui(i64, byte))
    inline_ptx("prefetch.L2 [$0];", address, predicate=wanted)


def thread_in_warpgroup() -> Any:
    """Index of this thread in its warpgroup."""
    return rem(thread_idx(), 128)


def volatile_thread_in_warpgroup() -> Any:
    """`thread_in_warpgroup`, read anew. Otherwise the compiler computes the addresses of all phases before the first
    layer, and spills them."""
    i32 = ir.IntegerType.get_signless(32)
    return rem(inline_ptx("mov.u32 $0, %tid.x;", result_types=i32, has_side_effects=True), 128)


def opaque_constant(value: int) -> Any:
    """A constant that ptxas cannot see through. If a logical operation has two known constants, ptxas materialises one
    of them at every use. The value is hidden by adding the third block index, which is 0: kernels have at most two."""
    i32 = ir.IntegerType.get_signless(32)
    return add(inline_ptx("mov.u32 $0, %ctaid.z;", result_types=i32), value)


def as_i32(value: Any) -> Any:
    """A Python integer as an i32 constant; an MLIR value as it is."""
    return c(value, ir.IntegerType.get_signless(32)) if isinstance(value, int) else value


def add(a: Any, b: Any) -> Any:
    """a + b."""
    return arith.addi(as_i32(a), as_i32(b))


def sub(a: Any, b: Any) -> Any:
    """a - b."""
    return arith.subi(as_i32(a), as_i32(b))


def mul(a: Any, n: int) -> Any:
    """a * n."""
    return arith.muli(a, as_i32(n))


def div(a: Any, n: int) -> Any:
    """a // n, unsigned."""
    return arith.divui(a, as_i32(n))


def rem(a: Any, n: int) -> Any:
    """a % n, unsigned."""
    return arith.remui(a, as_i32(n))


def min_(a: Any, n: int) -> Any:
    """min(a, n), unsigned."""
    return arith.minui(a, as_i32(n))


def as_indices(*indices: Any) -> list[Any]:
    """Integers as indices of a memref."""
    return [arith.index_castui(ir.IndexType.get(), as_i32(i)) for i in indices]

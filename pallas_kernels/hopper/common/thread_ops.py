"""Which thread does what, where Pallas has no words for it: Mosaic's arithmetic on a thread's own numbers, and rows of
numbers in any memory, one a thread.
"""

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
    """The plan of a kernel that knows whether the interpreter runs it."""

    @property
    def interpret(self) -> bool: ...


def load_per_thread(plan: Interpretable, numbers: Any, begin: Any, count: int) -> jax.Array:
    """``count`` of a row of numbers in any memory, one a thread; the last once more in threads that are left."""
    if plan.interpret:
        some = numbers[pl.ds(begin, count)]
        return jnp.concatenate([some, jnp.broadcast_to(some[-1:], (WARPGROUP_SIZE - count,))])

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), SCALAR),
        return_type=plgpu.ShapeDtypeStruct((WARPGROUP_SIZE,), numbers.dtype, layout=one_per_thread(WARPGROUP_SIZE)),
    )
    def read(_: Any, numbers: Any, begin: Any) -> Any:
        own = add(begin.registers.item(), min_(volatile_thread_in_warpgroup(), count - 1))
        number = memref.load(numbers, as_indices(own))
        registers = np.empty(ONE_PER_THREAD.registers_shape((WARPGROUP_SIZE,)), dtype=object)
        registers[...] = vector.broadcast(ir.VectorType.get((1,), number.type), number)
        return FragmentedArray(_registers=registers, _layout=ONE_PER_THREAD, _is_signed=None)

    return read(numbers, begin)  # type: ignore[call-arg]


def store_per_thread(plan: Interpretable, numbers: Any, begin: Any, values: jax.Array, count: int) -> None:
    """The other way: the first ``count`` of ``values``. Nothing is written twice: the next phase waits for it."""
    if plan.interpret:
        numbers[pl.ds(begin, count)] = values[:count]
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR, one_per_thread(WARPGROUP_SIZE)))
    def put(_: Any, numbers: Any, begin: Any, values: Any) -> None:
        thread = volatile_thread_in_warpgroup()
        with when(arith.cmpi(arith.CmpIPredicate.ult, thread, as_i32(count))):
            vector.store(values.registers.item(), numbers, as_indices(add(begin.registers.item(), thread)))

    put(numbers, begin, values)  # type: ignore[call-arg]


def aligned_store(value: Any, ref: Any, indices: list[Any]) -> None:
    """A store of a vector where one of its size may lie; of what it does not know the compiler makes one an element."""
    vector.store(value, ref, indices, alignment=value.type.shape[0] * bitwidth(value.type.element_type) // 8)


def aligned_load(ref: Any, indices: list[Any], count: int) -> Any:
    """The other way: ``count`` neighbours of a reference."""
    element = ir.MemRefType(ref.type).element_type
    return vector.load(ir.VectorType.get((count,), element), ref, indices, alignment=count * bitwidth(element) // 8)


def prefetch_cache_line(ref: Any, byte: Any, wanted: Any) -> None:
    """Have the line of memory with this byte of an array brought to the cache, where ``wanted``."""
    i64 = ir.IntegerType.get_signless(64)
    address = arith.addi(llvm.ptrtoint(i64, memref_ptr(ref)), arith.extui(i64, byte))
    inline_ptx("prefetch.L2 [$0];", address, predicate=wanted)


def thread_in_warpgroup() -> Any:
    return rem(thread_idx(), 128)


def volatile_thread_in_warpgroup() -> Any:
    """The same, read again: else the compiler works out the addresses of all phases before the first layer, and has no
    registers to keep them in."""
    i32 = ir.IntegerType.get_signless(32)
    return rem(inline_ptx("mov.u32 $0, %tid.x;", result_types=i32, has_side_effects=True), 128)


def opaque_constant(value: int) -> Any:
    """A number that the assembler does not know: of a logical operation with two that it knows it makes one anew at
    every use. A block's third index is zero, as these kernels have no more than two."""
    i32 = ir.IntegerType.get_signless(32)
    return add(inline_ptx("mov.u32 $0, %ctaid.z;", result_types=i32), value)


def as_i32(value: Any) -> Any:
    return c(value, ir.IntegerType.get_signless(32)) if isinstance(value, int) else value


def add(a: Any, b: Any) -> Any:
    return arith.addi(as_i32(a), as_i32(b))


def sub(a: Any, b: Any) -> Any:
    return arith.subi(as_i32(a), as_i32(b))


def mul(a: Any, n: int) -> Any:
    return arith.muli(a, as_i32(n))


def div(a: Any, n: int) -> Any:
    return arith.divui(a, as_i32(n))


def rem(a: Any, n: int) -> Any:
    return arith.remui(a, as_i32(n))


def min_(a: Any, n: int) -> Any:
    return arith.minui(a, as_i32(n))


def as_indices(*indices: Any) -> list[Any]:
    """Numbers as indices of a reference."""
    return [arith.index_castui(ir.IndexType.get(), as_i32(i)) for i in indices]

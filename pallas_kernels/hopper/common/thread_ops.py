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

from .layouts import line

LANES = 128  # threads of a warpgroup
ONE_A_THREAD = line(LANES).to_mgpu()
SCALAR = plgpu.Layout.WG_SPLAT


class Run(Protocol):
    """The plan of a kernel that knows whether the interpreter runs it."""

    @property
    def interpret(self) -> bool: ...


def some_of(plan: Run, numbers: Any, begin: Any, count: int) -> jax.Array:
    """``count`` of a row of numbers in any memory, one a thread; the last once more in threads that are left."""
    if plan.interpret:
        some = numbers[pl.ds(begin, count)]
        return jnp.concatenate([some, jnp.broadcast_to(some[-1:], (LANES - count,))])

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), SCALAR),
        return_type=plgpu.ShapeDtypeStruct((LANES,), numbers.dtype, layout=line(LANES)),
    )
    def read(_: Any, numbers: Any, begin: Any) -> Any:
        own = plus(begin.registers.item(), least(thread_anew(), count - 1))
        number = memref.load(numbers, place(own))
        registers = np.empty(ONE_A_THREAD.registers_shape((LANES,)), dtype=object)
        registers[...] = vector.broadcast(ir.VectorType.get((1,), number.type), number)
        return FragmentedArray(_registers=registers, _layout=ONE_A_THREAD, _is_signed=None)

    return read(numbers, begin)  # type: ignore[call-arg]


def put_some(plan: Run, numbers: Any, begin: Any, values: jax.Array, count: int) -> None:
    """The other way: the first ``count`` of ``values``. Nothing is written twice: the next phase waits for it."""
    if plan.interpret:
        numbers[pl.ds(begin, count)] = values[:count]
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR, line(LANES)))
    def put(_: Any, numbers: Any, begin: Any, values: Any) -> None:
        thread = thread_anew()
        with when(arith.cmpi(arith.CmpIPredicate.ult, thread, integer(count))):
            vector.store(values.registers.item(), numbers, place(plus(begin.registers.item(), thread)))

    put(numbers, begin, values)  # type: ignore[call-arg]


def aligned_store(value: Any, ref: Any, indices: list[Any]) -> None:
    """A store of a vector where one of its size may lie; of what it does not know the compiler makes one an element."""
    vector.store(value, ref, indices, alignment=value.type.shape[0] * bitwidth(value.type.element_type) // 8)


def aligned_load(ref: Any, indices: list[Any], count: int) -> Any:
    """The other way: ``count`` neighbours of a reference."""
    element = ir.MemRefType(ref.type).element_type
    return vector.load(ir.VectorType.get((count,), element), ref, indices, alignment=count * bitwidth(element) // 8)


def prefetch_line(ref: Any, byte: Any, wanted: Any) -> None:
    """Have the line of memory with this byte of an array brought to the cache, where ``wanted``."""
    i64 = ir.IntegerType.get_signless(64)
    address = arith.addi(llvm.ptrtoint(i64, memref_ptr(ref)), arith.extui(i64, byte))
    inline_ptx("prefetch.L2 [$0];", address, predicate=wanted)


def thread_in_warpgroup() -> Any:
    return rest(thread_idx(), 128)


def thread_anew() -> Any:
    """The same, read again: else the compiler works out the addresses of all phases before the first layer, and has no
    registers to keep them in."""
    i32 = ir.IntegerType.get_signless(32)
    return rest(inline_ptx("mov.u32 $0, %tid.x;", result_types=i32, has_side_effects=True), 128)


def unknown(value: int) -> Any:
    """A number that the assembler does not know: of a logical operation with two that it knows it makes one anew at
    every use. A block's third index is zero, as these kernels have no more than two."""
    i32 = ir.IntegerType.get_signless(32)
    return plus(inline_ptx("mov.u32 $0, %ctaid.z;", result_types=i32), value)


def integer(value: Any) -> Any:
    return c(value, ir.IntegerType.get_signless(32)) if isinstance(value, int) else value


def plus(a: Any, b: Any) -> Any:
    return arith.addi(integer(a), integer(b))


def minus(a: Any, b: Any) -> Any:
    return arith.subi(integer(a), integer(b))


def times(a: Any, n: int) -> Any:
    return arith.muli(a, integer(n))


def over(a: Any, n: int) -> Any:
    return arith.divui(a, integer(n))


def rest(a: Any, n: int) -> Any:
    return arith.remui(a, integer(n))


def least(a: Any, n: int) -> Any:
    return arith.minui(a, integer(n))


def place(*indices: Any) -> list[Any]:
    """Numbers as indices of a reference."""
    return [arith.index_castui(ir.IndexType.get(), integer(i)) for i in indices]

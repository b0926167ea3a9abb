"""What single threads do, which Pallas cannot express: arithmetic on a thread's own integers, and rows of numbers in
any memory, one a thread. The arithmetic emits MLIR and is for use inside `plgpu.inline_mgpu`.
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
    """A kernel's plan, which knows whether the interpreter runs the kernel."""

    @property
    def interpret(self) -> bool: ...


def load_per_thread(plan: Interpretable, numbers: Any, begin: Any, count: int) -> jax.Array:
    """``count`` numbers from ``begin`` of a row in any memory, one a thread. Further threads repeat the last."""
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
    """Write the first ``count`` of ``values`` to a row from ``begin`` on, one a thread.

    Each number is stored once only: in the persistent step the next phase waits for these stores."""
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

"""Sums over the devices that share a model, inside the launch: what follows the products with wo and w_down.

Every device has the same plan. So block i of every device has sums of the same outputs, each over its own part of the
inputs. It writes its sums into the memory of all devices, over NVLink, waits for those of the others, and adds all of
them up in the order of the devices. All devices add the same numbers in the same order, and get the same bits. After
that the phase ends as on one device. So an exchange is no barrier of all blocks: a block meets only its counterparts.

**A word** is 8 bytes: a float32, and the number of the exchange. A store of 8 bytes arrives whole. So the number says
that the float is there, and nothing else must be signalled: no fence, no semaphore. The numbers begin with 1 in every
launch, and the buffers with 0, which is written before the launch. XLA has all devices meet between the two.

**Two buffers take turns.** Exchange n + 2 overwrites what exchange n wrote. Nobody can be that late: a device ends
exchange n + 1 only when all others have begun it, and a grid barrier lies between any two exchanges of a device.

**Every word is written once.** Where N tiles overlap (see `ProductPlan.first_row`), one block writes, and both read.
So no word is on its way when a launch ends: its reader waited for it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.fragmented_array import FragmentedArray
from jax.experimental.mosaic.gpu.utils import c, inline_ptx, memref_ptr, warpgroup_barrier, when
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, scf, vector

from ..common.layouts import one_per_thread
from ..common.thread_ops import (
    ONE_PER_THREAD,
    SCALAR,
    WARPGROUP_SIZE,
    add,
    aligned_load,
    as_i32,
    as_indices,
    min_,
    mul,
    volatile_thread_in_warpgroup,
)
from .block import Block
from .phase import ProductPhase
from .plan import StepShape

WORD = 8  # bytes
_MISSED = 2  # in `Scratch.gave_up`: not said yet


def find_peers(b: Block) -> None:
    """Put where the exchange buffers of all devices lie, and which of the devices this is, into shared memory: the
    launch's table of addresses is in global memory, and too far for every exchange."""
    devices, axis = b.plan.shape.devices, b.plan.shape.axis
    buffers = [plgpu.remote_ref(b.buffers.exchange, {axis: jnp.int32(i)}) for i in range(devices)]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), [plgpu.RefType()] * devices, SCALAR))
    def find(_: Any, peers: Any, buffers: Any, me: Any) -> None:
        i64 = ir.IntegerType.get_signless(64)
        pair = ir.VectorType.get((2,), ir.IntegerType.get_signless(32))
        for device, buffer in enumerate(buffers):
            halves = vector.bitcast(pair, vector.broadcast(ir.VectorType.get((1,), i64), _as_i64(memref_ptr(buffer))))
            vector.store(halves, peers, as_indices(device, 0), alignment=WORD)
        memref.store(me.registers.item(), peers, as_indices(devices, 0))
        warpgroup_barrier()  # the threads of all consumers write the same

    find(b.scratch.peers, buffers, lax.axis_index(b.plan.shape.axis))  # type: ignore[call-arg]


def send(b: Block, phase: ProductPhase, token: Any, outer: Any, lowest: Any, sums: jax.Array, count: int) -> None:
    """Write the first ``count`` of ``sums`` [128], one a thread, into the memory of all devices. They are of
    the outputs from ``outer`` on; those below ``lowest`` are another warpgroup's to write."""
    shape = b.plan.shape

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), one_per_thread(WARPGROUP_SIZE), (SCALAR,) * 4))
    def put(_: Any, peers: Any, sums: Any, scalars: Any) -> None:
        i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
        number, token, outer, lowest = (one.registers.item() for one in scalars)
        thread = volatile_thread_in_warpgroup()
        own = arith.cmpi(arith.CmpIPredicate.uge, add(outer, thread), lowest)
        own = arith.andi(own, arith.cmpi(arith.CmpIPredicate.ult, thread, as_i32(count)))
        bits = arith.bitcast(i32, vector.extract(sums.registers.item(), [], [0]))
        word = arith.ori(arith.extui(i64, bits), arith.shli(arith.extui(i64, number), c(32, i64)))
        me = memref.load(peers, as_indices(shape.devices, 0))
        at = _byte(shape, number, me, token, add(outer, thread))
        for device in range(shape.devices):
            halves = aligned_load(peers, as_indices(device, 0), 2)
            base = vector.extract(vector.bitcast(ir.VectorType.get((1,), i64), halves), [], [0])
            inline_ptx("st.relaxed.sys.global.b64 [$0], $1;", arith.addi(base, at), word, predicate=own)

    scalars = _scalars(b.plan.exchange_number(phase, b.layer), token, outer, lowest)
    put(b.scratch.peers, sums, scalars)  # type: ignore[call-arg]


def receive(b: Block, phase: ProductPhase, token: Any, outer: Any, count: int) -> jax.Array:
    """The sums [128] over all devices of ``count`` outputs from ``outer`` on, one a thread: those of the devices in
    their order. Further threads repeat the last."""
    shape, debug, gave_up = b.plan.shape, bool(b.plan.spin_limit), b.scratch.gave_up
    limit = jnp.where(gave_up[b.warpgroup] > 0, 0, b.plan.spin_limit) if debug else 0
    sums = plgpu.ShapeDtypeStruct((WARPGROUP_SIZE,), jnp.float32, layout=one_per_thread(WARPGROUP_SIZE))
    refs = [b.buffers.exchange, gave_up] if debug else [b.buffers.exchange]

    @plgpu.inline_mgpu(arg_types=([plgpu.RefType()] * len(refs), (SCALAR,) * 5), return_type=sums)
    def get(_: Any, refs: Any, scalars: Any) -> Any:
        number, token, outer, limit, warpgroup = (one.registers.item() for one in scalars)
        output = add(outer, min_(volatile_thread_in_warpgroup(), count - 1))
        base, total = _as_i64(memref_ptr(refs[0])), None
        for device in range(shape.devices):
            at = _byte(shape, number, as_i32(device), token, output)
            missing, part = _poll(arith.addi(base, at), number, limit if debug else None)
            total = part if total is None else arith.addf(total, part)
            if debug:
                with when(arith.andi(missing, arith.cmpi(arith.CmpIPredicate.ugt, limit, as_i32(0)))):
                    memref.store(as_i32(_MISSED), refs[1], as_indices(warpgroup))
        if debug:
            warpgroup_barrier()
        registers = np.empty(ONE_PER_THREAD.registers_shape((WARPGROUP_SIZE,)), dtype=object)
        registers[...] = vector.broadcast(ir.VectorType.get((1,), ir.F32Type.get()), total)
        return FragmentedArray(_registers=registers, _layout=ONE_PER_THREAD, _is_signed=None)

    scalars = _scalars(b.plan.exchange_number(phase, b.layer), token, outer, limit, b.warpgroup)
    total = get(refs, scalars)  # type: ignore[call-arg]
    if debug:
        _report(b, phase)
    return total


def _poll(address: Any, number: Any, limit: Any) -> tuple[Any, Any]:
    """Read a word until it is of the exchange ``number``, or has been read ``limit`` times. Returns whether it is
    missing, and its float."""
    i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
    loop = scf.WhileOp([i64, i32], [c(0, i64), as_i32(0)])
    before = loop.before.blocks.append(i64, i32)
    with ir.InsertionPoint.at_block_begin(before):
        word = inline_ptx("ld.relaxed.sys.global.b64 $0, [$1];", address, result_types=i64, has_side_effects=True)
        tries = add(before.arguments[1], 1)
        more = _is_other(word, number)
        if limit is not None:
            more = arith.andi(more, arith.cmpi(arith.CmpIPredicate.ult, tries, limit))
        scf.condition(more, [word, tries])
    after = loop.after.blocks.append(i64, i32)
    with ir.InsertionPoint.at_block_begin(after):
        scf.yield_(after.arguments)
    word = loop.results[0]
    return _is_other(word, number), arith.bitcast(ir.F32Type.get(), arith.trunci(i32, word))


def _is_other(word: Any, number: Any) -> Any:
    i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
    return arith.cmpi(arith.CmpIPredicate.ne, arith.trunci(i32, arith.shrui(word, c(32, i64))), number)


def _report(b: Block, phase: ProductPhase) -> None:
    """Hang detector: say which exchange a block gave up. It does not wait in later ones."""

    @pl.when(b.scratch.gave_up[b.warpgroup] == _MISSED)
    def _() -> None:
        message = f"decode_step: block {{}} stopped waiting for other devices' sums of {phase.name} of layer {{}}"
        pl.debug_print(message, b.index, b.layer)
        b.scratch.gave_up[b.warpgroup] = 1


def _byte(shape: StepShape, number: Any, device: Any, token: Any, output: Any) -> Any:
    """Where a word lies in the exchange buffer [2, devices, tokens, dim]."""
    row = add(mul(add(mul(arith.andi(number, as_i32(1)), shape.devices), device), shape.tokens), token)
    return arith.extui(ir.IntegerType.get_signless(64), mul(add(mul(row, shape.dim), output), WORD))


def _as_i64(pointer: Any) -> Any:
    return llvm.ptrtoint(ir.IntegerType.get_signless(64), pointer)


def _scalars(*numbers: Any) -> tuple[jax.Array, ...]:
    return tuple(map(jnp.int32, numbers))

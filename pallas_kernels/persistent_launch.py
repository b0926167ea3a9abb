"""One schedule, two executions: the phases of a decode step in one launch, with a barrier of the whole grid between
them, or, for the interpreter, which has no semaphores between blocks, as a launch each.

A launch of the first kind would wait forever if its blocks were not all on the device at once. There are therefore
never more blocks than multiprocessors, one on each; `pallas_kernels.decode_step.check` refuses any other grid.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import persistent_attention as attention
from pallas_kernels import persistent_ends as ends
from pallas_kernels import persistent_products as products
from pallas_kernels.persistent_plan import ROWS, Plan
from pallas_kernels.ring import consumer_registers, drain
from pallas_kernels.tiles import WGMMA_ROWS, swizzled

LAYER_PHASES = ("qkv", "attend", "join", "o", "gate_up", "down")
PHASES = (*LAYER_PHASES, "head")
WEIGHTS = {"qkv": "wqkv", "o": "wo", "gate_up": "w_gate_up", "down": "w_down", "head": "head"}
PRODUCER_REGISTERS = 40

Refs = dict[str, Any]


def buffers(plan: Plan) -> dict[str, jax.ShapeDtypeStruct]:
    """What the phases leave for one another, in the device's memory. ``x`` comes in, ``logits`` go out."""
    s = plan.shape
    wide = s.heads * s.head_dim
    return {
        "x": jax.ShapeDtypeStruct((ROWS, s.dim), jnp.bfloat16),
        "x_mid": jax.ShapeDtypeStruct((ROWS, s.dim), jnp.bfloat16),  # between the halves of a block
        "qkv": jax.ShapeDtypeStruct((ROWS, wide + 2 * s.kv_heads * s.head_dim), jnp.bfloat16),
        "parts": jax.ShapeDtypeStruct((plan.splits, ROWS, wide), jnp.float32),
        "logs": jax.ShapeDtypeStruct((plan.splits, s.heads, ROWS), jnp.float32),
        "attention": jax.ShapeDtypeStruct((ROWS, wide), jnp.bfloat16),
        "hidden": jax.ShapeDtypeStruct((ROWS, s.hidden), jnp.bfloat16),
        "logits": jax.ShapeDtypeStruct((ROWS, s.vocab), jnp.float32),
    }


def one_launch(
    plan: Plan, inputs: dict[str, jax.Array], state: dict[str, jax.Array], interpret: Any = None
) -> dict[str, jax.Array]:
    """The whole step in one launch. ``state`` is changed in place where the caller gave it away. The interpreter can
    run it where there is only one block."""
    refs = {name: jax.new_ref(a) for name, a in state.items()}

    def body(*args: Any, **smem: Any) -> None:
        everything = dict(zip((*inputs, *refs), args, strict=True))
        _everything(plan, everything, smem, registers=not interpret and plan.tiles.consumers > 1)

    _kernel(plan, body, "decode_step", interpret)(*inputs.values(), *refs.values())
    return {name: jax.freeze(ref) for name, ref in refs.items()}


def launch_per_phase(
    plan: Plan, inputs: dict[str, jax.Array], state: dict[str, jax.Array], interpret: Any
) -> dict[str, jax.Array]:
    """The same phases, each by itself."""
    phase = jax.jit(functools.partial(_one_phase, plan, interpret), static_argnums=0)
    for layer in range(plan.shape.layers):
        for name in LAYER_PHASES:
            # The interpreter simulates one launch at a time.
            state = jax.block_until_ready(phase(name, jnp.full(1, layer, jnp.int32), inputs, state))
    return phase("head", jnp.zeros(1, jnp.int32), inputs, state)


def _one_phase(plan: Plan, interpret: Any, name: str, layer: jax.Array, inputs: Any, state: Any) -> Any:
    refs = {key: jax.new_ref(a) for key, a in state.items()}

    def body(layer_ref: Any, *args: Any, **smem: Any) -> None:
        everything = dict(zip((*inputs, *refs), args, strict=True))
        block, me, layer = lax.axis_index("block"), lax.axis_index("warpgroup"), layer_ref[0]

        @pl.when(me == plan.tiles.consumers)
        def _() -> None:
            count = _produce(plan, name, layer, block, jnp.int32(0), everything, smem)
            drain(count, plan.depth, smem["free"])

        @pl.when(me < plan.tiles.consumers)
        def _() -> None:
            _consume(plan, name, layer, block, me, jnp.int32(0), everything, smem)

    _kernel(plan, body, f"decode_step_{name}", interpret)(layer, *inputs.values(), *refs.values())
    return {key: jax.freeze(ref) for key, ref in refs.items()}


def _everything(plan: Plan, refs: Refs, smem: Refs, *, registers: bool) -> None:
    """What each warpgroup does in the one launch."""
    block, me = lax.axis_index("block"), lax.axis_index("warpgroup")
    consumers, layers = plan.tiles.consumers, plan.shape.layers
    arrived = pl.get_global(plgpu.SemaphoreType.REGULAR) if plan.blocks > 1 else None

    def enter(phases: Any) -> None:
        """Wait until every block is through with so many phases."""
        if arrived is None:
            products.together(plan, smem)
        else:
            all_of_them = phases * (plan.blocks * consumers)
            plgpu.semaphore_wait(arrived, all_of_them, decrement=False, memory_scope="gpu")

    def leave() -> None:
        if arrived is not None:
            plgpu.semaphore_signal(arrived, memory_scope="gpu")

    @pl.when(me == consumers)
    def _() -> None:
        if registers:
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

        def layer(index: Any, count: Any) -> Any:
            for name in LAYER_PHASES:
                count = _produce(plan, name, index, block, count, refs, smem)
            return count

        count = lax.fori_loop(0, layers, layer, jnp.int32(0))
        drain(_produce(plan, "head", 0, block, count, refs, smem), plan.depth, smem["free"])

    @pl.when(me < consumers)
    def _() -> None:
        if registers:
            plgpu.set_max_registers(consumer_registers(consumers, PRODUCER_REGISTERS), action="increase")

        def layer(index: Any, count: Any) -> Any:
            for i, name in enumerate(LAYER_PHASES):
                enter(index * len(LAYER_PHASES) + i)
                count = _consume(plan, name, index, block, me, count, refs, smem)
                leave()
            return count

        count = lax.fori_loop(0, layers, layer, jnp.int32(0))
        enter(layers * len(LAYER_PHASES))
        _consume(plan, "head", 0, block, me, count, refs, smem)


def _produce(plan: Plan, name: str, layer: Any, block: Any, count: Any, refs: Refs, smem: Refs) -> Any:
    if name not in WEIGHTS:
        return count
    weight = refs[WEIGHTS[name]]
    weight = weight if name == "head" else weight.at[layer]
    return products.stream(plan.products[name], weight, plan, block, count, smem)


def _consume(plan: Plan, name: str, layer: Any, block: Any, me: Any, count: Any, refs: Refs, smem: Refs) -> Any:
    if name not in WEIGHTS:

        @pl.when(me == 0)
        def _() -> None:
            if name == "attend":
                attention.attend(plan, layer, block, refs, smem)
            else:
                attention.join(plan, block, refs)

        return count

    p = plan.products[name]
    scales = refs.get(f"{WEIGHTS[name]}_scale")
    if scales is not None and name != "head":
        scales = scales.at[layer]
    scale = ends.scaling(scales, p, plan.shape.fmt.grouped)
    if name == "qkv":
        fill = ends.normalised(refs["x"], refs["attn_norm"].at[layer], p, plan.shape.eps)
        finish = ends.store(refs["qkv"], scale)
    elif name == "o":
        fill, finish = ends.plain(refs["attention"], p), ends.add_to(refs["x"], refs["x_mid"], scale)
    elif name == "gate_up":
        fill = ends.normalised(refs["x_mid"], refs["ffn_norm"].at[layer], p, plan.shape.eps)
        finish = ends.swiglu(refs["hidden"], scale)
    elif name == "down":
        fill, finish = ends.plain(refs["hidden"], p), ends.add_to(refs["x_mid"], refs["x"], scale)
    else:
        fill = ends.normalised(refs["x"], refs["norm"], p, plan.shape.eps)
        finish = ends.store(refs["logits"], scale)
    return products.product(p, scales, fill, finish, plan, block, me, count, smem)


def _kernel(plan: Plan, body: Any, name: str, interpret: Any) -> Any:
    s, t = plan.shape, plan.tiles
    bf16 = jnp.dtype(jnp.bfloat16)
    # x is dead during attention, what attention holds during products, and keys once a part is done.
    x = swizzled((t.chunk // t.step, ROWS, t.step), bf16, run=s.fmt.group)
    q, keys = swizzled((WGMMA_ROWS, s.head_dim), bf16), swizzled((t.stages, t.keys, s.head_dim), bf16)
    scratch = {
        "shared_place": plgpu.RefUnion(x, (q, keys, keys), plgpu.SMEM((WGMMA_ROWS, s.head_dim), jnp.float32)),
        "ring": swizzled((plan.depth, WGMMA_ROWS, t.step), s.fmt.dtype),
        "log": plgpu.SMEM((WGMMA_ROWS,), jnp.float32),
        "new_k": plgpu.SMEM((ROWS, s.head_dim), jnp.bfloat16),
        "new_v": plgpu.SMEM((ROWS, s.head_dim), jnp.bfloat16),
        "sums": plgpu.SMEM((2, ROWS, WGMMA_ROWS), jnp.float32),
        "full": plgpu.Barrier(num_arrivals=1, num_barriers=plan.depth),
        "free": plgpu.Barrier(num_arrivals=1, num_barriers=plan.depth),
        "keys_full": plgpu.Barrier(num_arrivals=2, num_barriers=t.stages),
        "together": plgpu.Barrier(num_arrivals=t.consumers),
    }
    if t.consumers > 1:
        scratch["shares"] = plgpu.SMEM((t.consumers - 1, WGMMA_ROWS, ROWS), jnp.float32)
        scratch["shared"] = plgpu.Barrier(num_arrivals=t.consumers - 1)
        scratch["taken"] = plgpu.Barrier(num_arrivals=1)
    if interpret:  # it has no wgmma with its left operand in registers
        scratch["weights"] = swizzled((WGMMA_ROWS, t.keys), bf16)
        if s.fmt.quantized:
            scratch["widened"] = swizzled((t.consumers, WGMMA_ROWS, t.step), bf16, run=s.fmt.group)

    def unpacked(*args: Any, shared_place: Any, **smem: Any) -> None:
        smem["x"], (smem["q"], smem["k"], smem["v"]), smem["part"] = shared_place
        body(*args, **smem)

    return plgpu.kernel(
        unpacked,
        scratch_types=scratch,
        grid=(plan.blocks,),
        grid_names=("block",),
        num_threads=t.consumers + 1,
        thread_name="warpgroup",
        interpret=interpret,
        compiler_params=None if interpret else plgpu.CompilerParams(approx_math=True),
        kernel_name=name,
    )

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

from ..common.layouts import pair_per_lane
from ..common.ring import consumer_barrier
from ..common.tiles import WGMMA_ROWS, swizzled
from ..common.warp_specialize import consumer_registers
from . import attention as attention
from . import products as products
from . import prologues as ends
from .plan import ROWS, TAKING_TURNS, Plan, factors_shape, scales_shape, sums_shape

LAYER_PHASES = ("qkv", "attend", "o", "gate_up", "down")
PHASES = (*LAYER_PHASES, "head")
WEIGHTS = {"qkv": "wqkv", "o": "wo", "gate_up": "w_gate_up", "down": "w_down", "head": "head"}
PRODUCER_REGISTERS = 40

Refs = dict[str, Any]


def buffers(plan: Plan) -> dict[str, jax.ShapeDtypeStruct]:
    """What the phases leave for one another, in the device's memory. ``x`` comes in, ``logits`` go out. What a product
    reads in whole units of columns ends in zeros."""
    s, p = plan.shape, plan.products
    wide = s.heads * s.head_dim
    dim = max(p[name].padded for name in ("qkv", "gate_up", "head"))
    return {
        "x": jax.ShapeDtypeStruct((ROWS, dim), jnp.bfloat16),
        "x_mid": jax.ShapeDtypeStruct((ROWS, dim), jnp.bfloat16),  # between the halves of a block
        "qkv": jax.ShapeDtypeStruct((ROWS, wide + 2 * s.kv_heads * s.head_dim), jnp.bfloat16),
        "parts": jax.ShapeDtypeStruct((plan.splits, ROWS, p["o"].padded), jnp.float32),
        "logs": jax.ShapeDtypeStruct((plan.splits, ROWS, p["o"].padded // 8), jnp.float32),
        "hidden": jax.ShapeDtypeStruct((ROWS, p["down"].padded), jnp.bfloat16),
        "logits": jax.ShapeDtypeStruct((ROWS, s.vocab), jnp.float32),
    }


def written(plan: Plan) -> dict[str, int]:
    """How many columns of a buffer the phases write; what follows is zero."""
    s = plan.shape
    wide = s.heads * s.head_dim
    return {"x_mid": s.dim, "parts": wide, "logs": wide // 8, "hidden": s.hidden}


def empty(plan: Plan, name: str) -> jax.Array:
    """A buffer before a step: anything may be in it. The interpreter gets what is sure to be noticed."""
    buffer = buffers(plan)[name]
    if not plan.interpret:
        return lax.empty(buffer.shape, dtype=buffer.dtype)
    nothing = jnp.full(buffer.shape, jnp.nan, buffer.dtype)
    return nothing.at[..., written(plan)[name] :].set(0) if name in written(plan) else nothing


def end_in_zeros(plan: Plan, refs: Refs) -> None:
    """Put zeros where products read whole units of columns beyond what phases write."""
    for name, begin in written(plan).items():
        missing = refs[name].shape[-1] - begin
        if not missing:
            continue
        zeros = plgpu.layout_cast(jnp.zeros((ROWS, missing), refs[name].dtype), pair_per_lane())
        for buffer in [refs[name]] if len(refs[name].shape) == 2 else [refs[name].at[i] for i in range(plan.splits)]:
            buffer[:, pl.ds(begin, missing)] = zeros


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
            count = _produce(plan, name, layer, jnp.int32(0), block, jnp.int32(0), everything, smem)
            products.drain(plan, count, (name,) if name in WEIGHTS else (), smem)

        @pl.when(me < plan.tiles.consumers)
        def _() -> None:
            _prepare(plan, name, layer, block, me, jnp.int32(0), everything, smem)()

    _kernel(plan, body, f"decode_step_{name}", interpret)(layer, *inputs.values(), *refs.values())
    return {key: jax.freeze(ref) for key, ref in refs.items()}


def _everything(plan: Plan, refs: Refs, smem: Refs, *, registers: bool) -> None:
    """What each warpgroup does in the one launch."""
    block, me = lax.axis_index("block"), lax.axis_index("warpgroup")
    consumers, layers = plan.tiles.consumers, plan.shape.layers
    arrived = pl.get_global(plgpu.SemaphoreType.REGULAR) if plan.blocks > 1 else None

    def enter(layer: Any, name: str) -> None:
        """Wait until every block is through with the phases before."""
        if arrived is None:
            consumer_barrier(smem["together"])
            return
        before = layer * len(LAYER_PHASES) + PHASES.index(name) % len(LAYER_PHASES)
        all_of_them = before * plan.blocks
        there = look(plan, arrived, all_of_them, layer, name, block, me, smem) if plan.patience else True

        @pl.when(there)
        def _() -> None:
            plgpu.semaphore_wait(arrived, all_of_them, decrement=False, memory_scope="gpu")

    def leave() -> None:
        """Say that this block is through with a phase."""
        if arrived is not None:
            consumer_barrier(smem["together"])
            pl.when(me == 0)(lambda: plgpu.semaphore_signal(arrived, memory_scope="gpu"))

    @pl.when(me == consumers)
    def _() -> None:
        if registers:
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

        def layer(index: Any, count: Any) -> Any:
            for name in LAYER_PHASES:
                uses = 2 * index + (name in ("gate_up", "down"))
                count = _produce(plan, name, index, uses, block, count, refs, smem)
            return count

        count = lax.fori_loop(0, layers, layer, jnp.int32(0))
        count = _produce(plan, "head", 0, 2 * layers, block, count, refs, smem)
        products.drain(plan, count, tuple(WEIGHTS), smem)

    @pl.when((me == 0) & (block == 0))
    def _() -> None:
        end_in_zeros(plan, refs)

    @pl.when(me < consumers)
    def _() -> None:
        if registers:
            plgpu.set_max_registers(consumer_registers(consumers, PRODUCER_REGISTERS), action="increase")

        if plan.patience:
            smem["gave_up"][me] = 0

        def layer(index: Any, count: Any) -> Any:
            for name in LAYER_PHASES:
                run = _prepare(plan, name, index, block, me, count, refs, smem)
                with jax.named_scope(f"wait_{name}"):
                    enter(index, name)
                with jax.named_scope(name):
                    count = run()
                    leave()
            return count

        count = lax.fori_loop(0, layers, layer, jnp.int32(0))
        run = _prepare(plan, "head", 0, block, me, count, refs, smem)
        enter(layers, "head")
        run()


def look(plan: Plan, arrived: Any, wanted: Any, layer: Any, name: str, block: Any, me: Any, smem: Refs) -> Any:
    """For whoever looks for a fault: whether all arrive within `Plan.patience`. If not it says what it waited for, and
    does not wait again in later phases."""
    patience = jnp.where(smem["gave_up"][me] > 0, 0, plan.patience)

    def again(state: Any) -> Any:
        return (state[0] < patience) & (state[1] < wanted)

    seen = pl.semaphore_read(arrived)
    _, seen = lax.while_loop(again, lambda state: (state[0] + 1, pl.semaphore_read(arrived)), (jnp.int32(0), seen))

    @pl.when((seen < wanted) & (patience > 0))
    def _() -> None:
        message = f"decode_step: block {{}} waited in vain for {name} of layer {{}}: {{}} of {{}} arrived"
        pl.debug_print(message, block, layer, seen, wanted)
        smem["gave_up"][me] = 1

    return seen >= wanted


def _produce(plan: Plan, name: str, layer: Any, uses: Any, block: Any, count: Any, refs: Refs, smem: Refs) -> Any:
    if name not in WEIGHTS:
        return count
    weight, scales = (refs.get(key) for key in (WEIGHTS[name], f"{WEIGHTS[name]}_scale"))
    if name != "head":
        weight, scales = (a if a is None else a.at[layer] for a in (weight, scales))
    return products.stream(name, weight, scales, uses, plan, block, count, smem)


def _prepare(plan: Plan, name: str, layer: Any, block: Any, me: Any, count: Any, refs: Refs, smem: Refs) -> Any:
    """What a consumer does in a phase: what it can do before the phase begins now, the rest in what is returned."""
    if name not in WEIGHTS:
        return _attend(plan, layer, block, me, count, refs, smem)

    p = plan.products[name]
    scales = refs.get(f"{WEIGHTS[name]}_scale")
    if scales is not None and name != "head":
        scales = scales.at[layer]
    if name == "qkv":
        fill = ends.normalised(plan, p, refs["x"], refs["attn_norm"].at[layer], me, smem)
        finish = ends.store(refs["qkv"])
    elif name == "o":
        fill, finish = ends.joined(plan, p, refs["parts"], refs["logs"], me), ends.add_to(refs["x"], refs["x_mid"])
    elif name == "gate_up":
        fill = ends.normalised(plan, p, refs["x_mid"], refs["ffn_norm"].at[layer], me, smem)
        finish = ends.swiglu(refs["hidden"])
    elif name == "down":
        fill, finish = ends.plain(plan, p, refs["hidden"], me), ends.add_to(refs["x_mid"], refs["x"])
    else:
        fill = ends.normalised(plan, p, refs["x"], refs["norm"], me, smem)
        finish = ends.store(refs["logits"])
    return products.product(name, scales, fill, finish, plan, block, me, count, smem)


def _attend(plan: Plan, layer: Any, block: Any, me: Any, count: Any, refs: Refs, smem: Refs) -> Any:
    """The first warpgroup's part of a phase in which the others wait."""
    consumer_barrier(smem["together"])  # all are done with the sums of the phase before, whose place keys now take

    @pl.when(me == 0)
    def _() -> None:
        attention.begin_first(plan, layer, block, refs, smem)

    def run() -> Any:
        @pl.when(me == 0)
        def _() -> None:
            attention.attend(plan, layer, block, refs, smem)

        return count

    return run


def _kernel(plan: Plan, body: Any, name: str, interpret: Any) -> Any:
    s, t = plan.shape, plan.tiles
    bf16 = jnp.dtype(jnp.bfloat16)

    # x and the sums are dead during attention, what attention holds during products, keys once a part is done; the
    # scales of a phase once the phase after it is under way.
    def x(cuts: int) -> Any:
        shape = t.chunk // t.step // cuts, cuts * s.columns, t.step
        return swizzled(shape, jnp.dtype(jnp.int8) if s.fmt.quantized else bf16, min_slice=s.fmt.group)

    xs = [
        (
            x(p.cuts),
            plgpu.SMEM(factors_shape(p, plan), jnp.float32),
            plgpu.SMEM(sums_shape(p, plan), jnp.float32),
        )
        for p in plan.products.values()
    ]
    q, keys = swizzled((WGMMA_ROWS, s.head_dim), bf16), swizzled((t.stages, t.keys, s.head_dim), bf16)
    part = plgpu.SMEM((WGMMA_ROWS, s.head_dim), jnp.float32)
    scratch = {
        "shared_place": plgpu.RefUnion(*xs, (keys, keys, q), part),
        "ring": swizzled(
            (plan.depth, WGMMA_ROWS, t.step), s.fmt.dtype, min_slice=s.fmt.group if s.fmt.bits == 8 else None
        ),
        "log": plgpu.SMEM((WGMMA_ROWS,), jnp.float32),
        "new_k": plgpu.SMEM((ROWS, s.head_dim), jnp.bfloat16),
        "new_v": plgpu.SMEM((ROWS, s.head_dim), jnp.bfloat16),
        "residual": plgpu.SMEM((t.consumers, ROWS, products.share_of(plan.products["o"], plan)), jnp.bfloat16),
        "squares": plgpu.SMEM((t.consumers, 4), jnp.float32),
        "full": plgpu.Barrier(num_arrivals=plan.most_pieces, num_barriers=plan.depth),
        "free": plgpu.Barrier(num_arrivals=1, num_barriers=plan.depth),
        "keys_full": plgpu.Barrier(num_arrivals=2, num_barriers=t.stages),
        "together": plgpu.Barrier(num_arrivals=t.consumers),
    }
    if plan.patience:
        scratch["gave_up"] = plgpu.SMEM((t.consumers,), jnp.int32)
    if s.fmt.grouped:
        for turn, names in enumerate(TAKING_TURNS):
            places = [plgpu.SMEM(scales_shape(plan.products[n], plan), jnp.float16) for n in names]
            scratch[f"scales_{turn}"] = plgpu.RefUnion(*places)
        scratch["scales_full"] = plgpu.Barrier(num_arrivals=2, num_barriers=2)
        scratch["scales_free"] = plgpu.Barrier(num_arrivals=t.consumers, num_barriers=2)
    if interpret:  # it has no wgmma with its left operand in registers
        scratch["weights"] = swizzled((WGMMA_ROWS, t.keys), bf16)
        if s.fmt.bits == 4:
            scratch["in_bytes"] = swizzled(
                (t.consumers, WGMMA_ROWS, t.step), jnp.dtype(jnp.int8), min_slice=s.fmt.group
            )

    def unpacked(*args: Any, shared_place: Any, **smem: Any) -> None:
        *views, attention, smem["part"] = shared_place
        smem |= dict(zip(("k", "v", "q"), attention, strict=True))
        smem["x"], smem["factors"], smem["sums"] = (
            dict(zip(plan.products, refs, strict=True)) for refs in zip(*views, strict=True)
        )
        if s.fmt.grouped:
            for turn, names in enumerate(TAKING_TURNS):
                smem |= {f"scales_{n}": ref for n, ref in zip(names, smem[f"scales_{turn}"], strict=True)}
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

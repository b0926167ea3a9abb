"""Code that the peers on jax share: inputs on the device, the check, the timing."""

from collections.abc import Callable
from typing import Any

import numpy as np

from bench import opcases
from bench.measure import chain_jax_op, rough_s, sets_needed
from bench.peers import NotSupported, Rounds

CACHE = {"gpu": 64 << 20, "cpu": 256 << 20}  # at least the last cache (a CPU's, as far as one process sees of it)
LIMIT = {"gpu": 12 << 30, "cpu": 1 << 30}  # bytes of all input sets
DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}


def float_dtype(case: opcases.Case) -> str:
    """The dtype of activations."""
    return DTYPES.get(case["dtype"], "bfloat16")


class JaxOps:
    """Operations on jax. ``build(case)`` returns a function of device arrays; ``prepare(case, arrays)`` makes these
    arrays from the inputs."""

    def __init__(
        self,
        build: Callable[[opcases.Case], Callable[..., Any]],
        prepare: Callable[[opcases.Case, dict[str, np.ndarray]], tuple[Any, ...]] | None = None,
    ) -> None:
        self.build, self.prepare = build, prepare or to_device

    def run(self, case: opcases.Case, expected: str, warmup: int, iterations: int) -> Rounds:
        """See `bench.peers.Ops`."""
        import jax

        op = self.build(case)
        inputs = self.prepare(case, opcases.arrays(case))
        compiled = jax.jit(op).lower(*inputs).compile()
        out = np.asarray(compiled(*inputs).astype("float32"))
        memory = compiled.memory_analysis()
        held = memory.temp_size_in_bytes + memory.output_size_in_bytes if memory is not None else None
        yield
        rough = rough_s(compiled, inputs)
        yield
        error = opcases.relative_error(out, np.load(expected))
        reply = {"error_vs_reference": error, "peak_bytes": held, "samples": []}
        if error > opcases.TOLERANCE[case["dtype"]]:
            return reply
        size = "cpu" if jax.devices()[0].platform == "cpu" else "gpu"
        count = sets_needed(opcases.nbytes(case), CACHE[size], LIMIT[size])
        sets = [inputs, *(varied(inputs, i) for i in range(1, count))]
        chain = chain_jax_op(op, sets, advance(case), rough)
        yield
        return reply | {"samples": chain.samples(warmup, iterations), "how": chain.how}


def to_device(case: opcases.Case, arrays: dict[str, np.ndarray]) -> tuple[Any, ...]:
    """All inputs in the case's dtype, the weights of norms included."""
    import jax.numpy as jnp

    return tuple(jnp.asarray(a, float_dtype(case)) for a in arrays.values())


def varied(inputs: tuple[Any, ...], shift: int) -> tuple[Any, ...]:
    """Another set of inputs: the same numbers in another order, made on the device."""
    import jax
    import jax.numpy as jnp

    def moved(a: Any) -> Any:
        return (
            jnp.roll(a.astype(jnp.int8), shift, axis=0).astype(a.dtype)
            if a.dtype == jnp.int4
            else jnp.roll(a, shift, 0)
        )

    # Scales and integers move by the same distance along the outputs, so each scale stays with its integers.
    return jax.tree.map(lambda a: moved(a) if a.ndim > 1 and a.shape[0] > 1 else a + 0, inputs)


def advance(case: opcases.Case) -> Callable[[Any, Any], Any]:
    """A function that makes the next x from an output. A product's output is narrower or wider than its input, so as
    many columns as fit are copied into x."""
    if case["op"] == "draw":
        return lambda x, out: x.at[:, 0].set(out)
    if case["op"] != "matmul":
        return lambda x, out: out.astype(x.dtype)
    width = min(case["out"], case["inner"])
    return lambda x, out: x.at[:, :width].set(out[:, :width].astype(x.dtype))


def only(case: opcases.Case, *names: str) -> None:
    """Raise `NotSupported` for operations that the library does not have."""
    if case["op"] not in names:
        raise NotSupported(f"has no {case['op']}")
    if case["dtype"] in ("int8", "int4"):
        raise NotSupported(f"float inputs only, not {case['dtype']}")


def need_gpu() -> None:
    """Raise `NotSupported` on a device that is not a GPU."""
    import jax

    if jax.devices()[0].platform != "gpu":
        raise NotSupported("needs a GPU")

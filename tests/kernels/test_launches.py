"""What a layer of the engine's steps launches on an H200: kernels, and what XLA is left with between them."""

import dataclasses
import functools
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from h200 import H200
from launches import KERNEL, Program, operations_of_a_layer

from jllama.config import preset
from jllama.engine import steps
from jllama.engine.state import init_state
from jllama.model import forward
from jllama.paged import PagedCache
from jllama.params import init

PAGES, WIDTH = 200, 40

pytestmark = pytest.mark.timeout(120)


def ints(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def arguments(layers: int, name: str = "7b", quant: Any = "none") -> tuple[Any, Any]:
    """Weights and state of a model with so many layers."""
    config = dataclasses.replace(preset(name), n_layers=layers)
    params = jax.eval_shape(lambda: init(config, jax.random.key(0), dtype=jnp.bfloat16, quant=quant, stacked=True))
    return params, jax.eval_shape(lambda: init_state(config, 16, PAGES, jnp.bfloat16))


def lowered(function: Any, *args: Any) -> Any:
    with jax.sharding.use_abstract_mesh(H200):
        return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",))


def feed(layers: int) -> Any:
    """16 pieces of 128 tokens of prompts."""
    return lowered(steps.feed, *arguments(layers), ints(16, 128), ints(16), ints(16, WIDTH), ints(16))


def decode(layers: int, name: str, quant: str, rows: int) -> Any:
    """A new token of each row."""
    params, state = arguments(layers, name, quant)
    cache = PagedCache(state.k, state.v, ints(rows, WIDTH), ints(rows))
    return lowered(
        lambda params, tokens, cache: forward(params, tokens, cache, last_only=True), params, ints(rows, 1), cache
    )


# Where query heads share keys, the QKV product is so small that its plan has K splits: attention adds them. With int8
# weights, norms write limbs of what wqkv and w_gate_up multiply.
DECODE = [
    ("7b", "none", 256),
    ("7b", "int8", 64),
    ("llama3-8b", "none", 64),
    ("llama3.2-1b", "int8", 64),
    ("tinyllama-1.1b", "none", 64),
]


@pytest.mark.parametrize("step", [feed, *(functools.partial(decode, name=n, quant=q, rows=r) for n, q, r in DECODE)])
def test_a_layer_lowers_to_seven_kernels_and_nothing_between_them(step: Any) -> None:
    """Prompts: norm, qkv, attention, o, norm, gate and up, down. A decode step: qkv, attention, o, norm, gate and up,
    down, norm. The gains of the two norms are slices of all layers'."""
    found = operations_of_a_layer(step)
    assert found.pop(KERNEL) == 7
    assert found <= Counter({"stablehlo.slice": 2})


def test_the_count_follows_calls_and_counts_equal_operations_once() -> None:
    inner = jax.jit(lambda x, y: jnp.sin(x) + jnp.sort(y))

    def program(x: jax.Array, y: jax.Array) -> jax.Array:
        jnp.exp(x)  # nobody needs it
        return inner(inner(x, y), y).reshape(4)

    found = Program(jax.jit(program).lower(jnp.ones((2, 2)), jnp.ones((2, 2))).compiler_ir("stablehlo")).count()
    assert found == {"stablehlo.sine": 2, "stablehlo.sort": 1, "stablehlo.add": 2}


def test_a_program_is_the_same_whatever_was_lowered_before() -> None:
    """Its text is what JAX's cache of compiled programs is asked for."""
    first = decode(1, "7b", "none", 64).as_text()
    decode(1, "7b", "int8", 64)
    assert decode(1, "7b", "none", 64).as_text() == first

"""Products on a CPU: by limbs, by sums or with a second row, held to the product in floats."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Arch, QuantizedTensor, matmul, pinned, quantize
from pallas_kernels.arch import ELSEWHERE
from pallas_kernels.cpu import TABLE, Entry, by_blocks, by_limbs, by_sums, by_two_rows, choose, limbs
from pallas_kernels.matmul import float_product

CPU = Arch("cpu", "cpu")


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def relative(found: jax.Array, expected: jax.Array) -> float:
    return float(jnp.max(jnp.abs(found - expected)) / jnp.max(jnp.abs(expected)))


def quantised(fmt: str, group: int | None, out: int = 96, inner: int = 256) -> QuantizedTensor:
    return quantize(normal(out, inner, seed=1), fmt, group=group)


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize(("fmt", "group"), [("int8", None), ("int4", None), ("int8", 32), ("int4", 64)])
def test_limbs_are_within_1e_4_of_the_product_in_floats(fmt: str, group: int | None, rows: int) -> None:
    x, w = normal(rows, 256), quantised(fmt, group)
    run = by_blocks if group else by_limbs
    assert 0 < relative(run(x, w), float_product(x, w)) < 1e-4


def test_limbs_hold_an_input_to_half_a_step_of_the_second() -> None:
    x = normal(3, 500) * jnp.asarray([[1e-20], [1.0], [1e20]])
    digits, scale = limbs(x)
    first, second = jnp.split(digits.astype(jnp.float32), 2)
    error = jnp.abs((first + second / 254) * scale - x) / scale
    assert float(jnp.max(error)) < 0.51 / 254


def test_zeros_give_zeros_and_a_nan_or_infinity_stays_loud() -> None:
    w = quantised("int8", None)
    x = normal(4, 256).at[0].set(0).at[1, 3].set(jnp.nan).at[2, 3].set(jnp.inf)
    y = by_limbs(x, w)
    np.testing.assert_array_equal(y[0], 0)
    assert not jnp.isfinite(y[1:3]).any()
    assert jnp.isfinite(y[3]).all()


def test_the_largest_integers_do_not_overflow() -> None:
    w = QuantizedTensor(jnp.full((2, 2**17), -128, jnp.int8), jnp.ones((2, 1)))
    np.testing.assert_allclose(by_limbs(jnp.ones((1, 2**17)), w), -128.0 * 2**17, rtol=1e-6)


def test_two_rows_of_bf16_are_the_product_of_one() -> None:
    x, w = normal(1, 256).astype(jnp.bfloat16), normal(96, 256, seed=1).astype(jnp.bfloat16)
    assert relative(by_two_rows(x, w), float_product(x, w)) < 1e-6


@pytest.mark.parametrize("rows", [2, 16])
def test_sums_are_the_product_in_floats(rows: int) -> None:
    x, w = normal(rows, 1024), normal(96, 1024, seed=1)
    assert choose(x, w) is by_sums
    assert relative(by_sums(x, w), float_product(x, w)) < 1e-6
    np.testing.assert_array_equal(jax.jit(matmul)(x, w), jax.jit(by_sums)(x, w))


@pytest.mark.parametrize(("fmt", "group"), [("int8", None), ("int8", 64)])
def test_gradient_and_vmap_are_those_of_the_product_in_floats(fmt: str, group: int | None) -> None:
    w, xs = quantised(fmt, group), normal(3, 1, 256)

    def loss(x: jax.Array, w: QuantizedTensor) -> jax.Array:
        return jnp.sum(jnp.sin(matmul(x, w)))

    def in_floats(x: jax.Array, w: QuantizedTensor) -> jax.Array:
        return jnp.sum(jnp.sin(float_product(x, w)))

    np.testing.assert_allclose(jax.jit(jax.grad(loss))(xs[0], w), jax.grad(in_floats)(xs[0], w), rtol=1e-4, atol=1e-5)
    batched = jax.vmap(lambda x: matmul(x, w))(xs)
    np.testing.assert_allclose(batched, float_product(xs, w), rtol=1e-4, atol=1e-4)


def test_a_row_gives_the_same_alone_and_among_others() -> None:
    """So a prompt and a step agree."""
    w, x = quantised("int8", None), normal(1, 7, 256)
    np.testing.assert_allclose(matmul(x, w)[:, 3:4], matmul(x[:, 3:4], w), rtol=1e-6, atol=1e-6)


def test_limbs_run_where_it_is_traced_for_a_cpu_and_nowhere_else() -> None:
    x, w = normal(1, 256), quantised("int8", None)

    def integer_products(arch: Arch) -> bool:
        with pinned(arch):
            return "preferred_element_type=int32" in str(jax.make_jaxpr(lambda x: matmul(x, w, backend="xla"))(x))

    assert integer_products(CPU)
    assert not integer_products(ELSEWHERE)


@pytest.mark.parametrize(
    ("rows", "w", "expected"),
    [
        (1, ("int8", 4096, 4096, 1), by_limbs),
        (512, ("int8", 576, 576, 1), by_limbs),
        (1, ("int8", 3072, 576, 9), by_blocks),
        (14, ("int8", 3072, 576, 9), by_blocks),
        (15, ("int8", 3072, 576, 9), None),
        (4, ("int8", 4096, 8192, 32), by_blocks),
        (1, ("int4", 3072, 576, 9), None),
        (1, ("int4", 4096, 4096, 32), by_blocks),
        (1, ("int4", 4096, 8192, 64), by_blocks),
        (1, ("int8", 8, 2**17 + 8, 1), None),
        (1, ("bfloat16", 576, 576, 0), by_two_rows),
        (1, ("bfloat16", 512, 512, 0), None),
        (2, ("bfloat16", 576, 576, 0), None),
        (1, ("float32", 576, 1536, 0), None),
        (2, ("float32", 576, 576, 0), by_sums),
        (4, ("float32", 576, 576, 0), None),
        (4, ("float32", 576, 1536, 0), by_sums),
        (16, ("float32", 2048, 8192, 0), by_sums),
        (17, ("float32", 2048, 8192, 0), None),
    ],
)
def test_the_table_by_shape(rows: int, w: tuple[str, int, int, int], expected: object) -> None:
    fmt, out, inner, groups = w
    dtype = jnp.dtype(fmt)
    data = jax.ShapeDtypeStruct((out, inner), dtype)
    weight = QuantizedTensor(data, jax.ShapeDtypeStruct((out, groups), jnp.float32)) if groups else data  # type: ignore[arg-type]
    x = jax.ShapeDtypeStruct((rows, inner), jnp.float32 if groups else dtype)
    assert choose(x, weight) is expected  # type: ignore[arg-type]


def test_every_entry_of_the_table_can_be_reached() -> None:
    def hides(before: Entry, entry: Entry) -> bool:
        sizes = before.above <= entry.above and before.size >= entry.size
        return before.form == entry.form and sizes and before.inner <= entry.inner

    assert [e for i, e in enumerate(TABLE) if any(hides(before, e) for before in TABLE[:i])] == []

"""What every op promises on every implementation: derivatives, batches, platforms, and the reported choice."""

import dataclasses
import functools
import types
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from fake_kernels import GPU, faked, opaque
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec as P

from jllama.cache import init_cache
from jllama.config import LlamaConfig
from jllama.decode import generate
from jllama.model import forward
from jllama.params import Params, init, stack
from jllama.sampling import make_sampling
from jllama.step import whole_step
from jllama.stream import Session
from pallas_kernels import OPS, Choice, Kernel, Op, Unsupported, arch, quantize, record, rms_norm
from pallas_kernels.arch import HOPPER, arch_of, pinned

KERNEL = Choice("pallas", "kernel runs here")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A device for which every op of a model has a kernel."""
    model = ("matmul", "qkv", "attend_and_write", "attention", "ffn", "rms_norm")
    for name in (*(f"model.{op}" for op in model), "cache.attention", "cache.decode_attention"):
        monkeypatch.setattr(f"jllama.{name}", faked(OPS[name.partition(".")[2]]))
    whole = faked(whole_step)
    needs_stacked = Kernel(whole.kernels["hopper"].run, lambda x, params, *_, **__: require_stacked(params))
    monkeypatch.setattr("jllama.model.whole_step", dataclasses.replace(whole, kernels={"hopper": needs_stacked}))
    with pinned(HOPPER):
        yield


def require_stacked(params: Params) -> None:
    if not params.stacked:
        raise Unsupported("not stacked")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has a GPU, but whose arrays are on the CPU."""
    monkeypatch.setattr(arch, "_gpu", lambda: GPU)


# Derivatives and batches


def example(name: str) -> tuple[Op, tuple[Any, ...], dict[str, Any]]:
    """Arguments of an op. The first is a float array."""
    keys = iter(jax.random.split(jax.random.key(0), 32))

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape)

    start, cos = jnp.asarray([1, 3]), normal(2, 2, 4)
    x, eps = normal(2, 2, 32), dict(eps=1e-5)
    cache = normal(2, 2, 8, 8), normal(2, 2, 8, 8), start
    return {
        "rms_norm": (OPS["rms_norm"], (x, normal(32)), eps),
        "matmul": (OPS["matmul"], (x, normal(16, 32)), dict(residual=normal(2, 2, 16))),
        "matmul-int8": (OPS["matmul"], (x, quantize(normal(16, 32), "int8")), dict(out_dtype=jnp.float32)),
        "matmul-int4": (OPS["matmul"], (x, quantize(normal(16, 32), "int4", group=32)), {}),
        "qkv": (OPS["qkv"], (x, normal(64, 32), *cache, jnp.cos(cos), jnp.sin(cos)), {}),
        "attention": (OPS["attention"], (normal(2, 2, 4, 8), *cache), {}),
        "paged_attention": (
            OPS["paged_attention"],
            (normal(2, 2, 4, 8), *normal(2, 3, 5, 2, 8, 8), jnp.asarray([[4, 0], [2, 1]]), start),
            dict(layer=1),
        ),
        "attend_and_write": (
            OPS["attend_and_write"],
            (
                normal(2, 2, 64),
                *normal(2, 3, 5, 2, 8, 8),
                jnp.asarray([[4, 0], [2, 1]]),
                start,
                jnp.cos(cos),
                jnp.sin(cos),
            ),
            dict(layer=1),
        ),
        "ffn": (OPS["ffn"], (x, normal(32), normal(96, 32), normal(32, 48)), eps),
        "finish_layer": (
            OPS["finish_layer"],
            (normal(2, 2, 16), x, normal(32, 16), normal(32), normal(96, 32), normal(32, 48), normal(32)),
            eps | dict(split=True),
        ),
        "draw": (OPS["draw"], (normal(2, 64), jnp.asarray([0.3, 0.7])), dict(temperature=jnp.ones(2))),
    }[name]


def same(found: Any, expected: Any, scale: float = 1.0) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * scale)


def total(tree: Any) -> jax.Array:
    """A number that depends on every float of the results, each with its own weight."""
    floats = [a for a in jax.tree.leaves(tree) if jnp.issubdtype(a.dtype, jnp.floating)]
    return sum((jnp.sum(jnp.sin(a.astype(jnp.float32))) for a in floats), jnp.float32(0))


PRODUCTS = ("matmul", "matmul-int8", "matmul-int4", "qkv", "ffn", "finish_layer")
EXAMPLES = ("rms_norm", *PRODUCTS, "attention", "paged_attention", "attend_and_write", "draw")


@pytest.mark.parametrize("name", EXAMPLES)
def test_transforms_of_an_op_with_a_kernel_are_the_references(name: str) -> None:
    op, (x, *rest), kwargs = example(name)

    def through(op: Op, backend: str) -> list[Any]:
        def f(x: jax.Array) -> Any:
            return op(x, *rest, backend=backend, **kwargs)

        def repeated(x: jax.Array) -> jax.Array:
            return jax.lax.scan(lambda c, _: (c + 0 * total(f(x + c)), total(f(x + c))), 0.0, length=2)[1].sum()

        def all_of_them(x: jax.Array) -> list[Any]:
            many = jnp.stack([x, 2 * x])
            out, tangent = jax.jvp(f, (x,), (x,))
            return [
                f(x),
                out,
                [t for t in jax.tree.leaves(tangent) if t.dtype != jax.dtypes.float0],
                jax.vmap(f)(many),
                jax.vmap(jax.grad(lambda x: total(f(x))))(many),
                jax.grad(lambda many: total(jax.vmap(f)(many)))(many),
                jax.grad(jax.checkpoint(repeated))(x),
            ]

        return jax.jit(all_of_them)(x)

    with pinned(HOPPER), record() as choices:
        assert faked(op).choose("pallas", x, *rest, **kwargs).impl == "pallas"
        found = through(faked(op), "pallas")
    assert choices[op.name] == Choice("xla", "differentiated: the reference's rule")
    # On a CPU the reference multiplies integer weights by two limbs of x: errors go with the largest sum, about 13.
    same(found, through(op, "xla"), scale=13.0 if name in ("matmul-int8", "matmul-int4") else 1.0)


def test_limbs_of_activations_do_not_stop_derivatives() -> None:
    """A step hands them from one op to the next. What is differentiated is the product of what they stand for."""
    layer, (out, *rest), eps = example("finish_layer")
    w = quantize(jax.random.normal(jax.random.key(1), (16, 32)), "int8")

    def f(out: jax.Array, backend: str) -> jax.Array:
        _, h = faked(layer)(out, *rest, **eps, backend=backend)
        return total(faked(OPS["matmul"])(h, w, backend=backend))

    with pinned(HOPPER):
        found = jax.jit(jax.grad(lambda out: f(out, "pallas")))(out)
        same(found, jax.jit(jax.grad(lambda out: f(out, "xla")))(out))
    assert float(jnp.abs(found).max()) > 0.1


def test_the_fake_kernel_has_no_rules_of_its_own() -> None:
    """Without the rules a kernel has no derivative, so the tests above test the rules."""
    f = opaque(lambda x: 2 * x)
    assert f(jnp.float32(1)) == 2
    with pytest.raises(NotImplementedError, match="opaque"):
        jax.grad(f)(1.0)
    with pytest.raises(NotImplementedError, match="opaque"):
        jax.vmap(f)(jnp.ones(2))


def test_transforms_through_a_real_kernel() -> None:
    """With interpreted kernels, Pallas's own rule for derivatives is not used."""
    real = rms_norm.kernels["hopper"]
    kernel = Kernel(functools.partial(real.run, interpret=plgpu.InterpretGPUParams()), real.check)
    op = dataclasses.replace(rms_norm, kernels={"hopper": kernel}, skip_reason=None)
    x, weight = jax.random.normal(jax.random.key(0), (2, 3, 128)).astype(jnp.bfloat16), jnp.ones(128, jnp.bfloat16)

    def f(backend: str, x: jax.Array) -> jax.Array:
        return total(op(x, weight, eps=1e-5, backend=backend))

    with pinned(HOPPER), record() as choices:
        op(x, weight, eps=1e-5)
        assert choices["rms_norm"] == KERNEL
        found = jax.vmap(jax.grad(functools.partial(f, "auto")))(x)
    same(found.astype(jnp.float32), jax.vmap(jax.grad(functools.partial(f, "xla")))(x).astype(jnp.float32))


@pytest.mark.parametrize("stacked", [False, True])
def test_transforms_of_a_model_with_kernels(kernels: None, stacked: bool) -> None:
    params = stack(tiny.model()) if stacked else tiny.model()
    tokens = jnp.asarray([tiny.prompt(4), tiny.prompt(4, 1)])
    cache = init_cache(params.config, 2, 8, jnp.float32, stacked=stacked)

    def loss(params: Any, tokens: jax.Array, backend: str) -> jax.Array:
        logits, _ = forward(params, tokens, backend=backend)
        stepped, after = forward(params, tokens, cache, last_only=True, backend=backend)
        return total((logits, stepped, after))

    with record() as choices:
        jax.eval_shape(forward, params, tokens, cache)
        assert choices["decode_step"].impl == ("pallas" if stacked else "ops")
    for transformed in (
        lambda f: jax.grad(f)(params, tokens),
        lambda f: jax.jvp(lambda p: f(p, tokens), (params,), (params,)),
        lambda f: jax.vmap(f, (None, 0))(params, tokens[None] + jnp.arange(2)[:, None, None]),
    ):
        run = jax.jit(lambda backend, t=transformed: t(functools.partial(loss, backend=backend)), static_argnums=0)
        same(run("pallas"), run("xla"))


# Where it runs


def test_what_a_device_has() -> None:
    assert arch_of(GPU).name == "hopper"
    assert (arch_of(GPU).sms, arch_of(GPU).shared_bytes) == (114, HOPPER.shared_bytes)
    abstract = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=132)
    assert arch_of(abstract) == HOPPER
    ampere = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA A100", compute_capability="8.0", core_count=108)
    assert (arch_of(ampere).name, arch_of(ampere).sms) == ("gpu", 108)
    assert str(arch_of(ampere)) == "NVIDIA A100 with compute capability 8.0"
    assert arch_of(jax.devices("cpu")[0]).name == "cpu"


def double() -> Op:
    return Op("double", lambda x: 2 * x, {"hopper": Kernel(lambda x: 2 * x + 0.5)})


def test_one_trace_runs_on_every_platform(gpu: None) -> None:
    """Under jit a trace does not know where its arguments are. Lowering for a CPU takes the reference."""
    x, op = jnp.ones(2), double()
    assert op(x)[0] == 2  # outside jit the device is known
    traced = jax.jit(op).trace(x)
    cpu, cuda = (traced.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "cuda"))
    assert ("5.000000e-01" in cpu, "5.000000e-01" in cuda) == (False, True)
    np.testing.assert_array_equal(jax.jit(op)(x), 2)
    np.testing.assert_array_equal(jax.jit(jax.vmap(op))(x), 2)
    assert jax.jit(jax.grad(lambda x: op(x).sum()))(x)[0] == 2
    with record() as choices:
        jax.eval_shape(lambda x: op(x), x)
    assert choices["double"] == Choice("pallas", "kernel runs here, if lowered for CUDA")


def test_an_explicit_kernel_never_falls_back_on_another_platform(gpu: None) -> None:
    x, op = jnp.ones(2), functools.partial(double(), backend="pallas")
    with pytest.raises(Unsupported, match="double: needs an NVIDIA Hopper GPU, found platform 'cpu'"):
        op(x)
    with pytest.raises(Unsupported, match=r"double: needs an NVIDIA Hopper GPU, found .* lowered for 'cpu'"):
        jax.jit(op)(x)
    assert "5.000000e-01" in jax.jit(op).trace(x).lower(lowering_platforms=("cuda",)).as_text()


def test_smaller_ops_take_the_place_of_a_kernel_on_another_platform(gpu: None) -> None:
    whole, part = Op("whole", lambda x: 2 * x, {"hopper": Kernel(lambda x: 2 * x + 0.5)}), double()
    x = jnp.ones(2)

    def f(x: jax.Array, backend: str) -> jax.Array:
        return whole.try_kernel(functools.partial(part, backend=backend), x, backend=backend)

    run = jax.jit(f, static_argnums=1)
    np.testing.assert_array_equal(run(x, "auto"), 2)
    with pytest.raises(Unsupported, match="double: needs an NVIDIA Hopper GPU"):
        run(x, "pallas")
    text = run.trace(x, "pallas").lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.add") == 1  # the kernel's equations, and none of the reference's


def test_a_model_on_the_cpu_of_a_machine_with_a_gpu(gpu: None) -> None:
    params = tiny.model("bfloat16")
    prompt = tiny.prompt(5)
    wanted = generate(params, jnp.asarray([prompt]), max_new_tokens=4, backend="xla").tokens
    np.testing.assert_array_equal(generate(params, jnp.asarray([prompt]), max_new_tokens=4).tokens, wanted)
    run = jax.jit(generate, static_argnames="max_new_tokens")
    np.testing.assert_array_equal(run(params, jnp.asarray([prompt]), max_new_tokens=4).tokens, wanted)
    session = Session(params, 32)
    assert [t for tokens in session.run(prompt, 4) for t in tokens.ids] == wanted[0].tolist()
    assert session.backends["decode"]["matmul"] == Choice("xla", "needs an NVIDIA Hopper GPU, found platform 'cpu'")
    with pytest.raises(Unsupported, match="needs an NVIDIA Hopper GPU, found platform 'cpu'"):
        list(Session(params, 32, backend="pallas").run(prompt, 4))


def test_kernels_that_write_the_cache_run_on_a_shard_with_some_of_the_heads() -> None:
    """Traced for two H200, with shard_map's checks."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=132)
    axis = dict(axis_types=(jax.sharding.AxisType.Auto,), abstract_device=device)
    mesh, whole, heads = jax.sharding.AbstractMesh((2,), ("model",), **axis), P(), P(None, None, "model")

    def floats(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    def places(rows: int, tokens: int) -> tuple[Any, ...]:
        angles = floats(rows, tokens, 64, dtype=jnp.float32)
        return floats(rows, dtype=jnp.int32), angles, angles, floats(rows, 8, dtype=jnp.int32)

    def attend(y: Any, k: Any, v: Any, start: Any, cos: Any, sin: Any, table: Any) -> Any:
        return OPS["attend_and_write"](y, k, v, table, start, cos, sin, layer=1)

    def project(x: Any, w: Any, k: Any, v: Any, start: Any, cos: Any, sin: Any, table: Any) -> Any:
        return OPS["qkv"](x, w, k, v, start, cos, sin, layer=1, table=table, aligned=True)

    cache = floats(2, 100, 8, 64, 128)
    for op, own, args in (
        (attend, (heads,), (floats(64, 1, 3 * 8 * 128), cache, cache, *places(64, 1))),
        (project, (whole, P("model")), (floats(4, 128, 512), floats(3 * 8 * 128, 512), cache, cache, *places(4, 128))),
    ):
        specs = *own, heads, heads, *(whole,) * 4
        with jax.sharding.use_abstract_mesh(mesh), record() as choices:
            found = jax.eval_shape(jax.shard_map(op, in_specs=specs, out_specs=(heads,) * 3), *args)
        assert [a.shape for a in found[1:]] == [cache.shape] * 2
        assert list(choices.values()) == [KERNEL]


# What ran


def test_a_session_tells_what_ran_whether_it_was_traced_or_not() -> None:
    params = tiny.model()
    found = []
    for settings in ({}, {}, dict(temperature=0.5)):
        session = Session(params, 64)
        assert session.backends == {}
        for _ in session.run(tiny.prompt(6), 3, make_sampling(1, **settings)):
            pass
        found.append(session.backends)
    assert found[0] == found[1]
    assert found[0].keys() == {"prefill", "decode"}
    few = {"attend_and_write", "decode_attention", "decode_step"}  # for few tokens a row
    assert found[0]["prefill"].keys() == set(OPS) - few - {"paged_attention"}
    assert found[0]["decode"].keys() == set(OPS) - {"attention", "paged_attention", "qkv"}
    assert found[0]["decode"]["draw"].why.startswith("greedy")
    assert found[2]["decode"]["draw"].why.startswith("a vocabulary of 96")


# On a GPU

REAL = LlamaConfig(dim=512, n_layers=2, n_heads=8, n_kv_heads=2, hidden_dim=1024, vocab_size=1024)


@pytest.mark.gpu
@pytest.mark.parametrize("stacked", [False, True])
def test_transforms_of_a_model_on_gpu(stacked: bool) -> None:
    params = init(REAL, jax.random.key(0), dtype=jnp.bfloat16, stacked=stacked)
    tokens = jnp.asarray(np.random.RandomState(0).randint(3, 1024, (2, 96)))

    def loss(params: Params, tokens: jax.Array, backend: str) -> jax.Array:
        cache = init_cache(REAL, 2, 128, jnp.bfloat16, stacked=stacked)
        _, cache = forward(params, tokens, cache, backend=backend)
        logits, _ = forward(params, tokens[:, :1], cache, last_only=True, backend=backend)
        return jax.nn.logsumexp(logits, axis=-1).mean()

    found, wanted = (
        [
            jax.jit(jax.grad(functools.partial(loss, backend=backend)))(params, tokens),
            jax.jit(jax.vmap(functools.partial(loss, backend=backend), (None, 0)))(params, jnp.stack([tokens] * 2)),
        ]
        for backend in ("pallas", "xla")
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(*(np.float32(x) for x in (a, b)), atol=1e-3), found, wanted)
    with record() as choices:
        jax.jit(lambda p, t: loss(p, t, "pallas"))(params, tokens)
    assert choices["decode_step"].impl == ("pallas" if stacked else "ops")


@pytest.mark.gpu
def test_arrays_on_the_cpu_of_a_gpu_machine() -> None:
    cpu = jax.devices("cpu")[0]
    params = jax.device_put(init(REAL, jax.random.key(0), dtype=jnp.bfloat16), cpu)
    tokens = jax.device_put(jnp.ones((1, 16), jnp.int32), cpu)
    run = jax.jit(forward, static_argnames="backend")
    for logits in (run(params, tokens)[0], forward(params, tokens)[0]):
        assert logits.devices() == {cpu}
        np.testing.assert_allclose(logits, run(params, tokens, backend="xla")[0], atol=1e-2)
    with pytest.raises(Unsupported, match="lowered for 'cpu'"):
        run(params, tokens, backend="pallas")
    session = Session(params, 32)
    assert len([t for tokens in session.run([5, 6, 7], 4) for t in tokens.ids]) == 4
    assert session.backends["decode"]["matmul"].impl == "xla"

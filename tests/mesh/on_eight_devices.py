"""Everything that a mesh of eight CPU devices shows: results equal one device's. `test_mesh.py` runs this file."""

import contextlib
import functools
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from toy_grammar import walk

import jllama
from bench.peers.ours import Ours
from jllama.decode import jit_decode_chunk, jit_sample_first
from jllama.formats import open_source
from jllama.formats.checkpoint import load, save
from jllama.formats.source import Tensor
from jllama.mesh.place import shard, shardings, unshard
from jllama.params import Params, init
from jllama.sampling import History

# Fewer key heads than the four devices of `model`, so that each is on two.
CONFIG = jllama.LlamaConfig(
    dim=32, n_layers=1, n_heads=8, n_kv_heads=2, hidden_dim=128, vocab_size=96, max_seq_len=64, eos_ids=(2,)
)
TIED = CONFIG.replace(tie_embeddings=True, n_kv_heads=8, attention_bias=True, mlp_bias=True)
TOKENS = np.random.RandomState(0).randint(3, 96, (4, 7))
LENGTHS = np.array([7, 5, 3, 6])
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


@functools.cache
def mesh(data: int = 2, model: int = 4, kind: str = "auto") -> jax.sharding.Mesh:
    return jax.make_mesh((data, model), ("data", "model"), axis_types=(KINDS[kind],) * 2)


@functools.cache
def model(config: jllama.LlamaConfig = CONFIG, **how: Any) -> Params:
    """Weights larger than those of `init`, so that logits differ; biases are not zero."""
    params = init(config, jax.random.key(0), **how)
    noise = jax.random.key(1)

    def larger(path: Any, w: jax.Array) -> jax.Array:
        if jnp.issubdtype(w.dtype, jnp.integer):
            return w
        if w.ndim > 1:
            return (w * 8).astype(w.dtype)
        return w + 0.1 * jax.random.normal(jax.random.fold_in(noise, len(str(path))), w.shape, w.dtype)

    return jax.tree_util.tree_map_with_path(larger, params)


def same(a: Any, b: Any) -> None:
    """Whether two trees are equal, bit for bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@functools.cache
def generated(config: jllama.LlamaConfig = CONFIG, sampled: bool = False, **how: Any) -> jllama.Generated:
    return run(model(config, **how), sampled)


def run(params: Params, sampled: bool = False) -> jllama.Generated:
    sampling = jllama.make_sampling(4, seed=3, temperature=[0.9, 0.0, 1.2, 0.7], top_p=0.9) if sampled else None
    return jllama.generate(params, TOKENS, lengths=LENGTHS, max_new_tokens=6, sampling=sampling)


def same_text(a: jllama.Generated, b: jllama.Generated, tolerance: float = 1e-5) -> None:
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_allclose(a.logprobs, b.logprobs, atol=tolerance)


VARIANTS: dict[str, tuple[jllama.LlamaConfig, dict[str, Any]]] = {
    "float": (CONFIG, {}),
    "tied-biases": (TIED, {}),
    "int8-stacked": (CONFIG, {"quant": "int8", "stacked": True}),
    # With heads of 4, the row of wo would have one group, which no four devices can share.
    # Of hidden units, there are 19 groups, and on four devices one more.
    "int4": (CONFIG.replace(head_dim=16, hidden_dim=608), {"quant": "int4", "group": 32}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_divided_gives_the_logits_and_text_of_one_device(variant: str) -> None:
    config, how = VARIANTS[variant]
    params = model(config, **how)
    on_mesh = shard(params, mesh())
    wanted = shardings(config, mesh(), quant=how.get("quant", "none"), group=how.get("group"), stacked="stacked" in how)
    assert jax.tree.structure(on_mesh) == jax.tree.structure(wanted)
    jax.tree.map(lambda a, s: s == a.sharding or pytest.fail(f"{s} {a.sharding}"), on_mesh, wanted)
    if variant != "int4":
        same(unshard(on_mesh), params)
    # Products with integers round x on a CPU, to a step that depends on the row's part: pallas_kernels/cpu.py.
    same_text(run(on_mesh), run(params), 1e-3 if "quant" in how else 1e-5)
    if variant == "float":
        logits, _ = jllama.forward(params, TOKENS)
        divided, _ = jllama.forward(on_mesh, TOKENS)
        assert divided.sharding.spec == PartitionSpec("data", None, "model")
        np.testing.assert_allclose(divided, logits, atol=1e-5)


@pytest.mark.parametrize(("data", "model_devices"), [(1, 8), (4, 2)])
def test_sampled_text_is_the_same_on_any_mesh(data: int, model_devices: int) -> None:
    devices = np.array(jax.devices()[: data * model_devices]).reshape(data, model_devices)
    other = jax.sharding.Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    same_text(run(shard(model(), other), sampled=True), generated(sampled=True))


@pytest.mark.parametrize(("kind", "context"), [("auto", True), ("explicit", False), ("explicit", True)])
def test_axes_of_any_type_with_and_without_a_mesh_that_is_set(kind: str, context: bool) -> None:
    on_mesh = shard(model(), mesh(kind=kind))
    with jax.set_mesh(mesh(kind=kind)) if context else contextlib.nullcontext():
        same_text(run(on_mesh, sampled=True), generated(sampled=True))
        rows = jax.device_put(TOKENS, NamedSharding(mesh(kind=kind), PartitionSpec("data")))
        divided, cache = jax.jit(jllama.forward)(on_mesh, rows)
        assert cache is None
    np.testing.assert_allclose(divided, jllama.forward(model(), TOKENS)[0], atol=1e-5)


def test_one_axis_is_enough() -> None:
    one = jax.make_mesh((4,), ("model",), devices=jax.devices()[:4])
    same_text(run(shard(model(), one)), generated())


def test_rows_on_a_mesh_with_params_that_know_of_none() -> None:
    four = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])  # Explicit, as `make_mesh` makes them
    rows = jax.device_put(TOKENS, NamedSharding(four, PartitionSpec("data")))
    params = jax.device_put(model(), NamedSharding(four, PartitionSpec()))
    found = jllama.generate(params, rows, lengths=LENGTHS, max_new_tokens=6)
    assert found.tokens.sharding.spec[0] == "data"
    same_text(found, generated())
    with pytest.raises(jllama.InputError, match=r"params: expected jllama.shard\(params, mesh\)"):
        jllama.forward(model(), jax.device_put(TOKENS, NamedSharding(mesh(kind="explicit"), PartitionSpec("data"))))


def test_gradients_are_those_of_one_device() -> None:
    params = model(CONFIG.replace(n_kv_heads=4))
    on_mesh = shard(params, mesh())

    def loss(params: Params) -> jax.Array:
        return jnp.mean(jax.nn.logsumexp(jllama.forward(params, TOKENS)[0], axis=-1))

    found, wanted = unshard(jax.jit(jax.grad(loss))(on_mesh)), jax.jit(jax.grad(loss))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, wanted)


def test_only_sums_cross_devices_two_a_layer() -> None:
    config = CONFIG.replace(n_layers=3)
    on_mesh = shard(model(config), mesh())
    for settings, gathered in (({}, 3 * 2 * 4), ({"temperature": 0.8}, 2 * 96)):
        cache = jllama.init_cache(config, 4, 64, jnp.float32, mesh=mesh())
        logits = np.zeros((4, CONFIG.vocab_size), np.float32)
        sampling = jllama.make_sampling(4, **settings)
        begin = logits, cache, sampling, np.full(4, 9, np.int32), np.full((4, 4), -1, np.int32), History()
        (state, _), _ = jit_sample_first(*begin, mesh=mesh())
        text = jit_decode_chunk.lower(on_mesh, state, steps=3).compile().as_text()
        found = crossings(text)
        # One sum for each half of a layer, one for the embedding, and what the draw needs.
        assert Counter(name for name, _ in found) == {"all-reduce": 2 * config.n_layers + 1, "all-gather": 1}
        assert [size for name, size in found if name == "all-gather"] == [gathered]


def crossings(hlo: str) -> list[tuple[str, int]]:
    """Every collective operation of a compiled program, and how many elements it gives."""
    names = "all-reduce|all-gather|all-to-all|collective-permute|collective-broadcast|reduce-scatter|ragged-all-to-all"
    found = re.findall(rf"= \(?\w+\[([\d,]*)\]\S* ({names})(?:-start)?\(", hlo)
    assert len(found) == len(re.findall(rf" (?:{names})(?:-start)?\(", hlo))
    return [(name, int(np.prod([int(n) for n in shape.split(",") if n]))) for shape, name in found]


@pytest.mark.parametrize(("kind", "how"), [("auto", {}), ("explicit", {"quant": "int8", "stacked": True})])
def test_init_on_a_mesh_gives_the_weights_of_one_device(kind: str, how: dict[str, Any]) -> None:
    found = init(CONFIG, jax.random.key(5), mesh=mesh(kind=kind), **how)
    wanted = shard(init(CONFIG, jax.random.key(5), **how), mesh(kind=kind))
    if how:  # a program for several devices may divide by multiplying: scales differ in the last bit
        jax.tree.map(lambda a, b: np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=2e-7), found, wanted)
    else:
        same(found, wanted)
    jax.tree.map(lambda a, b: a.sharding == b.sharding or pytest.fail(f"{a.sharding}"), found, wanted)


FORMS = ("hf", "native-int8", "native-int4", "bin", "meta", "llama2c-0", "llama2c-2", "gguf")


@pytest.mark.parametrize("form", FORMS)
def test_load_reads_every_shard_once_and_save_joins_them(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoints.source(checkpoints.UNTIED.replace(dim=128, head_dim=32, hidden_dim=256, n_layers=1))
    path = tmp_path / "model"
    if form == "meta":
        checkpoints.write_meta(path, source, 2)
    else:
        path = checkpoints.make(form, source, path)
    opened = open_source(path)
    read: Counter[tuple[str, int]] = Counter()
    plain, plain_floats = Tensor.part, Tensor.floats

    def part(self: Tensor, begin: int, end: int, left: int, right: int) -> Any:
        if self.where in wheres:  # and not the parts that a joined tensor reads in turn
            read[self.where, id(self)] += (end - begin) * (right - left)
        return plain(self, begin, end, left, right)

    def floats(self: Tensor, begin: int, end: int) -> Any:  # what reads a table of integers that becomes floats
        read[self.where, id(self)] += (end - begin) * self.shape[-1]
        return plain_floats(self, begin, end)

    matrices = {name: t for name, t in opened.tensors.items() if len(t.shape) == 2}
    wheres = {t.where for t in matrices.values()}
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "part", part)
        patch.setattr(Tensor, "floats", floats)
        loaded = load(opened, mesh=mesh())
    for name, t in matrices.items():
        times = 2 if name.endswith((".wk", ".wv")) else 1  # two key heads on four shards
        assert read[t.where, id(t)] == times * np.prod(t.shape), name
    alone = load(opened)
    same(loaded, shard(alone, mesh()))
    save(loaded, tmp_path / "saved")
    same(load(tmp_path / "saved"), alone)


def test_load_quantises_on_a_mesh(tmp_path: Path) -> None:
    path = checkpoints.make("hf", checkpoints.source(CONFIG.replace(head_dim=16)), tmp_path / "model")
    how = dict(quant="int8", stacked=True)
    same(load(path, mesh=mesh(4, 2), **how), shard(load(path, **how), mesh(4, 2)))


def test_hidden_units_are_added_where_groups_do_not_divide(tmp_path: Path) -> None:
    """19 groups of 32 over 4 devices: one more, of zeros, whether params are made, put, loaded or quantised there."""
    config, how = VARIANTS["int4"][0], dict(quant="int4", group=32)
    floats = init(config, jax.random.key(0))
    alone, divided = init(config, jax.random.key(0), **how), init(config, jax.random.key(0), mesh=mesh(), **how)
    assert divided.config.hidden_dim == 640
    same(divided, shard(alone, mesh()))
    for name, params in (("floats", floats), ("quantised", alone), ("wide", divided)):
        save(params, tmp_path / name)
    same(load(tmp_path / "floats", mesh=mesh(), **how), divided)
    same(load(tmp_path / "quantised", mesh=mesh()), divided)
    same(load(tmp_path / "wide"), unshard(divided))


UNEVEN: dict[str, tuple[Callable[[], Any], str]] = {
    "heads": (
        lambda: shardings(CONFIG.replace(n_heads=6, head_dim=8), mesh()),
        "'model' .* has 4 devices, which do not divide n_heads 6; this model divides over 1, 2$",
    ),
    "all": (
        lambda: shardings(jllama.preset("demo"), mesh()),
        "do not divide n_heads 3; this model divides over 1$",
    ),
    "groups": (
        lambda: shard(model(CONFIG.replace(head_dim=8), quant="int4", group=32), mesh()),
        "do not divide the 2 groups of 32 inputs of wo; they divide over 1, 2$",
    ),
    "rows": (
        lambda: jllama.generate(shard(model(), mesh()), TOKENS[:3], max_new_tokens=2),
        "'data' has 2 devices: expected a multiple of 2 rows, found 3",
    ),
    "axis": (
        lambda: shardings(CONFIG, jax.make_mesh((8,), ("tensor",))),
        "expected the axes 'data' and 'model', found 'tensor'$",
    ),
}


@pytest.mark.parametrize("case", UNEVEN)
def test_what_does_not_divide_is_named(case: str) -> None:
    attempt, message = UNEVEN[case]
    with pytest.raises(jllama.InputError, match=message):
        attempt()


def arrivals(engine: jllama.Engine, seed: int) -> list[Any]:
    """Requests that come at random between the turns of an engine, and their completions."""
    random = np.random.RandomState(seed)
    prefix = random.randint(3, 96, 20).tolist()
    handles = []
    for i in range(10):
        prompt = [*(prefix if i % 3 else []), *random.randint(3, 96, random.randint(1, 9)).tolist()]
        temperature = [0.0, 0.9][i % 2]
        settings = jllama.SamplingSettings(temperature=temperature, seed=i, top_p=0.9)
        handles.append(engine.submit(jllama.Request(prompt, int(random.randint(2, 9)), settings)))
        for _ in range(random.randint(0, 3)):
            engine.step()
    for _ in engine.events():
        pass
    return [h.completion for h in handles]


def test_the_engine_gives_one_devices_text_under_random_arrivals() -> None:
    how = dict(slots=4, pages=8, max_len=64)
    one = jllama.Engine(model(), **how)
    alone = arrivals(one, 3)
    engine = jllama.Engine(shard(model(), mesh(kind="explicit")), **how)
    for _ in range(2):  # the second time, the pool holds what the first has left
        for found, wanted in zip(arrivals(engine, 3), alone, strict=True):
            assert found.ids == wanted.ids
            np.testing.assert_allclose(found.logprobs, wanted.logprobs, atol=1e-5)
    rows = TOKENS[:, :2].tolist(), TOKENS[:, 2:].tolist()
    scored, expected = engine.score(*rows), one.score(*rows)
    for found, wanted in zip(scored, expected, strict=True):
        np.testing.assert_allclose(found.logprobs, wanted.logprobs, atol=1e-5)
        assert found.greedy == wanted.greedy


def test_penalties_reports_and_constraints_of_the_engine() -> None:
    how = dict(slots=4, pages=8, max_len=64)
    settings = jllama.SamplingSettings(
        temperature=0.8, seed=5, repetition_penalty=1.2, presence_penalty=0.3, top_logprobs=3, min_tokens=4
    )
    prompts = [row[:n].tolist() for row, n in zip(TOKENS, LENGTHS, strict=True)]
    engines = [jllama.Engine(params, **how) for params in (model(), shard(model(), mesh()))]
    grammars = [walk(96, 1), None, walk(96, 2, length=4), None]
    requests = [
        jllama.Request(prompt, 6, replace(settings, seed=i), constraint=grammar)
        for i, (prompt, grammar) in enumerate(zip(prompts, grammars, strict=True))
    ]
    alone, divided = ([h.completion for h in engine.submit_all(requests)] for engine in engines)
    for engine in engines:
        for _ in engine.events():
            pass
    assert all(g is None or g.holds(c.ids) for g, c in zip(grammars, divided, strict=True))
    assert [c.ids for c in alone] == [c.ids for c in divided]
    assert [[list(top) for top in c.top_logprobs] for c in alone] == [
        [list(top) for top in c.top_logprobs] for c in divided
    ]


def test_rollout_gives_one_devices_text() -> None:
    sampling = jllama.make_sampling(8, seed=2, temperature=0.9, repetition_penalty=1.1)
    run = functools.partial(jllama.rollout, slots=4, max_new_tokens=5, n=2)
    alone = jax.jit(run)(model(), TOKENS, LENGTHS, sampling)
    traced = jax.jit(run).trace(shard(model(), mesh()), TOKENS, LENGTHS, sampling)
    same_text(traced.lower().compile()(shard(model(), mesh()), TOKENS, LENGTHS, sampling), alone)
    # All groups along ``data`` leave the loop at the same step, because a persistent step starts on all devices of the
    # mesh at once. So a group asks the others whether any goes on: once before the loop, and once in it.
    assert str(traced.jaxpr).count("pmax[axes=('data',)") == 2


def test_a_comparison_runs_on_a_mesh() -> None:
    """`bench.compare --tp 2 --dp 2`: its process of ours draws weights on the mesh, and checks its own tokens."""
    job = dict(model="random:stories260k", dtype="int8", backend="xla", tp=2, dp=2, rooms={"2": 32})
    ours = Ours(job)
    assert ours.params is not None
    wanted = shardings(ours.params.config, ours.params.mesh, quant="int8")
    assert all(jax.tree.leaves(jax.tree.map(lambda a, s: a.sharding.is_equivalent_to(s, a.ndim), ours.params, wanted)))
    prompts = [[1, 5, 7], [1, 9, 4]]
    made = ours.generate(prompts, 5)
    assert [len(row) for row in made.ids] == [5, 5]
    assert max(ours.score(prompts[1], made.ids[1])["gaps"]) < 0.3
    assert "do not divide" in ours.shape(job["model"], tp=3)["refused"]
    assert "expected 16 devices, found 8" in ours.shape(job["model"], tp=4, dp=4)["refused"]


def test_a_session_streams_one_prompt_on_a_mesh() -> None:
    texts = []
    for params in (model(), shard(model(), mesh(kind="explicit"))):
        session = jllama.Session(params, 64, chunk=4)
        prompt = TOKENS[0].tolist()
        sampling = jllama.make_sampling(1, seed=1, temperature=0.9)
        first = [i for chunk in session.run(prompt, 9, sampling) for i in chunk.ids]
        longer = [*prompt, *first, 5]  # continues what the cache holds
        texts.append((first, [i for chunk in session.run(longer, 40) for i in chunk.ids]))
        assert session.timings.prompt_tokens < len(longer)
    assert texts[0] == texts[1]


def test_params_in_another_layout_are_moved_once_and_it_is_said() -> None:
    with pytest.warns(UserWarning, match="params were in another layout, and were moved"):
        engine = jllama.Engine(jax.device_put(shard(model(), mesh()), NamedSharding(mesh(), PartitionSpec())), slots=4)
    with pytest.warns(UserWarning, match="params of another layout were moved to the mesh {'data': 2, 'model': 4}"):
        engine.params = model()
    engine.params = shard(model(), mesh())  # no warning: nothing moves


def test_what_is_on_the_mesh_is_handed_over_without_a_copy() -> None:
    trained = shard(model(), mesh(kind="explicit"))
    again = shard(trained, mesh(kind="explicit"))
    pointers = [
        [piece.data.unsafe_buffer_pointer() for a in jax.tree.leaves(params) for piece in a.addressable_shards]
        for params in (trained, again, jllama.Engine(trained, slots=4, pages=4).params)
    ]
    assert pointers[0] == pointers[1] == pointers[2]

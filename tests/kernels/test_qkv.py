"""The QKV product with rotary and cache write against its float32 reference: interpreted, lowered for an H200, and
compiled on one (marker gpu)."""

import dataclasses
import functools
import types
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from h200 import H200
from jax.experimental.pallas import mosaic_gpu as plgpu
from test_products import FORMATS, abstract, error, interpreter, lower, normal, race_free, weight

from jllama.cache import init_cache
from jllama.config import LlamaConfig, preset
from jllama.model import forward
from jllama.params import init, stack
from pallas_kernels import (
    PAGE,
    Choice,
    LayerView,
    QuantizedTensor,
    Unsupported,
    dequantize,
    materialize,
    qkv,
    record,
)
from pallas_kernels.hopper.gemm.large_m_plan import LargeMTiles
from pallas_kernels.qkv import CASES, check_qkv, qkv_kernel, qkv_reference

pytestmark = pytest.mark.timeout(120)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: the sizes of a model and of a cache, and the number of new tokens per sequence."""

    start: tuple[int, ...]
    tokens: int
    max_len: int
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 128
    dim: int = 128
    fmt: str = "bf16"
    layers: int | None = None
    table: tuple[tuple[int, ...], ...] | None = None  # the pages of every sequence, if the cache has pages
    pages: int = 9

    @property
    def out(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def lead(self) -> tuple[int, ...]:
        return () if self.layers is None else (self.layers,)

    @property
    def options(self) -> dict[str, Any]:
        """The layer that is used, the last but one, and the table."""
        layer = {} if self.layers is None else {"layer": self.layers - 2}
        return layer if self.table is None else layer | {"table": jnp.asarray(self.table), "aligned": True}

    def weight(self, w: Any) -> Any:
        return w if self.layers is None else LayerView(w, self.layers - 2)

    def shapes(self) -> list[Any]:
        """x, w, k, v, start, cos and sin."""
        batch = len(self.start)
        rows, size = (batch, self.max_len) if self.table is None else (self.pages, PAGE)
        cache = jax.ShapeDtypeStruct((*self.lead, rows, self.kv_heads, size, self.head_dim), jnp.bfloat16)
        angles = jax.ShapeDtypeStruct((batch, self.tokens, self.head_dim // 2), jnp.float32)
        return [
            jax.ShapeDtypeStruct((batch, self.tokens, self.dim), jnp.bfloat16),
            self.weight(abstract(self.fmt, *self.lead, self.out, self.dim)),
            *(cache, cache),
            jax.ShapeDtypeStruct((batch,), jnp.int32),
            *(angles, angles),
        ]

    def arguments(self) -> list[Any]:
        x, _, k, _, _, cos, _ = self.shapes()
        angles = np.random.RandomState(4).uniform(0, 6, cos.shape)
        return [
            normal(0, *x.shape),
            self.weight(weight(self.fmt, *self.lead, self.out, self.dim)),
            *(normal(seed, *k.shape) for seed in (2, 3)),
            jnp.asarray(self.start, jnp.int32),
            *(jnp.asarray(a, jnp.float32) for a in (np.cos(angles), np.sin(angles))),
        ]


def check(case: Case, arguments: list[Any], found: tuple[jax.Array, ...]) -> None:
    """Queries, new keys and new values are the reference's. The rest of the cache is unchanged, except for free slots
    of the same heads, up to a chunk after the last token."""
    x, w, *cache, start, cos, sin = materialize(arguments)

    @jax.jit
    def exact(x: jax.Array, w: Any, k: jax.Array, v: jax.Array) -> Any:
        if isinstance(w, QuantizedTensor):
            w = dequantize(w, x.dtype if w.scale.shape[-1] > 1 else jnp.float32)
        return qkv_reference(*(a.astype(jnp.float32) for a in (x, w, k, v)), start, cos, sin, **case.options)

    q, *wanted = exact(x, w, *cache)
    assert error(found[0], q) < 3e-3
    if case.table is not None:
        check_pages(case, cache, found[1:], wanted)
        return
    for old, new, reference in zip(cache, found[1:], wanted, strict=True):
        old, new, reference = (
            np.asarray(a, np.float32).reshape(case.layers or 1, *a.shape[-4:]) for a in (old, new, reference)
        )
        layer = case.options.get("layer", 0)
        for b, first in enumerate(case.start):
            end = first + case.tokens
            if first < case.max_len:
                assert error(new[layer, b, :, first:end], reference[layer, b, :, first:end]) < 3e-3
            for a in (new, old):
                a[layer, b, :, first : first - (-case.tokens // LargeMTiles.chunk) * LargeMTiles.chunk] = 0
        np.testing.assert_array_equal(new, old)


def check_pages(case: Case, cache: list[jax.Array], found: Sequence[jax.Array], wanted: list[jax.Array]) -> None:
    """The slots that the reference writes are its, and all others are unchanged, but for the end of the last chunk."""
    layer = case.options["layer"]
    positions = [np.arange(first, first - (-case.tokens // 32) * 32) for first in case.start]
    assert case.table is not None
    for old, new, reference in zip(cache, found, wanted, strict=True):
        old, new, reference = (np.array(a, np.float32) for a in (old, new, reference))
        written = np.zeros((case.layers, case.pages, PAGE), bool)
        free = written.copy()
        for pages, mine in zip(case.table, positions, strict=True):
            for i, p in enumerate(mine):
                if p // PAGE < len(pages) and 0 <= pages[p // PAGE] < case.pages:
                    (written if i < case.tokens else free)[layer, pages[p // PAGE], p % PAGE] = True
        assert written.any()
        new, old, reference = (a.swapaxes(2, 3) for a in (new, old, reference))
        assert error(new[written], reference[written]) < 3e-3
        np.testing.assert_array_equal(new[~(written | free)], old[~(written | free)])


# The interpreter: small shapes, every path

SMALL = {
    "odd-tokens": Case((37,), 100, 176),
    "int8-one-layer-of-a-stack": Case((37,), 100, 144, fmt="int8", layers=3),  # the cache ends within the last chunk
    "int8-g32": Case((0,), 96, 96, fmt="int8-g32"),
    "int4-several-starts": Case((37, 2), 96, 144, kv_heads=2, fmt="int4-g128"),
    "no-room-for-the-last": Case((60, 0, 96), 64, 96, heads=1),
    "no-room-at-all": Case((64, 99), 64, 64, heads=1, layers=2),
    "heads-of-64": Case((37, 2), 96, 144, heads=2, kv_heads=1, head_dim=64, fmt="int4-g128"),  # a tile has k and v
    "pages": Case((32, 160, 64), 96, 0, layers=2, table=((6, 2, 4, 99), (6, 2, 4, 3), (99, 5, 99, 99)), heads=1),
    "pages-past-the-table": Case((96, 64), 96, 0, heads=1, layers=3, table=((2, 8), (7, -1)), fmt="int8"),
    "pages-odd-tokens": Case((32,), 100, 0, layers=2, table=((3, 1, 4),), head_dim=64, heads=4, kv_heads=2, fmt="int8"),
    "heads-of-64-odd-tokens": Case((5,), 70, 136, heads=4, kv_heads=2, head_dim=64, fmt="int8", layers=2),
}


@pytest.mark.parametrize("name", SMALL)
def test_interpreted(name: str) -> None:
    case = SMALL[name]
    arguments = case.arguments()
    check_qkv(*arguments, **case.options)
    tiles = LargeMTiles(out=128, rows=128, depth=2, row_splits=2)
    found = qkv_kernel(*arguments, **case.options, tiles=tiles, sms=2, interpret=interpreter())
    race_free(found[0])
    check(case, arguments, found)


# Lowered for an H200: the real shapes


@pytest.mark.parametrize(
    ("fmt", "start", "tokens", "layers"),
    [("bf16", (0, 0), 2048, 3), ("int8", (0,), 512, None), ("int4-g128", (0,), 999, 3)],
)
@pytest.mark.parametrize("name", CASES)
def test_real_shapes_lower(name: str, fmt: str, start: tuple[int, ...], tokens: int, layers: int | None) -> None:
    case = Case(start, tokens, 4104, **CASES[name], fmt=fmt, layers=layers)
    check_qkv(*case.shapes(), **case.options)
    lower(functools.partial(qkv_kernel, **case.options), *case.shapes())


PIECES = dict(
    start=tuple(range(0, 2048, 128)), tokens=128, max_len=0, layers=3, pages=64, table=(tuple(range(32)),) * 16
)


@pytest.mark.parametrize("fmt", ["bf16", "int8"])
@pytest.mark.parametrize("name", ["7b", "tinyllama"])
def test_pieces_of_a_prompt_lower(name: str, fmt: str) -> None:
    case = Case(**PIECES, **CASES[name], fmt=fmt)
    check_qkv(*case.shapes(), **case.options)
    lower(functools.partial(qkv_kernel, **case.options), *case.shapes())


# In the model

MODEL = LlamaConfig(
    dim=128, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=64, hidden_dim=256, vocab_size=128, max_seq_len=256
)


@pytest.mark.parametrize("stacked", [False, True])
def test_prompts_through_the_interpreted_kernel(monkeypatch: pytest.MonkeyPatch, stacked: bool) -> None:
    """Two prompts of different lengths, each in two pieces. The second piece overwrites the padding of the first.
    Large weights amplify rounding to bfloat16: the reference rounds before the rotation, the kernel after it."""
    params = tiny.model("bfloat16", MODEL)
    params = stack(params) if stacked else params
    pieces = [jnp.asarray([tiny.prompt(64, seed), tiny.prompt(64, seed + 1)]) for seed in (0, 2)]

    def try_kernel(_: Any, *arguments: Any, backend: str, **options: Any) -> Any:
        check_qkv(*arguments, **options)
        tiles = LargeMTiles(out=128, rows=128, depth=2)
        # The interpreter's threads wait for one another, so no other computation may occupy the machine's threads.
        jax.block_until_ready(arguments)
        out = qkv_kernel(*arguments, **options, tiles=tiles, sms=2, interpret=plgpu.InterpretGPUParams())
        return jax.block_until_ready(out)

    found = []
    for fused in (False, True):
        if fused:
            monkeypatch.setattr("jllama.model.qkv", types.SimpleNamespace(try_kernel=try_kernel))
        cache = init_cache(MODEL, 2, 136, jnp.bfloat16, stacked=stacked)
        for tokens, lengths in zip(pieces, ((64, 40), (64, 64)), strict=True):
            logits, cache = forward(params, tokens, cache, lengths=jnp.asarray(lengths), backend="xla")
        assert cache is not None
        k, v = ([materialize(cache.layer(i)[j]) for i in range(MODEL.n_layers)] for j in (0, 1))
        found.append((logits, [[a[0, :, :128], a[1, :, :104]] for a in (*k, *v)]))
    assert max(jax.tree.leaves(jax.tree.map(error, *found))) < 0.05


def test_a_prompt_of_the_7b_lowers_in_place() -> None:
    """Each kernel is lowered once, for any number of layers, and the cache is never copied."""
    config, tokens = preset("7b"), jax.ShapeDtypeStruct((1, 512), jnp.int32)
    params = jax.eval_shape(lambda: init(config, jax.random.key(0), dtype=jnp.bfloat16))
    cache = jax.eval_shape(lambda: init_cache(config, 1, 2048, jnp.bfloat16))
    run = jax.jit(functools.partial(forward, last_only=True), donate_argnums=2)
    with jax.sharding.use_abstract_mesh(H200), record() as choices:
        text = run.trace(params, tokens, cache).lower(lowering_platforms=("cuda",)).as_text()
    assert choices["qkv"] == Choice("pallas", "kernel runs here")
    # Norm, qkv, attention, o, gate and up, down; in the last layer, from o on for the last token alone; and the head.
    assert text.count("@mosaic_gpu") == 10
    assert text[text.index("@main") :].splitlines()[0].count("tf.aliasing_output") == len(jax.tree.leaves(cache))
    whole = [line for line in text.splitlines() if "x2048x128xbf16>" in line and "func" not in line]
    assert whole
    assert not any(word in line for line in whole for word in ("slice", "scatter", "copy", "pad"))


# What the kernel refuses

ROWS = Case((0,), 512, 1024)
REFUSED = {
    "few rows": (dataclasses.replace(ROWS, tokens=64), "64 rows: smaller GEMMs take up to 64"),
    "head_dim": (dataclasses.replace(ROWS, head_dim=96), "head_dim must be 64 or 128, found 96"),
    "ragged": (dataclasses.replace(ROWS, start=(0, 3), tokens=70), "70 tokens of 2 sequences"),
    "outputs": (dataclasses.replace(ROWS, head_dim=64, heads=1), "192 outputs: must be a multiple of 128"),
    "pages": (dataclasses.replace(ROWS, layers=2, table=((0,), (1,))), "one batch size"),
    "no queries": (dataclasses.replace(ROWS, heads=0), "are not q's heads"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    case, reason = REFUSED[name]
    with pytest.raises(Unsupported, match=reason):
        check_qkv(*case.shapes(), **case.options)


@pytest.mark.parametrize(
    ("place", "shape", "dtype", "reason"),
    [
        (2, (1, 1, 1024, 128), jnp.float32, "must have one dtype"),
        (3, (1, 1, 1024, 64), jnp.bfloat16, "k and v must have one shape, and x, start and the cache one batch size"),
        (4, (2,), jnp.int32, "k and v must have one shape, and x, start and the cache one batch size"),
        (5, (1, 512, 128), jnp.float32, "cos .1, 512, 128. and sin"),
    ],
)
def test_refused_arguments(place: int, shape: tuple[int, ...], dtype: Any, reason: str) -> None:
    arguments = ROWS.shapes()
    arguments[place] = jax.ShapeDtypeStruct(shape, dtype)
    with pytest.raises(Unsupported, match=reason):
        check_qkv(*arguments)


def test_pages_are_written_from_known_multiples_on() -> None:
    """A chunk of 32 tokens is one copy, which must not go on in another page."""
    case = dataclasses.replace(ROWS, layers=2, table=((0,),))
    check_qkv(*case.shapes(), **case.options)
    with pytest.raises(Unsupported, match="rows may start anywhere in a page"):
        check_qkv(*case.shapes(), **case.options | {"aligned": False})
    arguments = case.shapes()
    arguments[2:4] = [jax.ShapeDtypeStruct((2, 9, 1, 48, 128), jnp.bfloat16)] * 2
    with pytest.raises(Unsupported, match="pages of 48 positions: must hold a multiple of 32"):
        check_qkv(*arguments, **case.options)


# Compiled, on a Hopper GPU

SEVERAL = ((9, 2, 5, 7, 1), (9, 2, 5, 7, 1), (0, 99, 3, 99, 99), (4, 8, 6, 10, 99))
LARGE = {
    **{name: Case((0,), 512, 1024, **sizes) for name, sizes in CASES.items()},
    "7b-odd": Case((300,), 1001, 1304, **CASES["7b"], layers=2),
    "70b-several": Case((0, 777), 2048, 2824, **CASES["70b"], layers=2),
    "tinyllama-several": Case((5, 0, 1), 160, 168, **CASES["tinyllama"], layers=2),
    **{f"{name}-pieces": Case(**PIECES, **CASES[name]) for name in CASES},
    "7b-pieces-of-several": Case((32, 160, 0, 64), 128, 0, **CASES["7b"], layers=2, table=SEVERAL, pages=20),
}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "fmt"), [(name, case.fmt) for name, case in SMALL.items()] + [(name, f) for name in LARGE for f in FORMATS]
)
def test_on_gpu(name: str, fmt: str) -> None:
    case = dataclasses.replace((SMALL | LARGE)[name], fmt=fmt)
    arguments = case.arguments()
    run = jax.jit(functools.partial(qkv, **case.options, backend="pallas"), donate_argnums=(2, 3))
    found = run(*arguments[:2], *(a.copy() for a in arguments[2:4]), *arguments[4:])
    with jax.default_matmul_precision("highest"):
        check(case, arguments, found)

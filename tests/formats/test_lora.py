"""LoRA adapters: a model with one gives the logits of transformers and peft, for every way to merge it."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import make_golden
import make_lora_golden
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jllama
from jllama.errors import InputError
from jllama.formats import open_source
from jllama.formats.lora import load_lora, lora_spec, merge_lora, with_lora

TESTS = Path(__file__).parents[1]
LORA = TESTS / "data" / "lora"
NAMES = tuple(make_lora_golden.ADAPTERS)
RELATIVE = 1e-5  # of float32 logits, to the largest
TWO = ((LORA / "attention", 0.5), (LORA / "one-layer", 2.0))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    (folder / "config.json").write_text(json.dumps(make_golden.config(make_lora_golden.CASE)))
    save_file(make_golden.weights(make_lora_golden.CASE), folder / "model.safetensors")
    return folder


def assert_golden(params: jllama.Params, name: str) -> None:
    with np.load(TESTS / "golden" / "lora" / "logits.npz") as golden:
        expected = golden[name]
    tokens = jnp.asarray(make_golden.prompts(make_lora_golden.CASE))
    found = np.asarray(jllama.forward(params, tokens)[0])[:, ::5]
    assert np.abs(found - expected).max() < RELATIVE * np.abs(expected).max()


@pytest.mark.parametrize("name", NAMES)
def test_merged_at_load_it_gives_peft_s_logits(base: Path, name: str) -> None:
    assert_golden(jllama.load(with_lora(open_source(base), [(LORA / name, 1.0)])), name)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_so_does_the_pytree_under_jit(base: Path, name: str, stacked: bool) -> None:
    params = jllama.load(base, stacked=stacked)
    assert_golden(jax.jit(merge_lora)(params, load_lora(LORA / name, params.config)), name)


def test_two_with_weights(base: Path) -> None:
    assert_golden(jllama.load(with_lora(open_source(base), TWO)), "two")
    params = jllama.load(base)
    for path, weight in TWO:
        params = merge_lora(params, load_lora(path, params.config), weight)
    assert_golden(params, "two")


def test_the_adapter_changes_the_model(base: Path) -> None:
    with pytest.raises(AssertionError):
        assert_golden(jllama.load(base), "attention")
    with pytest.raises(AssertionError):
        assert_golden(jllama.load(with_lora(open_source(base), [(LORA / "attention", 0.9)])), "attention")


def test_a_gradient_goes_through_it(base: Path) -> None:
    params = jllama.load(base)
    adapter = load_lora(LORA / "one-layer", params.config)
    tokens = jnp.asarray(make_golden.prompts(make_lora_golden.CASE))[:1, :8]
    gradient = jax.grad(lambda a: jllama.forward(merge_lora(params, a), tokens)[0].sum())(adapter)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradient))


def test_quantised_weights_are_merged_before_they_are_quantised(base: Path) -> None:
    plain, quantised = (jllama.load(with_lora(open_source(base), TWO), quant=quant) for quant in ("none", "int8"))
    tokens = jnp.asarray(make_golden.prompts(make_lora_golden.CASE))
    a, b = (jllama.forward(params, tokens)[0] for params in (plain, quantised))
    assert float(jnp.abs(a - b).max()) < 0.1 * float(jnp.abs(a).max())
    with pytest.raises(InputError, match="expected float weights, found quantised ones"):
        merge_lora(quantised, load_lora(LORA / "all", quantised.config))


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    return Path(shutil.copytree(LORA / "attention", tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("peft_type", "LOHA", "peft_type: expected LORA, found LOHA"),
        ("bias", "all", "bias: expected none, found all"),
        ("use_dora", True, "use_dora: expected none .*, found True"),
        ("fan_in_fan_out", True, "fan_in_fan_out: expected False, found True"),
        ("rank_pattern", {"q_proj": 8}, "rank_pattern: expected False, found"),
        ("alpha_pattern", {"q_proj": 8}, "alpha_pattern: expected False, found"),
        ("modules_to_save", ["embed_tokens"], "modules_to_save: expected none"),
        ("init_lora_weights", "pissa", "init_lora_weights: expected True, found pissa"),
        ("some_new_option", 3, "some_new_option: expected none .*, found 3"),
        ("layer_replication", [[0, 1]], "layer_replication: expected none"),
        ("r", 0, "r: expected an integer from 1"),
        ("r", 8, r"lora_A\.weight: shape: expected \[8, 32\], found \[4, 32\]"),
        ("lora_alpha", "x", "lora_alpha: expected a number"),
        ("use_rslora", "x", "use_rslora: expected true or false"),
    ],
)
def test_an_option_that_is_not_supported_is_named(broken: Path, option: str, value: Any, message: str) -> None:
    file = broken / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {option: value}))
    with pytest.raises(InputError, match=message):
        load_lora(broken, config())


def config() -> jllama.LlamaConfig:
    from jllama.config import from_hf

    return from_hf(make_golden.config(make_lora_golden.CASE))


PREFIX = "base_model.model.model.layers"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{PREFIX}.9.self_attn.q_proj.lora_A.weight": (4, 32)}, "expected a projection of one of 2 layers"),
        ({f"{PREFIX}.0.input_layernorm.lora_A.weight": (4, 32)}, "expected a projection"),
        ({f"{PREFIX}.0.self_attn.q_proj.lora_magnitude_vector": (32,)}, "expected lora_A or lora_B of a projection"),
        ({f"{PREFIX}.0.self_attn.k_proj.lora_A.weight": (4, 32)}, "layers.0.wk: expected lora_A and lora_B"),
        ({f"{PREFIX}.0.self_attn.q_proj.lora_B.weight": (31, 4)}, r"shape: expected \[32, 4\], found \[31, 4\]"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": (4, 120)}, "expected lora_A or lora_B"),
    ],
)
def test_a_tensor_that_is_wrong_is_named(broken: Path, changes: dict[str, tuple[int, ...]], message: str) -> None:
    arrays = load_file(broken / "adapter_model.safetensors")
    arrays |= {name: np.zeros(shape, np.float32) for name, shape in changes.items()}
    save_file(arrays, broken / "adapter_model.safetensors")
    with pytest.raises(InputError, match=message):
        load_lora(broken, config())


def test_what_is_no_adapter(tmp_path: Path, base: Path) -> None:
    with pytest.raises(InputError, match=r"expected a directory with adapter_config\.json"):
        load_lora(tmp_path / "none", config())
    with pytest.raises(InputError, match=r"adapter_config\.json: cannot be read"):
        load_lora(base, config())
    with pytest.raises(InputError, match="lm_head is its own, found one that is tied"):
        load_lora(LORA / "all", config().replace(tie_embeddings=True))


def test_the_flag_s_forms() -> None:
    assert lora_spec("a/b") == (Path("a/b"), 1.0)
    assert lora_spec("a/b=0.5") == (Path("a/b"), 0.5)
    assert lora_spec("a=b/c") == (Path("a=b/c"), 1.0)
    assert lora_spec("a=b=-2") == (Path("a=b"), -2.0)
    with pytest.raises(InputError, match="--lora: a=inf: expected a finite weight"):
        lora_spec("a=inf")


def test_the_command_line_s_flag(tmp_path: Path) -> None:
    from jllama.cli.options import Parser, add_model_flags
    from jllama.cli.runtime import open_model

    config = open_source(jllama.DEMO).config
    a, b = (np.random.RandomState(3).randn(*shape).astype(np.float32) for shape in ((2, config.dim), (config.dim, 2)))
    name = f"{PREFIX}.0.self_attn.q_proj.lora_"
    save_file({f"{name}A.weight": a, f"{name}B.weight": b}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    parser = Parser(prog="x")
    add_model_flags(parser)
    flags = ["--no-compilation-cache", "--backend", "xla"]
    plain, changed = (
        open_model(parser.parse_args([*flags, *more]), quiet=True).lm.params
        for more in ([], ["--lora", f"{tmp_path}=0.5", "--lora", str(tmp_path)])
    )
    difference = np.asarray(changed.layer(0).wqkv) - np.asarray(plain.layer(0).wqkv)
    np.testing.assert_allclose(difference[: config.dim], 1.5 * 2 * (b @ a), rtol=0.01, atol=0.01)  # bfloat16
    assert not difference[config.dim :].any()

"""Quantisation: the choice of scales, the command, and that its numbers equal those of ``--quant`` at load."""

from pathlib import Path

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.quantize import main, quantised, report
from jllama.formats import open_source
from jllama.formats.checkpoint import load
from jllama.formats.source import Integers, Quantization
from pallas_kernels.quantized import CLIP_RATIOS, dequantize, quantize


def squared_error(w: np.ndarray, scale: np.ndarray, limit: int) -> np.ndarray:
    """Of every group, in float64."""
    blocks = w.reshape(*scale.shape, -1).astype(np.float64)
    steps = scale.astype(np.float64)[..., None]
    return ((np.clip(np.round(blocks / steps), -limit, limit) * steps - blocks) ** 2).sum(-1)


@pytest.mark.parametrize(("bits", "group"), [(8, None), (8, 32), (4, None), (4, 32), (4, 128)])
def test_no_scale_of_the_grid_is_better(bits: int, group: int | None) -> None:
    w = np.random.RandomState(0).standard_t(4, (64, 256)).astype(np.float32)
    q = quantize(jnp.asarray(w), f"int{bits}", group=group)
    limit = 2 ** (bits - 1) - 1
    scale = np.asarray(q.scale)
    chosen = squared_error(w, scale, limit)
    peak = np.abs(w.reshape(*scale.shape, -1)).max(-1) / limit
    errors = np.stack([squared_error(w, (peak * r).astype(scale.dtype), limit) for r in CLIP_RATIOS])
    assert (chosen <= errors.min(0) * 1.001 + 1e-6).all()
    found = ((np.asarray(dequantize(q)) - w).astype(np.float64).reshape(*scale.shape, -1) ** 2).sum(-1)
    np.testing.assert_allclose(found, chosen, rtol=1e-3, atol=1e-6)
    if bits == 4:
        assert chosen.sum() < 0.95 * errors[0].sum()  # bare absmax


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_too_small_or_too_large_for_a_scale_stay_finite(bits: int) -> None:
    w = jnp.asarray([[1e-30] * 64, [0.0] * 64, [1e30] * 64, [1.0] * 64])
    q = quantize(w, f"int{bits}", group=32)
    assert bool(jnp.isfinite(dequantize(q)).all())
    assert bool((q.scale > 0).all())
    np.testing.assert_array_equal(dequantize(q)[:2], np.zeros((2, 64)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_shows_and_is_counted(
    bad: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoints.source(checkpoints.CONFIG.replace(n_layers=1))
    source.tensors["layers.0.wo"].read()[3, 5] = bad
    path = checkpoints.make("hf", source, tmp_path / "model")
    assert main([str(path), str(tmp_path / "out"), "-q"]) == 0
    assert "o_proj.weight: 1 NaN and 0 infinite values" in capsys.readouterr().err
    weight = load(tmp_path / "out").layer(0).wo
    assert np.flatnonzero(np.isnan(np.asarray(dequantize(weight))).any(-1)).tolist() == [3]


@pytest.mark.parametrize(
    ("quant", "group", "dtype", "tied"),
    [("int8", None, "float32", False), ("int8", 32, "bfloat16", True), ("int4", 32, "float32", False)],
)
def test_the_command_makes_the_numbers_of_quant_at_load(
    quant: str, group: int | None, dtype: str, tied: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = checkpoints.CONFIG.replace(n_layers=1, tie_embeddings=tied)
    path = checkpoints.make("hf", checkpoints.source(config, dtype), tmp_path / "model")
    flags = [] if group is None else ["--group", str(group)]
    assert main([str(path), str(tmp_path / "out"), "--format", quant, *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        len(lines) == 2 + 7 + 1
    )  # a head and a sum; seven matrices of the layer; the model's head, which may be the embedding
    assert lines[-1].startswith("all")
    made, loaded = load(tmp_path / "out", dtype="float32"), load(path, quant=quant, group=group, dtype="float32")
    assert jax.tree.structure(made) == jax.tree.structure(loaded)
    for one, other in zip(jax.tree.leaves(made), jax.tree.leaves(loaded), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one.astype(jnp.float32)), np.asarray(other.astype(jnp.float32)))


def test_blocks_of_rows_are_rounded_as_the_whole_is(monkeypatch: pytest.MonkeyPatch) -> None:
    import convert.quantize as module

    source = checkpoints.source()
    whole = quantised(source, "int4", 32).tensors["layers.0.w_up"].read()
    monkeypatch.setattr(module, "_BLOCK_BYTES", 5000)
    errors: dict[str, module.TensorError] = {}
    parts = quantised(source, "int4", 32, errors).tensors["layers.0.w_up"].read()
    assert isinstance(whole, Integers)
    np.testing.assert_array_equal(parts.data, whole.data)
    np.testing.assert_array_equal(parts.scale, whole.scale)
    w = source.tensors["layers.0.w_up"].read()
    difference = w - whole.floats()
    error = errors["layers.0.w_up"]
    assert error.relative == pytest.approx(np.linalg.norm(difference) / np.linalg.norm(w), rel=1e-3)
    assert error.largest == pytest.approx(np.abs(difference).max(), rel=1e-3)
    assert any("layers.0.w_up" in line for line in report(errors))


def test_norms_stay_floats_and_an_embedding_that_is_not_the_head() -> None:
    for config, table in ((checkpoints.CONFIG, set[str]()), (checkpoints.UNTIED, {"embed"})):
        source = quantised(checkpoints.source(config), "int4", 32)
        floats = {name for name, tensor in source.tensors.items() if tensor.quant is None}
        assert floats == {"norm"} | table | {f"layers.{i}.{n}_norm" for i in (0, 1) for n in ("attn", "ffn")}
    tied = quantised(checkpoints.source(), "int4", 32).tensors["embed"].quant
    assert tied == Quantization("int8", None)  # 4 bits would lose too much in the logits


def test_it_refuses_as_the_other_commands_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkpoints.make("native-int8", checkpoints.source(), tmp_path / "model")
    for arguments, message in (
        ([tmp_path / "none", tmp_path / "out"], "no such file or directory"),
        ([path, path], "expected another place than SRC, found the same"),
        ([path, path, "--force"], "expected another place than SRC, found the same"),
        ([path, tmp_path / "out"], "expected float weights, found int8 already"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error


@pytest.mark.parametrize("form", ["gguf", "llama2c-0", "meta"])
def test_any_form_can_be_quantised(form: str, tmp_path: Path) -> None:
    path = checkpoints.make(form, checkpoints.source(), tmp_path / "model")
    assert main([str(path), str(tmp_path / "out"), "--format", "int4", "--group", "32", "-q"]) == 0
    assert open_source(tmp_path / "out").quant == quantised(open_source(path), "int4", 32).quant

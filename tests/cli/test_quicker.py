"""The last line of `jllama generate`: the figures, and weights that would have been quicker."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from jllama.cli.runtime import figures, quicker
from jllama.config import Quant
from jllama.device import quicker_format
from jllama.kernels import QuantizedTensor
from jllama.params import init, unpacked
from jllama.stream import Timings
from tests.support.tiny import CONFIG


@pytest.mark.parametrize(
    ("platform", "found", "expected"),
    [("cpu", "float32", "int8"), ("cpu", "bfloat16", "int8"), ("cpu", "int8", None), ("cpu", "float16", None),
     ("tpu", "float32", None)],
)  # fmt: skip
def test_the_quicker_format_of_a_device(platform: str, found: str, expected: str | None) -> None:
    assert quicker_format(SimpleNamespace(platform=platform), found) == expected


@pytest.mark.parametrize(("quant", "said"), [("none", "--quant int8"), ("int8", ""), ("int4", "")])
def test_the_line_names_the_flag(quant: Quant, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jllama.cli.runtime.default_device", lambda: SimpleNamespace(platform="cpu"))
    line = quicker(unpacked(init(CONFIG, jax.random.key(0), quant=quant)))
    assert said in line if said else line == ""


@pytest.mark.parametrize(("count", "said"), [(1, "1 token"), (2, "2 tokens")])
def test_the_figures_count_one_token_as_one(count: int, said: str) -> None:
    params = init(CONFIG, jax.random.key(0))
    timings = Timings(prefill=1.0, decode=1.0, prompt_tokens=count, new_tokens=count, decode_steps=1, decoded=count)
    assert figures(params, timings).startswith(f"{said}, ")
    assert f"; prefill {said} in 1.000 s" in figures(params, timings)
    assert figures(params, Timings(new_tokens=count)) == said


def test_unpacked_weights_are_the_same_numbers() -> None:
    params = init(CONFIG, jax.random.key(0), quant="int4")
    before, after = params.layer(0).wo, unpacked(params).layer(0).wo
    assert isinstance(before, QuantizedTensor)
    assert isinstance(after, QuantizedTensor)
    assert after.data.dtype == jnp.int8
    assert bool(jnp.all(before.data.astype(jnp.int8) == after.data))
    assert bool(jnp.all(before.scale == after.scale))

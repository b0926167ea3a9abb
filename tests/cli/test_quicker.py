"""What `jllama generate` says of weights that would have been quicker."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from jllama.cli.runtime import quicker
from jllama.config import Quant
from jllama.device import quicker_format
from jllama.kernels import QuantizedTensor
from jllama.params import init, unpacked
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


def test_unpacked_weights_are_the_same_numbers() -> None:
    params = init(CONFIG, jax.random.key(0), quant="int4")
    before, after = params.layer(0).wo, unpacked(params).layer(0).wo
    assert isinstance(before, QuantizedTensor)
    assert isinstance(after, QuantizedTensor)
    assert after.data.dtype == jnp.int8
    assert bool(jnp.all(before.data.astype(jnp.int8) == after.data))
    assert bool(jnp.all(before.scale == after.scale))

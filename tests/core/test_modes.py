"""The library under modes of jax that a user's program may set, each in its own process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PROGRAM = """
import sys
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import jllama, tiny

params, tokens = tiny.model(), jnp.asarray([tiny.prompt(5, seed) for seed in range(4)])

def run(params, tokens):
    out = []
    for p in (params, jllama.stack(params)):
        cache = jllama.init_cache(p.config, tokens.shape[0], 16, p.dtype, stacked=p.stacked)
        logits, cache = jllama.forward(p, tokens, cache)
        step, _ = jllama.forward(p, tokens[:, :1], cache, last_only=True)
        warm = jllama.make_sampling(
            tokens.shape[0], temperature=1e-4, top_k=5, top_p=0.9, min_p=0.01, repetition_penalty=1.1
        )
        greedy = jllama.generate(p, tokens, max_new_tokens=3)
        drawn = jllama.generate(p, tokens, max_new_tokens=3, sampling=warm)
        out += [logits, jllama.forward(p, tokens)[0], step, greedy.tokens, greedy.logprobs, drawn.tokens]
    return out

wanted = jax.jit(run)(params, tokens)
"""
MODES = {
    "disable_jit": "with jax.disable_jit(): found = run(params, tokens)",
    "rank_promotion": "with jax.numpy_rank_promotion('raise'): found = run(params, tokens)",
    **{
        f"shard_map_{axis.lower()}": f"""
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.{axis},))
split = jax.shard_map(run, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
found = jax.jit(split)(params, jax.device_put(tokens, NamedSharding(mesh, P("data"))))
"""
        for axis in ("Auto", "Explicit")
    },
}
CHECK = """
for a, b in zip(found, wanted, strict=True):
    assert jnp.allclose(jax.device_get(a), jax.device_get(b), atol=1e-4), (a, b)
print("the same")
"""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("mode", MODES)
def test_forward_and_generate(mode: str) -> None:
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests" / "support")))
    env = os.environ | {
        "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM + MODES[mode] + CHECK], env=env, capture_output=True, text=True, check=False
    )
    assert run.stdout == "the same\n", run.stderr

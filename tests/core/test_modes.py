"""The library under modes of jax that a user's program may set, in a process with four devices."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import quick

ROOT = Path(__file__).parents[2]

PROGRAM = """
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import jllama, tiny

params = tiny.model(config=tiny.CONFIG.replace(n_layers=1))
tokens = jnp.asarray([tiny.prompt(5, seed) for seed in range(4)])

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

def modes():
    with jax.disable_jit():
        found = run(params, tokens)
    yield "disable_jit", found
    with jax.numpy_rank_promotion("raise"):
        found = jax.jit(run)(params, tokens)
    yield "rank_promotion", found
    for axis in AxisType.Auto, AxisType.Explicit:
        mesh = jax.make_mesh((4,), ("data",), axis_types=(axis,))
        split = jax.shard_map(run, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
        yield f"shard_map {axis.name}", jax.jit(split)(params, jax.device_put(tokens, NamedSharding(mesh, P("data"))))

wanted = jax.jit(run)(params, tokens)
for mode, found in modes():
    for a, b in zip(found, wanted, strict=True):
        assert jnp.allclose(jax.device_get(a), jax.device_get(b), atol=1e-4), (mode, a, b)
    print(mode)
"""


@pytest.mark.timeout(300)
def test_forward_and_generate() -> None:
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests" / "support")))
    flags = quick.xla_flags("--xla_force_host_platform_device_count=4")
    env = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=False)
    wanted = ["disable_jit", "rank_promotion", "shard_map Auto", "shard_map Explicit"]
    assert run.stdout.splitlines() == wanted, run.stderr

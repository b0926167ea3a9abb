"""A model over several devices: trained there, and sampled where it lies, without a copy.

On a CPU, with four devices, which wait for one another in one pool of threads:

    PJRT_NPROC=32 XLA_FLAGS=--xla_force_host_platform_device_count=4 python examples/sharding.py
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jllama

# Rows that count up by some step, such as 7 10 13 16: easy to learn, easy to check.
CONFIG = jllama.LlamaConfig(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=128, vocab_size=64, max_seq_len=64, eos_ids=()
)
STEPS, ROWS, LENGTH = 150, 32, 16


def mesh_of_all_devices() -> jax.sharding.Mesh:
    """Rows over ``data``; heads, hidden units and the vocabulary over ``model``."""
    n = jax.device_count()
    model = 2 if n % 2 == 0 else 1
    return jax.make_mesh((n // model, model), ("data", "model"))


def batch(seed: int) -> np.ndarray:
    random = np.random.RandomState(seed)
    first, step = random.randint(0, 64, (ROWS, 1)), random.randint(1, 4, (ROWS, 1))
    return (first + step * np.arange(LENGTH)) % 64


def loss(params: jllama.Params, tokens: jax.Array) -> jax.Array:
    logits, _ = jllama.forward(params, tokens[:, :-1], backend="xla")
    targets = jax.nn.one_hot(tokens[:, 1:], 64)
    return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * targets, axis=-1))


@functools.partial(jax.jit, donate_argnums=(0, 1))
def train_step(params: jllama.Params, momentum: jllama.Params, tokens: jax.Array) -> tuple:
    value, gradient = jax.value_and_grad(loss)(params, tokens)
    norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(gradient)))
    momentum = jax.tree.map(lambda m, g: 0.9 * m + g / jnp.maximum(norm, 1), momentum, gradient)
    return jax.tree.map(lambda w, m: w - 0.05 * m, params, momentum), momentum, value


def main() -> None:
    mesh = mesh_of_all_devices()
    print("mesh:", dict(mesh.shape))
    params = jllama.init(CONFIG, jax.random.key(0), mesh=mesh)
    momentum, value = jax.tree.map(jnp.zeros_like, params), jnp.inf
    for i in range(STEPS):
        params, momentum, value = train_step(params, momentum, batch(i))
        jax.block_until_ready(value)
    print(f"loss after {STEPS} steps: {value:.2f}")

    prompts = batch(1000)[:8]
    sampled = jllama.generate(params, prompts[:, :6], max_new_tokens=10)
    print("rows that go on as they began:", f"{(np.asarray(sampled.tokens) == prompts[:, 6:]).mean():.0%}")

    engine = jllama.Engine(params, slots=4, pages=8)  # the trainer's arrays: nothing is copied
    done = engine.generate([row[:6].tolist() for row in prompts], max_new_tokens=10)
    print("the engine says the same:", all(c.ids == row.tolist() for c, row in zip(done, sampled.tokens, strict=True)))

    alone = jllama.unshard(params)  # the same model on one device
    same = jllama.generate(alone, prompts[:, :6], max_new_tokens=10)
    print("and so does one device:", np.array_equal(same.tokens, sampled.tokens))


if __name__ == "__main__":
    main()

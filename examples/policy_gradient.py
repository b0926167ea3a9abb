"""One step of REINFORCE: sample, score, and differentiate through the same `forward`.

python examples/policy_gradient.py
"""

import jax
import jax.numpy as jnp

import jllama


def log_probability(params: jllama.Params, prompt: jax.Array, out: jllama.Generated) -> jax.Array:
    """[B]: the log-probability of each row's completion, as a differentiable function of the weights."""
    tokens = jnp.concatenate([prompt, jnp.maximum(out.tokens, 0)], axis=1)
    logits, _ = jllama.forward(params, tokens[:, :-1], backend="xla")  # kernels have no gradient; the reference has
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)[..., 0]
    drawn = chosen[:, prompt.shape[1] - 1 :]
    real = jnp.arange(drawn.shape[1]) < out.lengths[:, None]
    return jnp.sum(jnp.where(real, drawn, 0), axis=1)


def main() -> None:
    params = jllama.load(jllama.DEMO)
    tokenizer = jllama.load_tokenizer(jllama.DEMO / "tokenizer.model")
    prompt = jnp.tile(jnp.asarray([tokenizer.encode("One day, a")]), (4, 1))
    period = tokenizer.encode("end.", bos=False)[-1]

    @jax.jit
    def improve(params: jllama.Params, seed_sampling: jllama.Sampling) -> tuple[jllama.Params, jax.Array]:
        out = jllama.generate(params, prompt, max_new_tokens=16, sampling=seed_sampling, stop_ids=())
        reward = jnp.sum(out.tokens == period, axis=1).astype(jnp.float32)  # short sentences are good
        advantage = reward - reward.mean()
        grads = jax.grad(lambda p: -jnp.mean(advantage * log_probability(p, prompt, out)))(params)
        return jax.tree.map(lambda w, g: w - 3e-3 * g, params, grads), reward.mean()

    for i in range(3):
        params, reward = improve(params, jllama.make_sampling(4, temperature=1.0, seed=4 * i))
        print(f"step {i}: mean reward {reward:.2f}")


if __name__ == "__main__":
    main()

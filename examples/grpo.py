"""GRPO on the model of the package: it learns to end its first sentence early.

Every step, inside one compiled program: groups of samples of each prompt are drawn (`jllama.rollout`), a rule that
anybody can check rewards them, what is better than its group is made likelier, and the new weights draw the next ones.

python examples/grpo.py
"""

import functools

import jax
import jax.numpy as jnp
import optax

import jllama

PROMPTS = ("Once upon a time,", "One day, a little girl", "Tom had a", "The big dog")
SAMPLES = 8  # of every prompt: a group
SLOTS = 16  # rows that draw at a time: half of all samples
NEW_TOKENS = 24
EARLY = 10  # a first sentence of so many tokens is rewarded
STEPS = 12
CLIP = 0.2  # how far one batch may change a token's probability


def reward_of(tokens: jax.Array, period: int) -> jax.Array:
    """[rows]: 1 where a period comes among the first tokens, else 0."""
    return jnp.any(tokens[:, :EARLY] == period, axis=1).astype(jnp.float32)


def loss_of(
    params: jllama.Params, rows: jax.Array, lengths: jax.Array, out: jllama.Generated, advantage: jax.Array
) -> jax.Array:
    """The clipped objective of the drawn tokens, whose probabilities at drawing `Generated` holds."""
    T, N = rows.shape[1], out.tokens.shape[1]
    # Each text follows its prompt's last real token: [rows, T + N], padding on the right.
    place = lengths[:, None] + jnp.arange(N)
    index = jnp.arange(rows.shape[0])[:, None]
    text = jnp.zeros((rows.shape[0], T + N), jnp.int32).at[:, :T].set(rows)
    text = text.at[index, place].set(jnp.maximum(out.tokens, 0))
    logits, _ = jllama.forward(params, text[:, :-1], backend="xla")  # the reference has a gradient
    scored = jnp.take_along_axis(jax.nn.log_softmax(logits), text[:, 1:, None], axis=-1)[..., 0]
    ratio = jnp.exp(scored[index, place - 1] - out.logprobs)
    gain = jnp.minimum(ratio * advantage[:, None], jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * advantage[:, None])
    real = jnp.arange(N) < out.lengths[:, None]
    return -jnp.sum(jnp.where(real, gain, 0)) / jnp.sum(real)


def main() -> None:
    params = jllama.load(jllama.DEMO, dtype="float32")
    tokenizer = jllama.load_tokenizer(jllama.DEMO / "tokenizer.model")
    period = tokenizer.encode("end.", bos=False)[-1]
    encoded = [tokenizer.encode(text) for text in PROMPTS]
    lengths = jnp.asarray([len(ids) for ids in encoded])
    prompts = jnp.asarray([ids + [0] * (int(lengths.max()) - len(ids)) for ids in encoded])
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-4))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(
        params: jllama.Params, state: optax.OptState, key: jax.Array
    ) -> tuple[jllama.Params, optax.OptState, jax.Array, jllama.Generated]:
        rows = len(PROMPTS) * SAMPLES
        sampling = jllama.Sampling(key=jax.random.split(key, rows), temperature=jnp.ones(rows))
        out = jllama.rollout(
            params, prompts, lengths, sampling, slots=SLOTS, max_new_tokens=NEW_TOKENS, n=SAMPLES, stop_ids=()
        )
        reward = reward_of(out.tokens, period)
        group = reward.reshape(-1, SAMPLES)
        advantage = (group - group.mean(1, keepdims=True)) / (group.std(1, keepdims=True) + 1e-3)
        repeated = jnp.repeat(prompts, SAMPLES, axis=0), jnp.repeat(lengths, SAMPLES)
        for _ in range(2):  # updates a batch
            grads = jax.grad(loss_of)(params, *repeated, out, advantage.ravel())
            updates, state = optimizer.update(grads, state)
            params = jax.tree.map(jnp.add, params, updates)
        return params, state, reward.mean(), out

    state = optimizer.init(params)  # pyright: ignore[reportArgumentType]
    text = prompts[:1]
    for i in range(STEPS):
        params, state, reward, out = train_step(params, state, jax.random.key(i))
        text = out.tokens
        print(f"step {i}: mean reward {reward:.3f}")
    print(tokenizer.decode(encoded[0] + text[0].tolist()))


if __name__ == "__main__":
    main()

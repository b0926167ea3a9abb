"""Sample inside a compiled program: what an RL loop does with a policy.

python examples/generate_in_jit.py
"""

import functools

import jax
import jax.numpy as jnp

import jllama


@functools.partial(jax.jit, static_argnames="max_new_tokens")
def rollout(
    params: jllama.Params, prompt: jax.Array, sampling: jllama.Sampling, *, max_new_tokens: int
) -> tuple[jllama.Generated, jax.Array]:
    """Sample a completion a row, and score it, without leaving the device: here by how often it says 'dog'."""
    out = jllama.generate(params, prompt, max_new_tokens=max_new_tokens, sampling=sampling)
    reward = jnp.sum(out.tokens == DOG, axis=-1)
    return out, reward


DOG = 0  # set in main: the tokenizer says which id it is


def main() -> None:
    global DOG
    params = jllama.load(jllama.DEMO)
    tokenizer = jllama.load_tokenizer(jllama.DEMO / "tokenizer.model")
    DOG = tokenizer.encode("a dog", bos=False)[-1]
    prompt = jnp.tile(jnp.asarray([tokenizer.encode("Tom had a big")]), (4, 1))

    # Settings are arrays, one value a row: other temperatures or seeds do not compile anew.
    for seed in (0, 100):
        sampling = jllama.make_sampling(4, temperature=[0.5, 0.8, 1.0, 1.2], top_p=0.9, seed=seed)
        out, reward = rollout(params, prompt, sampling, max_new_tokens=24)
        for row in range(4):
            text = tokenizer.decode(out.tokens[row, : out.lengths[row]].tolist())
            print(f"reward {reward[row]}, log-probability {out.logprobs[row].sum():7.2f}: Tom had a big{text!r}")


if __name__ == "__main__":
    main()

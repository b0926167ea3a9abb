"""Load a model, and call its forward as the pure function it is.

python examples/forward.py
"""

import jax
import jax.numpy as jnp

import jllama


def main() -> None:
    params = jllama.load(jllama.DEMO)
    tokenizer = jllama.load_tokenizer(jllama.DEMO / "tokenizer.model")
    ids = jnp.asarray([tokenizer.encode("Once upon a time, there was a little")])

    # Without a cache: the logits of every position. This is what training and scoring use.
    logits, _ = jax.jit(jllama.forward)(params, ids)
    likeliest = jnp.argsort(logits[0, -1])[::-1][:5]
    print("next:", [tokenizer.decode([int(i)]) for i in likeliest])

    # With a cache: feed the prompt, then token after token. Row lengths are the cache's own business.
    cache = jllama.init_cache(params.config, batch=1, max_len=64, dtype=params.dtype)
    step = jax.jit(jllama.forward, donate_argnums=2)
    logits, cache = step(params, ids, cache)
    words = []
    for _ in range(8):
        token = jnp.argmax(logits[:, -1], axis=-1)
        words.append(int(token[0]))
        logits, cache = step(params, token[:, None], cache)
    print("greedy:", tokenizer.decode(words))

    # A batch under vmap: each row its own program, as far as you can tell.
    rows = jnp.stack([ids[0], ids[0][::-1]])
    alone = jax.vmap(lambda row: jllama.forward(params, row[None])[0][0, -1])(rows)
    print("vmap:", alone.shape)


if __name__ == "__main__":
    main()

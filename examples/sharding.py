"""One model over several devices: rows over one axis of a mesh, weights over the other, and XLA adds what is needed.

XLA_FLAGS=--xla_force_host_platform_device_count=4 python examples/sharding.py
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jllama

PROMPTS = ["Once upon a time,", "The little dog", "Lily wanted to", "One day, a boy"]


def mesh_of_all_devices() -> jax.sharding.Mesh:
    n = jax.device_count()
    data = 2 if n % 2 == 0 else 1
    return jax.make_mesh((data, n // data), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))


def weight_spec(path: tuple, weight: jax.Array) -> PartitionSpec:
    """Outputs of a product over `model`; of the two products that end a half of a block, the inputs."""
    if weight.ndim < 2:
        return PartitionSpec()
    by_inputs = {"wo", "w_down"} & {getattr(key, "name", None) for key in path}
    return PartitionSpec(None, "model") if by_inputs else PartitionSpec("model", None)


def main() -> None:
    mesh = mesh_of_all_devices()
    params = jllama.load(jllama.DEMO, stacked=False)
    tokenizer = jllama.load_tokenizer(jllama.DEMO / "tokenizer.model")
    ids = [tokenizer.encode(prompt) for prompt in PROMPTS]
    lengths = jnp.asarray([len(row) for row in ids])
    tokens = jnp.asarray([row + [0] * (int(lengths.max()) - len(row)) for row in ids])

    # The XLA path: a compiler cannot cut a kernel into shards.
    generate = jax.jit(functools.partial(jllama.generate, max_new_tokens=12, backend="xla"))
    alone = generate(params, tokens, lengths=lengths)

    specs = jax.tree_util.tree_map_with_path(lambda p, w: NamedSharding(mesh, weight_spec(p, w)), params)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    sharded = generate(
        jax.device_put(params, specs), jax.device_put(tokens, rows), lengths=jax.device_put(lengths, rows)
    )
    print(f"mesh: {dict(mesh.shape)}, tokens: {sharded.tokens.sharding.spec}")
    print("same tokens as on one device:", np.array_equal(alone.tokens, sharded.tokens))
    for prompt, row, n in zip(PROMPTS, sharded.tokens, sharded.lengths, strict=True):
        print(prompt, tokenizer.decode(row[:n].tolist()))

    # By hand: each device runs the same program on its rows.
    def program(params: jllama.Params, tokens: jax.Array) -> jax.Array:
        return jllama.forward(params, tokens, backend="xla")[0]

    by_rows = jax.shard_map(
        program, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec("data")), out_specs=PartitionSpec("data")
    )
    difference = jnp.abs(jax.jit(by_rows)(params, tokens) - program(params, tokens)).max()
    print(f"shard_map: logits differ by {difference:.1e} at most")


if __name__ == "__main__":
    main()

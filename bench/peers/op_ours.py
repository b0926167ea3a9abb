"""This project's operations through a backend: ``xla`` is the reference, ``pallas`` the kernels."""

from collections.abc import Callable
from typing import Any

import numpy as np

from bench import opcases
from bench.peers import NotSupported, Peer, Rounds
from bench.peers._jax_ops import JaxOps, float_dtype, to_device
from bench.peers.ours import PACKAGES, Ours

EPS = 1e-5


class OurOps(Ours):
    """Our operations, and the other requests to the reference process."""

    def __init__(self, job: dict[str, Any]) -> None:
        super().__init__(job | {"model": None})
        self.ops = JaxOps(lambda case: build(case, job["backend"]), prepare)

    def run(self, case: opcases.Case, expected: str, warmup: int, iterations: int) -> Rounds:
        """See `bench.peers.Ops`."""
        from pallas_kernels import Unsupported, record

        try:
            with record() as choices:
                reply = yield from self.ops.run(case, expected, warmup, iterations)
        except Unsupported as reason:
            raise NotSupported(str(reason)) from None
        return reply | {"choices": {name: [c.impl, c.why] for name, c in choices.items()}}

    def expect(self, case: opcases.Case, path: str) -> dict[str, Any]:
        """Write the reference's float32 output, computed from the inputs as the case's dtype rounds them."""
        import jax
        import jax.numpy as jnp

        from pallas_kernels import QuantizedTensor, dequantize

        def exact(a: Any) -> Any:
            return dequantize(a) if isinstance(a, QuantizedTensor) else a.astype(jnp.float32)

        inputs = prepare(case, opcases.arrays(case))
        inputs = [exact(a) for a in inputs]
        with jax.default_matmul_precision("highest"):  # otherwise a GPU rounds float32 products to tf32
            np.save(path, np.asarray(jax.jit(build(case | {"dtype": "f32"}, "xla"))(*inputs)))
        return {}


def prepare(case: opcases.Case, arrays: dict[str, np.ndarray]) -> tuple[Any, ...]:
    """The inputs on the device. Weights are quantised if the case's dtype says so."""
    if case["dtype"] not in ("int8", "int4"):
        return to_device(case, arrays)
    import jax.numpy as jnp

    from jllama.params import quantizer

    to_weight, dtype = quantizer(case["dtype"]), float_dtype(case)
    on_device = {n: jnp.asarray(a, dtype) for n, a in arrays.items()}
    return tuple(to_weight(a) if n.startswith("w") else a for n, a in on_device.items())


def build(case: opcases.Case, backend: str) -> Callable[..., Any]:
    """The operation as a function of arrays."""
    import jax.numpy as jnp

    from jllama.config import LlamaConfig
    from jllama.model import attend, finish
    from jllama.params import Layer, Params
    from jllama.rope import rotations
    from pallas_kernels import attention, decode_attention, draw, ffn, matmul, paged_attention, rms_norm

    batch, seq = case["batch"], case["seq"]
    start = jnp.full(batch, case["context"] - seq, jnp.int32)
    if case["op"] == "matmul":
        return lambda x, w: matmul(x, w, backend=backend)
    if case["op"] == "draw":
        settings = dict(temperature=jnp.full(batch, 0.8), top_p=jnp.full(batch, 0.9))
        return lambda x, u: draw(x, u, **settings, backend=backend)[1]
    if case["op"] == "ffn":
        return lambda x, norm, gate_up, down: ffn(x, norm, gate_up, down, eps=EPS, backend=backend)
    if case["op"] in ("attention", "decode-attention"):
        op = attention if case["op"] == "attention" else decode_attention
        return lambda x, k, v: op(x, k, v, start, backend=backend)
    if case["op"] == "paged-decode-attention":
        table = jnp.asarray(opcases.table_of(case))
        return lambda x, k, v: paged_attention(x, k, v, table, start, layer=0, backend=backend)

    sizes = dict(n_heads=case["heads"], n_kv_heads=case["kv_heads"], head_dim=case["head_dim"])
    config = LlamaConfig(dim=case["dim"], hidden_dim=case["hidden"], n_layers=1, vocab_size=32, norm_eps=EPS, **sizes)

    def layer(x: Any, *weights: Any) -> Any:
        held = Layer(*weights)
        params = Params(weights[0], (held,), weights[0], None, config)  # a model without embedding and head
        rotation = rotations(jnp.broadcast_to(jnp.arange(seq), (batch, seq)), config)
        h = rms_norm(x, held.attn_norm, eps=EPS, backend=backend)
        out, _ = attend(h, held, 0, None, start, rotation, config, backend)
        return finish(out, x, held, held.attn_norm, params, backend)[0]

    return layer


PEER = Peer("ours", "ours-ops", lambda: None, OurOps, PACKAGES)

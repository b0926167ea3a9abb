"""Operations at the sizes of real models, as plain dictionaries, from which every peer makes the same inputs.

A case has ``op``, ``name``, ``dtype``, ``seed`` and its sizes. `arrays` makes its inputs with numpy alone, so a peer in
another interpreter gets the same numbers.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bench.roofline import BYTES, Work

Case = dict[str, Any]
OPS = ("attention", "decode-attention", "paged-decode-attention", "ffn", "layer", "matmul", "draw")
PAGE = 64  # positions of a page of the cache
VOCABULARIES = (32_000, 49_152, 128_256, 262_144)  # Llama-2, SmolLM2, Llama-3, and the largest that `draw` is made for
TOLERANCE = {"f32": 2e-5, "f16": 4e-3, "bf16": 2e-2, "int8": 3e-2, "int4": 1.5e-1}


def cases(
    op: str, model: str, sizes: Mapping[str, Any], dtype: str, batches: Sequence[int], seqs: Sequence[int]
) -> list[Case]:
    """The cases of one operation. ``sizes``: a model's sizes, see `bench.ops_runner.model_sizes`."""
    heads = {k: sizes[k] for k in ("heads", "kv_heads", "head_dim")}
    base = {"op": op, "model": model, "dtype": dtype, "seed": 42}
    if op == "matmul":
        weights = sizes["matmuls"].items()
        return [
            base | {"name": f"matmul-{n}", "batch": 1, "seq": r, "context": r, **w} for r in seqs for n, w in weights
        ]
    if op == "draw":  # logits are float32 in every dtype; ``seqs`` are vocabularies
        return [base | {"name": op, "dtype": "f32", "batch": b, "seq": 1, "context": v} for b in batches for v in seqs]
    if op == "ffn":
        size = {"dim": sizes["dim"], "hidden": sizes["hidden"]}
        return [base | {"name": "ffn", "batch": b, "seq": s, "context": s, **size} for b in batches for s in seqs]
    if op == "layer":
        size = {"dim": sizes["dim"], "hidden": sizes["hidden"], **heads}
        return [base | {"name": "layer", "batch": b, "seq": s, "context": s, **size} for b in batches for s in seqs]
    queries = None if op == "attention" else 1
    name = "attention-prefill" if queries is None else op
    return [
        base | {"name": name, "batch": b, "seq": queries or s, "context": s, **heads} for b in batches for s in seqs
    ]


def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    """The shapes of the inputs. A chain of operations changes the first input. Weights are [out, in]."""
    b, t, s = case["batch"], case["seq"], case["context"]
    if case["op"] == "matmul":
        return {"x": (t, case["inner"]), "w": (case["out"], case["inner"])}
    if case["op"] == "draw":
        return {"x": (b, s), "u": (b,)}
    if case["op"] in ("attention", "decode-attention"):
        keys = (b, case["kv_heads"], s, case["head_dim"])
        return {"x": (b, t, case["heads"], case["head_dim"]), "k": keys, "v": keys}
    if case["op"] == "paged-decode-attention":  # one layer of a pool that the rows fill; `table_of` says whose pages
        pages = (1, b * -(-s // PAGE), case["kv_heads"], PAGE, case["head_dim"])
        return {"x": (b, t, case["heads"], case["head_dim"]), "k": pages, "v": pages}
    dim, hidden = case["dim"], case["hidden"]
    block = {"x": (b, t, dim)}
    if case["op"] == "layer":
        q, kv = case["heads"] * case["head_dim"], case["kv_heads"] * case["head_dim"]
        block |= {"attn_norm": (dim,), "wqkv": (q + 2 * kv, dim), "wo": (dim, q)}
    return block | {"ffn_norm": (dim,), "w_gate_up": (2 * hidden, dim), "w_down": (dim, hidden)}


def arrays(case: Case, *, variant: int = 0) -> dict[str, np.ndarray]:
    """Random float32 inputs; each ``variant`` is another set."""
    seed, folder = case["seed"] + 1000 * variant, case.get("folder")
    return {name: _array(name, shape, seed, folder) for name, shape in shapes(case).items()}


def _array(name: str, shape: tuple[int, ...], seed: int, folder: str | None) -> np.ndarray:
    """Random values from a file in ``folder``. They are made once for all cases and processes, because a weight takes
    seconds to make."""
    path = folder and f"{folder}/{name}-{'-'.join(map(str, shape))}-{seed}.npy"
    if not path:
        return _drawn(name, shape, seed)
    if not os.path.exists(path):  # replaced as a whole, because other processes may read or write the same file
        part = f"{path}.{os.getpid()}.npy"
        np.save(part, _drawn(name, shape, seed))
        os.replace(part, path)
    return np.load(path, mmap_mode="c")


def _drawn(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    draw = np.random.default_rng([seed, *name.encode()])
    if name == "u":
        return draw.random(shape, np.float32)
    made = draw.standard_normal(shape, np.float32)
    if name.endswith("norm"):
        return 1 + np.float32(0.1) * made
    if name.startswith("w"):
        made *= shape[-1] ** -0.5
    elif name == "v":
        # Values get a mean other than 0, so that attention's output is as large as its input and can be its next query.
        made += draw.standard_normal((*shape[:-2], 1, shape[-1]), np.float32)
    return made


def table_of(case: Case) -> np.ndarray:
    """The pages of every row of a paged case, in no order."""
    pages = shapes(case)["k"][1]
    return np.random.default_rng(case["seed"]).permutation(pages).astype(np.int32).reshape(case["batch"], -1)


def nbytes(case: Case) -> int:
    """The bytes of one set of inputs."""
    return round(sum(np.prod(s) * _itemsize(case, n) for n, s in shapes(case).items()))


def work(case: Case) -> Work:
    """The fewest bytes (every input read once, the output written once) and the floating-point operations."""
    b, t, s = case["batch"], case["seq"], case["context"]
    out = {"matmul": (t, case.get("out", 0)), "draw": (b,)}.get(case["op"], shapes(case)["x"])
    moved = nbytes(case) + np.prod(out) * _itemsize(case, "x")
    if case["op"] == "matmul":
        return Work(float(moved), 2.0 * t * case["out"] * case["inner"])
    flops = 0.0
    if "heads" in case:
        seen = t * s if t == 1 else t * (t + 1) / 2  # causal: half of the square
        flops += 4.0 * b * case["heads"] * case["head_dim"] * seen
    if "dim" in case:
        flops += 2.0 * b * t * sum(np.prod(shape) for n, shape in shapes(case).items() if n.startswith("w"))
    return Work(float(moved), float(flops))


def unfused_bytes(case: Case) -> int:
    """Bytes of the intermediates without fusion: attention's float32 scores, a feed-forward's gate and up."""
    total = 0
    if "heads" in case:
        total += 4 * case["batch"] * case["heads"] * case["seq"] * case["context"]
    if "hidden" in case:
        total += round(2 * case["batch"] * case["seq"] * case["hidden"] * _itemsize(case, "x"))
    return total


def _itemsize(case: Case, name: str) -> float:
    quantised = case["dtype"] in ("int8", "int4")
    if quantised and not name.startswith("w"):
        return 2.0
    return BYTES[case["dtype"]]


def relative_error(out: np.ndarray, expected: np.ndarray) -> float:
    """The norm of the difference, divided by the norm of ``expected``; infinite where a value is not finite."""
    out, expected = out.astype(np.float64), expected.astype(np.float64)
    if out.shape != expected.shape or not np.isfinite(out).all():
        return float("inf")
    return float(np.linalg.norm(out - expected) / np.linalg.norm(expected))

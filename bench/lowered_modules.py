"""Prints what every kernel lowers to, one line per kernel, to compare two trees or two versions of JAX.

    python -m bench.lowered_modules > before.txt
    python -m bench.lowered_modules --only decode_step/7b --text texts/

Needs no GPU: the kernels are lowered for an H200 that is not there. A line has

* ``ops``: operations of the module for which Mosaic infers layouts,
* ``equations``, ``tries`` and ``printed``: the constraint solver's work, see `Lowered`,
* ``layouts``: a hash of the module once layouts are inferred,
* ``code``: a hash of the module that goes to the compiler, and ``lines``, its length. Equal hashes: equal GPU code.

Names of functions and locations in the source are left out. The module that goes to the compiler is first simplified
(MLIR's canonicalize and cse), so that an operation without effect makes no difference. Times go to stderr, because they
depend on the machine; the columns do not.
"""

import argparse
import contextlib
import functools
import hashlib
import importlib
import io
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import constraints, core, layout_inference
from jaxlib.mlir import ir, passmanager

from pallas_kernels import OPS, LayerView, QuantizedTensor, StepWeights, Unsupported

H200 = jax.sharding.AbstractMesh(
    (), (), abstract_device=jax.sharding.AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=132)
)
FORMATS: dict[str, tuple[int, int | None] | None] = {"bf16": None, "int8": (8, None), "int4-g128": (4, 128)}


@dataclass
class Lowered:
    """One lowered kernel, and the work that lowering took.

    The solver tries layouts. After each try it goes through the remaining equations repeatedly, until none changes.
    ``equations`` counts every visit of an equation.

    JAX 0.11 sorts the variables that equal one another by their text, and MLIR numbers all operations of the kernel to
    print one. ``printed`` is the number of these variables times that of all operations, those inside a
    `plgpu.inline_mgpu` included: most of the time to lower a large kernel is proportional to it."""

    ops: int = 0
    equations: int = 0
    tries: int = 0
    printed: int = 0
    layouts: str = "-"
    code: str = "-"
    lines: int = 0
    text: str = ""

    def line(self) -> str:
        return f"ops {self.ops} equations {self.equations} tries {self.tries} printed {self.printed} " + (
            f"layouts {self.layouts} code {self.code} lines {self.lines}"
        )


@dataclass(frozen=True)
class Case:
    """A call of an op's kernel with abstract arguments."""

    name: str
    op: str
    args: tuple[Any, ...]
    options: dict[str, Any]

    def lower(self, *, hashes: bool = True) -> list[Lowered]:
        """Lower the call, or raise `Unsupported`. Returns one entry per kernel that Mosaic lowers. Without ``hashes``,
        which take as long as the rest, only the work is counted."""
        kernel = OPS[self.op].kernels["hopper"]
        with jax.sharding.use_abstract_mesh(H200):
            if kernel.check is not None:
                kernel.check(*self.args, **self.options)
            # Options that hold arrays (those of `draw` do) become arguments.
            arrays = {k: v for k, v in self.options.items() if isinstance(v, jax.ShapeDtypeStruct)}
            fixed = {k: v for k, v in self.options.items() if k not in arrays}
            call = jax.jit(lambda args, arrays: kernel.run(*args, **arrays, **fixed))
            with watched(hashes) as kernels:
                call.trace(self.args, arrays).lower(lowering_platforms=("cuda",))
        return kernels


@contextlib.contextmanager
def watched(hashes: bool = True) -> Iterator[list[Lowered]]:
    """Collect the kernels that are lowered inside the ``with`` block. This replaces private functions of JAX, which may
    change with any version."""
    kernels: list[Lowered] = []
    all_ops = 0
    lower, infer = core.lower_mgpu_module, layout_inference.infer_layout
    reduce, once = constraints.reduce, constraints._reduce_system_once
    equal = constraints.compute_transitively_equal_vars

    @functools.wraps(lower)
    def lower_watched(module: Any, *args: Any, **kwargs: Any) -> None:
        kernels.append(Lowered())
        lower(module, *args, **kwargs)
        if not hashes:
            return
        text = normal_text(simplified(module))
        kernels[-1].code, kernels[-1].lines, kernels[-1].text = digest(text), len(text.splitlines()), text

    @functools.wraps(infer)
    def infer_watched(module: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal all_ops
        kernels[-1].ops, all_ops = count_ops(module.operation), count_ops(module.operation, inside=True)
        infer(module, *args, **kwargs)
        if hashes:
            kernels[-1].layouts = digest(normal_text(module.operation))

    @functools.wraps(equal)
    def equal_watched(system: Any) -> Any:
        variables = equal(system)
        kernels[-1].printed += len(variables) * all_ops
        return variables

    @functools.wraps(reduce)
    def reduce_watched(system: Any) -> Any:
        kernels[-1].tries += 1
        return reduce(system)

    @functools.wraps(once)
    def once_watched(system: Any) -> Any:
        kernels[-1].equations += len(system.constraints)
        return once(system)

    core.lower_mgpu_module, layout_inference.infer_layout = lower_watched, infer_watched
    constraints.reduce, constraints._reduce_system_once = reduce_watched, once_watched
    constraints.compute_transitively_equal_vars = equal_watched
    try:
        yield kernels
    finally:
        core.lower_mgpu_module, layout_inference.infer_layout = lower, infer
        constraints.reduce, constraints._reduce_system_once = reduce, once
        constraints.compute_transitively_equal_vars = equal


def simplified(module: Any) -> ir.Operation:
    """A copy without operations that have no effect."""
    code = io.BytesIO()
    module.operation.write_bytecode(code)
    copy = ir.Module.parse(code.getvalue(), context=module.context).operation
    passmanager.PassManager.parse("builtin.module(canonicalize,cse)", module.context).run(copy)
    return copy


def normal_text(operation: ir.Operation) -> str:
    """A module as text. Functions are numbered in order, instead of named."""
    names: dict[str, str] = {}
    _, inside = str(operation).split("\n", 1)  # the first line has the kernel's name and when it was lowered
    return re.sub(r"@[\w$.-]+", lambda found: names.setdefault(found[0], f"@{len(names)}"), inside)


def count_ops(operation: ir.Operation, *, inside: bool = False) -> int:
    """The number of operations whose layouts are inferred. A `plgpu.inline_mgpu` counts as one, unless what is
    ``inside`` counts too."""
    if operation.name == "mosaic_gpu.custom_primitive" and not inside:
        return 1
    inner = (op for region in operation.regions for block in region for op in block)
    return 1 + sum(count_ops(op.operation, inside=inside) for op in inner)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# The cases: every shape that an op says models have, in every format of weights


def array(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def weight(fmt: str, *shape: int) -> Any:
    form = FORMATS[fmt]
    if form is None:
        return array(*shape)
    bits, group = form
    scales = (*shape[:-1], shape[-1] // (group or shape[-1]))
    return QuantizedTensor(
        array(*shape, dtype=jnp.int8 if bits == 8 else jnp.int4),
        array(*scales, dtype=jnp.float16 if group else jnp.float32),
    )


def shapes_of(op: str) -> dict[str, dict[str, int]]:
    """The ``CASES`` beside an op's reference."""
    return importlib.import_module(OPS[op].reference.__module__).CASES


def rms_norm_cases() -> Iterator[Case]:
    for name, s in shapes_of("rms_norm").items():
        yield Case(name, "rms_norm", (array(s["rows"], s["dim"]), array(s["dim"])), dict(eps=1e-5))


def matmul_cases() -> Iterator[Case]:
    for name, s in shapes_of("matmul").items():
        for fmt in FORMATS:
            for rows in (1, 8, 64, 512):
                args = array(rows, s["inner"]), weight(fmt, s["out"], s["inner"])
                yield Case(f"{name}/{fmt}/{rows}", "matmul", args, {})


def ffn_cases() -> Iterator[Case]:
    for name, s in shapes_of("ffn").items():
        dim, hidden = s["dim"], s["hidden"]
        for fmt in FORMATS:
            for rows in (1, 8, 64, 512):
                args = array(1, rows, dim), array(dim), weight(fmt, 2 * hidden, dim), weight(fmt, dim, hidden)
                yield Case(f"{name}/{fmt}/{rows}", "ffn", args, dict(eps=1e-5))


def qkv_cases() -> Iterator[Case]:
    for name, s in shapes_of("qkv").items():
        for fmt, batch, tokens, layers in (("bf16", 2, 2048, 3), ("int8", 1, 512, None), ("int4-g128", 1, 999, 3)):
            lead = () if layers is None else (layers,)
            cache = array(*lead, batch, s["kv_heads"], 4104, s["head_dim"])
            out = (s["heads"] + 2 * s["kv_heads"]) * s["head_dim"]
            args = array(batch, tokens, s["dim"]), weight(fmt, *lead, out, s["dim"]), cache, cache
            options = {} if layers is None else dict(layer=1)
            if layers is not None:
                args = args[0], LayerView(args[1], 1), *args[2:]
            yield Case(f"{name}/{fmt}/{tokens}", "qkv", (*args, *places(batch, tokens, s["head_dim"])), options)
        for fmt in ("bf16", "int8"):
            yield qkv_pieces_case(name, fmt, 16)


def qkv_pieces_case(name: str, fmt: str, pieces: int) -> Case:
    """Pieces of 128 tokens of prompts, whose cache has pages."""
    s = shapes_of("qkv")[name]
    pages = array(3, 2048, s["kv_heads"], 64, s["head_dim"])
    out = (s["heads"] + 2 * s["kv_heads"]) * s["head_dim"]
    args = array(pieces, 128, s["dim"]), LayerView(weight(fmt, 3, out, s["dim"]), 1), pages, pages
    options = dict(layer=1, table=array(pieces, 32, dtype=jnp.int32), aligned=True)
    return Case(f"{name}/{fmt}/{pieces}x128-paged", "qkv", (*args, *places(pieces, 128, s["head_dim"])), options)


def places(batch: int, tokens: int, head_dim: int) -> tuple[Any, ...]:
    """The position of the first new token, and the cosines and sines of all new positions."""
    angles = array(batch, tokens, head_dim // 2, dtype=jnp.float32)
    return array(batch, dtype=jnp.int32), angles, angles


def attention_cases(op: str, lengths: tuple[int, ...]) -> Iterator[Case]:
    for name, s in shapes_of(op).items():
        for tokens in lengths:
            keys = array(2, s["kv_heads"], 2048, s["head_dim"])
            args = array(2, tokens, s["heads"], s["head_dim"]), keys, keys, array(2, dtype=jnp.int32)
            yield Case(f"{name}/{tokens}", op, args, {})


def paged_attention_cases() -> Iterator[Case]:
    for name, s in shapes_of("paged_attention").items():
        for batch, tokens in ((2, 1), (64, 1), (2, 512), (16, 128)):
            pages = array(2, 2048, s["kv_heads"], s["size"], s["head_dim"])
            table, start = array(batch, 32, dtype=jnp.int32), array(batch, dtype=jnp.int32)
            args = array(batch, tokens, s["heads"], s["head_dim"]), pages, pages, table, start
            yield Case(f"{name}/{batch}x{tokens}", "paged_attention", args, dict(layer=1))


def attend_and_write_cases() -> Iterator[Case]:
    for name, s in shapes_of("attend_and_write").items():
        for batch, tokens, paged in ((9, 1, True), (64, 1, True), (3, 8, True), (64, 1, False)):
            kv_heads, D = s["kv_heads"], s["head_dim"]
            y = array(batch, tokens, (s["heads"] + 2 * kv_heads) * D)
            cache = array(2, 2048, kv_heads, s["size"], D) if paged else array(2, batch, kv_heads, 2048, D)
            table = array(batch, 32, dtype=jnp.int32) if paged else None
            args = y, cache, cache, table, *places(batch, tokens, D)
            yield Case(f"{name}/{batch}x{tokens}{'-paged' * paged}", "attend_and_write", args, dict(layer=1))


def draw_cases() -> Iterator[Case]:
    everything = dict(temperature=jnp.float32, top_k=jnp.int32, top_p=jnp.float32, min_p=jnp.float32)
    for name, s in shapes_of("draw").items():
        rows = s["rows"]
        for names in (("temperature",), tuple(everything)):
            options = {key: array(rows, dtype=everything[key]) for key in names}
            args = array(rows, s["vocab"], dtype=jnp.float32), array(rows, dtype=jnp.float32)
            yield Case(f"{name}/{'-'.join(names)}", "draw", args, options)


def decode_step_cases() -> Iterator[Case]:
    for name in shapes_of("decode_step"):
        for fmt in FORMATS:
            for batch, queries in ((1, 1), (1, 8), (8, 1)):
                yield decode_step_case(name, fmt, batch, queries)
            yield decode_step_case(name, fmt, 8, 1, paged=True)


def decode_step_case(name: str, fmt: str, batch: int, queries: int, *, paged: bool = False) -> Case:
    s = shapes_of("decode_step")[name]
    L, D, dim, hidden, heads, kv_heads = (s[k] for k in ("layers", "head_dim", "dim", "hidden", "heads", "kv_heads"))
    weights = StepWeights(
        attn_norm=array(L, dim),
        wqkv=weight(fmt, L, (heads + 2 * kv_heads) * D, dim),
        wo=weight(fmt, L, dim, heads * D),
        ffn_norm=array(L, dim),
        w_gate_up=weight(fmt, L, 2 * hidden, dim),
        w_down=weight(fmt, L, dim, hidden),
        norm=array(dim),
        head=weight(fmt, s["vocab"], dim),
    )
    cache = array(L, 100, kv_heads, 64, D) if paged else array(L, batch, kv_heads, 1024, D)
    args = array(batch, queries, dim), weights, cache, cache, *places(batch, queries, D)
    options = dict(eps=1e-5) | (dict(table=array(batch, 16, dtype=jnp.int32)) if paged else {})
    return Case(f"{name}/{fmt}/{batch}x{queries}{'-paged' * paged}", "decode_step", args, options)


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "rms_norm": rms_norm_cases,
    "matmul": matmul_cases,
    "ffn": ffn_cases,
    "qkv": qkv_cases,
    "attention": functools.partial(attention_cases, "attention", (512, 2000)),
    "decode_attention": functools.partial(attention_cases, "decode_attention", (1, 8)),
    "paged_attention": paged_attention_cases,
    "attend_and_write": attend_and_write_cases,
    "draw": draw_cases,
    "decode_step": decode_step_cases,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", default="", help="only cases whose name starts with this, for example matmul or decode_step/7b/int8"
    )
    parser.add_argument("--text", type=Path, help="write the modules that go to the compiler into this folder")
    args = parser.parse_args()
    for op, cases in CASES.items():
        for case in cases():
            name = f"{op}/{case.name}"
            if not name.startswith(args.only):
                continue
            began = time.process_time()
            try:
                kernels = case.lower()
            except Unsupported as reason:
                print(f"{name}: refused: {reason}", flush=True)
                continue
            except (ValueError, NotImplementedError) as fault:  # Mosaic's errors about layouts and operations
                print(f"{name}: failed: {str(fault).splitlines()[0]}", flush=True)
                continue
            print(f"{name}: {time.process_time() - began:.2f} s of CPU", file=sys.stderr)
            for number, kernel in enumerate(kernels):
                print(f"{name}#{number}: {kernel.line()}", flush=True)
                if args.text:
                    args.text.mkdir(parents=True, exist_ok=True)
                    (args.text / f"{name.replace('/', '_')}_{number}.mlir").write_text(kernel.text)


if __name__ == "__main__":
    main()

"""Fake kernels for machines without a GPU. They are opaque to jax, like a launch."""

import dataclasses
import types
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir

from pallas_kernels import Kernel, Op

GPU = types.SimpleNamespace(
    id=0, platform="gpu", device_kind="NVIDIA H100 80GB HBM3", compute_capability="9.0", core_count=114
)


def opaque(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as jax sees a kernel: a primitive without a derivative or a batch rule."""

    def call(*args: Any, **kwargs: Any) -> Any:
        leaves, tree = jax.tree.flatten((args, kwargs))
        where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, (jax.Array, np.ndarray))]

        def of_arrays(*arrays: Any) -> Any:
            filled = list(leaves)
            for i, array in zip(where, arrays, strict=True):
                filled[i] = array
            args, kwargs = jax.tree.unflatten(tree, filled)
            return function(*args, **kwargs)

        arrays = [leaves[i] for i in where]
        out, out_tree = jax.tree.flatten(jax.eval_shape(of_arrays, *arrays))
        flat = lambda *arrays: jax.tree.leaves(of_arrays(*arrays))  # noqa: E731
        primitive = Primitive("opaque")
        primitive.multiple_results = True
        primitive.def_impl(flat)
        primitive.def_abstract_eval(lambda *_: [ShapedArray(a.shape, a.dtype) for a in out])
        mlir.register_lowering(primitive, mlir.lower_fun(flat, multiple_results=True))
        return jax.tree.unflatten(out_tree, primitive.bind(*arrays))

    return call


def faked(op: Op) -> Op:
    """The op with a fake kernel that accepts all arguments and computes the reference."""
    return dataclasses.replace(op, kernels={"hopper": Kernel(opaque(op._reference))}, skip_reason=None)

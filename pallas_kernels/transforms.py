"""Derivatives, batching and choice of platform for a function that has a kernel. All of them use its reference.

A kernel has no derivative and no batch rule. So the reference runs in its place under `jax.grad`, `jax.jvp` and
`jax.vmap`. Only a call without these transformations launches the kernel.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.core import ShapedArray
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import mlir

from .arch import ELSEWHERE, Target, pinned

Function = Callable[..., Any]


class Unsupported(Exception):
    """A kernel cannot run these arguments on this device; the message says why."""


def with_rules(
    kernel: Function,
    reference: Function,
    target: Target,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    replaced: Callable[[str], None],
    refusal: str | None = None,
) -> Any:
    """``kernel(*args, **kwargs)``, which must give what ``reference`` gives, for use under any transformation.

    ``replaced`` is called with the reason where the reference takes the kernel's place. Where the target is not
    certain, the reference is also traced, for other platforms; with ``refusal``, lowering for those raises
    `Unsupported` instead.
    """
    leaves, tree = jax.tree.flatten((args, kwargs))
    # Python numbers, dtypes and the like stay static: kernels are built with them.
    where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, (jax.Array, np.ndarray))]
    arrays = [leaves[i] for i in where]

    def of_arrays(function: Function) -> Function:
        def call(*arrays: jax.Array) -> Any:
            filled = list(leaves)
            for i, array in zip(where, arrays, strict=True):
                filled[i] = array
            args, kwargs = jax.tree.unflatten(tree, filled)
            return vary_with(function(*args, **kwargs), *arrays)

        return call

    plain = of_arrays(reference)

    @jax.custom_batching.custom_vmap
    def run(*arrays: jax.Array) -> Any:
        def launch(*arrays: jax.Array) -> Any:
            with pinned(target.arch):
                return vary_with(of_arrays(kernel)(*map(_unmarked, arrays)), *arrays)

        def otherwise(*arrays: jax.Array) -> Any:
            if refusal is not None:
                return refuse(plain, arrays, {}, refusal)
            with pinned(ELSEWHERE):
                return plain(*arrays)

        if target.certain:
            return launch(*arrays)
        return lax.platform_dependent(*arrays, cuda=launch, default=otherwise)

    @run.def_vmap
    def batched(size: int, in_batched: list[bool], *arrays: jax.Array) -> tuple[Any, Any]:
        replaced("under vmap: the reference is batched")
        axes = [0 if batched else None for batched in in_batched]
        out = jax.vmap(plain, in_axes=axes, axis_size=size)(*arrays)
        return out, jax.tree.map(lambda _: True, out)

    @jax.custom_jvp
    def differentiable(*arrays: jax.Array) -> Any:
        return run(*arrays)

    @functools.partial(differentiable.defjvp, symbolic_zeros=True)
    def differentiated(primals: tuple[jax.Array, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
        replaced("differentiated: the reference's rule")
        moving = [i for i, tangent in enumerate(tangents) if not isinstance(tangent, SymbolicZero)]

        def of_moving(*values: jax.Array) -> Any:
            filled = list(primals)
            for i, value in zip(moving, values, strict=True):
                filled[i] = value
            return plain(*filled)

        return jax.jvp(of_moving, [primals[i] for i in moving], [tangents[i] for i in moving])

    return differentiable(*arrays)


def vary_with(tree: Any, *arrays: Any) -> Any:
    """The tree, marked under `jax.shard_map` as varying over the mesh axes that any of ``arrays`` varies over.
    A kernel's results and constants come without that mark."""
    axes = frozenset[str]().union(*(jax.typeof(a).manual_axis_type.varying for a in arrays))

    def one(a: jax.Array) -> jax.Array:
        missing = tuple(axes - jax.typeof(a).manual_axis_type.varying)
        return lax.pcast(a, missing, to="varying") if missing else a

    return jax.tree.map(one, tree) if axes else tree


# A kernel that changes an array in place refuses one that is marked as varying (jax 0.11). This takes the mark off.
_unmark = Primitive("unmark")
_unmark.def_abstract_eval(lambda array: ShapedArray(array.shape, array.dtype))
_unmark.def_impl(lambda array: array)
mlir.register_lowering(_unmark, lambda _, array: [array])


def _unmarked(array: Any) -> Any:
    return _unmark.bind(array) if jax.typeof(array).manual_axis_type.varying else array


# A primitive whose lowering raises. An exception at trace time would come too early, because the platform is known only
# when the computation is lowered.
_refused = Primitive("refused")
_refused.multiple_results = True
_refused.def_abstract_eval(lambda *, avals, reason: avals)


def refuse(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], reason: str) -> Any:
    """Stands for ``function(*args, **kwargs)``; lowering the result raises `Unsupported` with the reason."""
    out, tree = jax.tree.flatten(jax.eval_shape(lambda: function(*args, **kwargs)))
    avals = tuple(ShapedArray(a.shape, a.dtype) for a in out)
    arrays = tuple(a for a in jax.tree.leaves((args, kwargs)) if isinstance(a, jax.Array))
    return vary_with(jax.tree.unflatten(tree, _refused.bind(avals=avals, reason=reason)), *arrays)


@_refused.def_impl
def _raise(*, avals: Any, reason: str) -> Any:
    raise Unsupported(reason)


def _raise_at_lowering(context: mlir.LoweringRuleContext, *, avals: Any, reason: str) -> Any:
    platforms = " and ".join(context.module_context.platforms)
    raise Unsupported(f"{reason}, found a computation that is lowered for {platforms!r}")


mlir.register_lowering(_refused, _raise_at_lowering)

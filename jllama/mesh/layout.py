"""Which part of every weight a device holds.

A shard is a smaller model: it has some of the query heads with their key heads, some of the hidden units, some of the
vocabulary, and all layers. Its ``wqkv`` holds its own rows of q, k and v, and its ``w_gate_up`` its own rows of gate
and up. A fused weight on a mesh is the concatenation of these, shard by shard. So its rows are in another order than on
one device: `order` gives it, and `part_rows` says where the rows of wq, wk and so on are. Where a model has fewer key
heads than the axis ``model`` has devices, several shards hold the same key head, and the fused weight holds copies.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jllama.config import LlamaConfig, layer_shapes
from jllama.errors import InputError
from jllama.kernels import QuantizedTensor, Weight

DATA, MODEL = "data", "model"
AnyMesh = Mesh | AbstractMesh

ROWS, COLUMNS, WHOLE = "rows", "columns", "whole"  # what of a weight is divided over ``model``
DIVIDED: Mapping[str, str] = {
    "embed": ROWS,
    "lm_head": ROWS,
    "wqkv": ROWS,
    "bqkv": ROWS,
    "w_gate_up": ROWS,
    "b_gate_up": ROWS,
    "wo": COLUMNS,
    "w_down": COLUMNS,
}  # all others: WHOLE
# A fused weight -> the tensors whose rows it holds.
FUSED_PARTS = {
    "wqkv": ("wq", "wk", "wv"),
    "bqkv": ("bq", "bk", "bv"),
    "w_gate_up": ("w_gate", "w_up"),
    "b_gate_up": ("b_gate", "b_up"),
}


def axis_size(mesh: AnyMesh | None, name: str) -> int:
    """The number of devices along an axis; 1 where the mesh lacks it."""
    return 1 if mesh is None else dict(mesh.shape).get(name, 1)


def model_axis(mesh: AnyMesh) -> str | None:
    """The axis along which the model is divided; None where it is not."""
    return MODEL if axis_size(mesh, MODEL) > 1 else None


def auto(mesh: Mesh) -> Mesh:
    """The same devices with `AxisType.Auto`: with Explicit axes, every operation would need an output sharding."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def spec(mesh: AnyMesh, *names: str | None) -> PartitionSpec:
    """A `PartitionSpec` over the axes that the mesh has."""
    return PartitionSpec(*(name if axis_size(mesh, name or "") > 1 else None for name in names))


def divisor(field: str, shards: int) -> int:
    """Over how many shards the rows' inputs are divided."""
    return shards if DIVIDED.get(field) == COLUMNS else 1


def check_mesh(config: LlamaConfig, mesh: AnyMesh) -> None:
    """Raise `InputError` unless the model can be divided over the mesh. The message says what would divide it."""
    if wrong := [name for name, size in mesh.shape.items() if name not in (DATA, MODEL) and size > 1]:
        raise InputError(f"mesh: expected the axes {DATA!r} and {MODEL!r}, found {wrong[0]!r}")
    if uneven := _uneven(config, shards := axis_size(mesh, MODEL)):
        fit = [str(n) for n in range(1, config.n_heads + 1) if not _uneven(config, n)]
        raise InputError(
            f"mesh: {MODEL!r} (--tp) has {shards} devices, which do not divide {' and '.join(uneven)}; "
            f"this model divides over {', '.join(fit)}"
        )


def widened(config: LlamaConfig, shards: int, group: int | None) -> LlamaConfig:
    """The config with as many hidden units added as make whole groups of ``group`` inputs of w_down divide over the
    shards. Unchanged where the weights have no groups, and where more than one in 16 would be added.

    The 7B has 11,008 hidden units: 86 groups of 128. On 4 devices it gets 11,264, 22 groups each."""
    unit = (group or 1) * shards
    hidden = -(-config.hidden_dim // unit) * unit
    fits = group is not None and 16 * (hidden - config.hidden_dim) <= config.hidden_dim
    return config.replace(hidden_dim=hidden) if fits else config


def with_hidden_units(field: str, weight: Weight, hidden: int) -> Weight:
    """A weight as one device holds it, stacked or not, with zeros for the hidden units up to ``hidden``."""
    if field not in ("w_gate_up", "b_gate_up", "w_down"):
        return weight
    axis, parts = {"w_gate_up": (-2, 2), "b_gate_up": (-1, 2), "w_down": (-1, 1)}[field]
    old = weight.shape[axis] // parts

    def longer(a: jax.Array, fill: int = 0) -> jax.Array:
        more = a.shape[axis] // parts * hidden // old - a.shape[axis] // parts  # of scales, which are fewer
        width = [(0, 0)] * a.ndim
        width[axis] = (0, more)
        pieces = jnp.split(a, parts, axis)
        return jnp.concatenate([jnp.pad(piece, width, constant_values=fill) for piece in pieces], axis)

    if hidden == old:
        return weight
    if isinstance(weight, QuantizedTensor):
        return QuantizedTensor(longer(weight.data), longer(weight.scale, 1))  # zeros have the scale 1: `quantize`
    return longer(weight)


def _uneven(config: LlamaConfig, shards: int) -> list[str]:
    """The sizes that do not divide over so many shards."""
    sizes = ("n_heads", "hidden_dim", "vocab_size")
    uneven = [f"{name} {getattr(config, name)}" for name in sizes if getattr(config, name) % shards]
    keys = config.n_kv_heads  # divided, or each in as many shards as any other
    return uneven + ([f"n_kv_heads {keys}"] if keys % shards and shards % keys else [])


def shard_config(config: LlamaConfig, shards: int) -> LlamaConfig:
    """The config of one shard. The vocabulary stays whole: token ids are those of the whole model."""
    return config.replace(
        n_heads=config.n_heads // shards,
        n_kv_heads=max(config.n_kv_heads // shards, 1),
        hidden_dim=config.hidden_dim // shards,
    )


def shard_shapes(config: LlamaConfig, shards: int) -> dict[str, tuple[int, ...]]:
    """The shape of every field of a `Layer` on a mesh with so many shards."""
    axis = {ROWS: 0, COLUMNS: 1}
    shapes = layer_shapes(shard_config(config, shards))
    return {
        field: tuple(n * shards if axis.get(DIVIDED.get(field, WHOLE)) == i else n for i, n in enumerate(shape))
        for field, shape in shapes.items()
    }


def parts_of_shard(config: LlamaConfig, shards: int, field: str) -> list[list[tuple[str, int, int]]] | None:
    """For each shard, the tensors of a fused field and the rows of each that the shard holds: ``(part, begin, end)``.
    None for fields that are not fused."""
    one = shard_config(config, shards)
    q, kv, hidden = one.n_heads * one.head_dim, one.n_kv_heads * one.head_dim, one.hidden_dim
    keys = [s * config.n_kv_heads // shards * config.head_dim for s in range(shards)]  # where a shard's key heads begin

    def of(names: tuple[str, ...]) -> list[list[tuple[str, int, int]]]:
        if len(names) == 2:
            return [[(name, s * hidden, (s + 1) * hidden) for name in names] for s in range(shards)]
        wq, *both = names
        return [[(wq, s * q, (s + 1) * q), *((n, at, at + kv) for n in both)] for s, at in enumerate(keys)]

    return of(FUSED_PARTS[field]) if field in FUSED_PARTS else None


def order(config: LlamaConfig, shards: int, field: str) -> np.ndarray | None:
    """The rows of a fused weight as one device holds it, in the order in which ``shards`` shards hold them. None where
    the two are the same."""
    pieces = parts_of_shard(config, shards, field)
    if pieces is None or shards == 1:
        return None
    begin, at = {}, 0
    for name in FUSED_PARTS[field]:
        begin[name] = at
        at += _part_size(config, name)
    return np.concatenate([np.arange(begin[n] + a, begin[n] + b) for shard in pieces for n, a, b in shard])


def take_rows(field: str, weight: Weight, index: np.ndarray) -> Weight:
    """A weight with its rows in another order, stacked or not."""
    axis = -1 if field.startswith("b") else -2  # of vectors and matrices
    return jax.tree.map(lambda a: jnp.take(a, index, axis=axis), weight)


def part_rows(config: LlamaConfig, shards: int, field: str) -> dict[str, np.ndarray]:
    """For every part of a fused weight, where each of its rows lies in the weight as ``shards`` shards hold it. Empty
    for fields that are not fused."""
    rows = {name: np.zeros(_part_size(config, name), np.int64) for name in FUSED_PARTS.get(field, ())}
    at = 0
    for shard in parts_of_shard(config, shards, field) or ():
        for name, begin, end in shard:
            rows[name][begin:end] = np.arange(at, at + end - begin)
            at += end - begin
    return rows


def _part_size(config: LlamaConfig, name: str) -> int:
    heads = {"q": config.n_heads, "k": config.n_kv_heads, "v": config.n_kv_heads}
    return heads[name[1]] * config.head_dim if name[1] in heads else config.hidden_dim


def weight_spec(mesh: AnyMesh, field: str, weight: Weight, *, stacked: bool = False) -> Weight | PartitionSpec:
    """The `PartitionSpec` of a weight, or of both arrays of a quantised one. ``weight`` may be any shapes."""
    divided, lead = DIVIDED.get(field, WHOLE), (None,) * stacked
    rank = weight.ndim - stacked
    names = {ROWS: (MODEL, *(None,) * (rank - 1)), COLUMNS: (None, MODEL), WHOLE: (None,) * rank}[divided]
    whole = spec(mesh, *lead, *names)
    if not isinstance(weight, QuantizedTensor):
        return whole
    groups, shards = weight.scale.shape[-1], axis_size(mesh, MODEL)
    if divided != COLUMNS or groups == 1:
        kept = names if divided == ROWS else (None, None)
        return QuantizedTensor(whole, spec(mesh, *lead, *kept))  # pyright: ignore[reportArgumentType]
    if groups % shards:
        fit = [str(n) for n in range(1, groups + 1) if groups % n == 0]
        what = f"the {groups} groups of {weight.group} inputs of {field}"
        raise InputError(
            f"mesh: {MODEL!r} (--tp) has {shards} devices, which do not divide {what}; "
            f"they divide over {', '.join(fit)}"
        )
    return QuantizedTensor(whole, whole)  # pyright: ignore[reportArgumentType]


def named(mesh: AnyMesh, specs: object) -> object:
    """A tree of `NamedSharding` for a tree of `PartitionSpec`."""
    return jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, PartitionSpec))

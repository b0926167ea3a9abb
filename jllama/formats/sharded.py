"""Puts the weights of a checkpoint on a mesh. Every device's part is read from the mapped files on its own and sent to
that device, so the host holds one part of one weight at a time."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jllama.config import LlamaConfig, Quant
from jllama.formats.source import Integers, Source, Tensor
from jllama.kernels import QuantizedTensor, Weight, WeightFormat
from jllama.mesh.layout import (
    COLUMNS,
    DIVIDED,
    MODEL,
    ROWS,
    WHOLE,
    axis_size,
    check_mesh,
    divisor,
    named,
    parts_of_shard,
    weight_spec,
    widened,
)
from jllama.params import quant_group, quantizer

# A part of a tensor: rows from and to, columns from and to. What lies behind the tensor's end is zero: see `widened`.
Place = tuple[Tensor, int, int, int, int]


@dataclass(frozen=True)
class Shards:
    """A mesh with `AxisType.Auto`, and the dtype of floats on it. ``config`` has the hidden units that `widened`
    adds."""

    config: LlamaConfig
    mesh: Mesh
    dtype: str

    @classmethod
    def of(cls, source: Source, mesh: Mesh, dtype: str, quant: Quant, group: int | None) -> "Shards":
        """The shards of a checkpoint whose floats become ``quant``. Raises `InputError` unless it can be divided over
        the mesh."""
        config = source.config
        check_mesh(config, mesh)
        stored = source.tensors["layers.0.w_down"].quant
        group = quant_group(config.hidden_dim, quant, group) if stored is None else stored.group
        shards = cls(widened(config, axis_size(mesh, MODEL), group), mesh, dtype)
        for i in range(config.n_layers):
            for field in ("wo", "w_down"):  # the others are divided along their rows
                shards.layout(field, [source.tensors[f"layers.{i}.{field}"]])
        return shards

    @property
    def count(self) -> int:
        """The number of devices along ``model``."""
        return axis_size(self.mesh, MODEL)

    def put(self, field: str, tensors: Sequence[Tensor], quant: Quant, group: int | None) -> Weight:
        """The weight of a field on the mesh. ``tensors`` are its parts, which are joined along their rows. Floats
        become ``quant``."""
        layout: Any = self.layout(field, tensors)
        places = functools.partial(self._places, field, tensors)
        if isinstance(layout, QuantizedTensor):
            assert tensors[0].quant is not None
            read = functools.partial(_integers, kind=WeightFormat(tensors[0].quant.format).dtype)
            data, scale = self._arrays(field, (layout.data, layout.scale), lambda s: read(places(s)))
            return QuantizedTensor(data, scale)
        dtype = functools.reduce(jnp.promote_types, (_float_dtype(tensor) for tensor in tensors))
        (weight,) = self._arrays(field, (layout,), lambda s: (_floats(places(s), dtype),))
        if quant == "none":
            return weight.astype(self.dtype)
        return _quantizer_on(self.mesh, field, quant, group, weight.shape, weight.dtype)(weight)

    def layout(self, field: str, tensors: Sequence[Tensor]) -> Any:
        """How a weight is divided as it is read: its integers and scales, or its floats. Raises `InputError` where
        groups would be split."""
        first, formats = tensors[0], {tensor.quant for tensor in tensors}
        shape: Any = jax.ShapeDtypeStruct(first.shape, jnp.float32)
        if len(formats) == 1 and first.quant is not None:
            width = self.config.hidden_dim if field == "w_down" else first.shape[1]
            groups = width // (first.quant.group or width)
            shape = QuantizedTensor(shape, jax.ShapeDtypeStruct((first.shape[0], groups), jnp.float32))  # pyright: ignore
        return weight_spec(self.mesh, field, shape)

    def _places(self, field: str, tensors: Sequence[Tensor], shard: int) -> Iterator[Place]:
        """What a shard reads."""
        if (pieces := parts_of_shard(self.config, self.count, field)) is not None:
            for tensor, (_, begin, end) in zip(tensors, pieces[shard], strict=True):
                yield tensor, begin, end, 0, tensor.shape[-1]
            return
        (tensor,) = tensors
        width = self.config.hidden_dim if field == "w_down" else tensor.shape[-1]
        divided, whole = DIVIDED.get(field, WHOLE), (tensor.shape[0], width)
        rows, columns = (
            (shard * n // self.count, (shard + 1) * n // self.count) if divided == which else (0, n)
            for which, n in zip((ROWS, COLUMNS), whole, strict=True)
        )
        yield tensor, *rows, *columns

    def _arrays(
        self, field: str, layouts: tuple[Any, ...], read: Callable[[int], tuple[np.ndarray, ...]]
    ) -> list[jax.Array]:
        """Arrays on the mesh, of which ``read(shard)`` gives this process a shard's parts."""
        pieces: list[list[jax.Array]] = [[] for _ in layouts]
        shapes: list[tuple[int, ...]] = []
        whole = None
        for shard, devices in enumerate(_devices(self.mesh)):
            mine = [device for device in devices if device.process_index == jax.process_index()]
            if mine:
                parts = whole or read(shard)
                whole = parts if field not in DIVIDED else None  # every shard has all of it: it is read once
                shapes = [_whole_shape(a.shape, layout, self.count) for a, layout in zip(parts, layouts, strict=True)]
                for array, found in zip(parts, pieces, strict=True):
                    found += [jax.device_put(array, device) for device in mine]
        return [
            jax.make_array_from_single_device_arrays(shape, NamedSharding(self.mesh, layout), found)
            for shape, layout, found in zip(shapes, layouts, pieces, strict=True)
        ]


def _devices(mesh: Mesh) -> list[list[Any]]:
    """The devices of every shard."""
    if MODEL not in mesh.axis_names:
        return [mesh.devices.ravel().tolist()]
    shards = np.moveaxis(mesh.devices, mesh.axis_names.index(MODEL), 0)
    return shards.reshape(shards.shape[0], -1).tolist()


def _whole_shape(part: tuple[int, ...], layout: PartitionSpec, shards: int) -> tuple[int, ...]:
    names = (*layout, *(None,) * (len(part) - len(layout)))
    return tuple(n * shards if name == MODEL else n for n, name in zip(part, names, strict=True))


def _float_dtype(tensor: Tensor) -> np.dtype:
    return np.dtype(np.float32) if tensor.quant else jnp.dtype(tensor.dtype)


def _floats(places: Iterator[Place], dtype: np.dtype) -> np.ndarray:
    """Parts of several tensors as one array of floats, one part below the other. Each part is read a block of rows at a
    time, so that memory holds it only once."""
    found = list(places)
    rows = sum(end - begin for _, begin, end, _, _ in found)
    out = np.zeros((rows, found[0][4] - found[0][3])[: len(found[0][0].shape)], dtype)
    at = 0
    for place in found:
        tensor, begin, end, left, right = _within(place)
        for low, high in tensor.blocks(begin=begin, end=end):
            part = tensor.rows(low, high) if out.ndim == 1 else tensor.part(low, high, left, right)
            floats = part.floats() if isinstance(part, Integers) else part
            out[at + low - begin : at + high - begin][..., : floats.shape[-1]] = floats
        at += place[2] - place[1]
    return out


def _integers(places: Iterator[Place], *, kind: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Parts of quantised tensors, joined along their rows: the integers as ``kind``, and the scales, which are 1 where
    a tensor has ended."""

    def part(place: Place) -> tuple[np.ndarray, np.ndarray]:
        tensor, begin, end, left, right = _within(place)
        found = tensor.part(begin, end, left, right)
        whole = place[2] - place[1], place[4] - place[3]
        group = (tensor.quant and tensor.quant.group) or whole[1]
        data, scale = _filled(found.data, whole, 0), _filled(found.scale, (whole[0], whole[1] // group), 1)
        return data.astype(kind), scale

    data, scales = zip(*map(part, places), strict=True)
    return np.concatenate(data), np.concatenate(scales)


def _within(place: Place) -> Place:
    """What of a place lies in its tensor."""
    tensor, begin, end, left, right = place
    rows, columns = tensor.shape[0], tensor.shape[-1]
    return tensor, min(begin, rows), min(end, rows), min(left, columns), min(right, columns)


def _filled(a: np.ndarray, shape: tuple[int, int], value: int) -> np.ndarray:
    """An array of a larger shape, with ``value`` where ``a`` has ended."""
    if a.shape == shape:
        return a
    return np.pad(a, [(0, n - m) for n, m in zip(shape, a.shape, strict=True)], constant_values=value)


@functools.cache
def _quantizer_on(
    mesh: Mesh, field: str, quant: Quant, group: int | None, shape: tuple[int, ...], dtype: np.dtype
) -> Callable[[jax.Array], Weight]:
    """`quantizer` for weights on a mesh, compiled: a scale of a divided row needs all of its parts."""
    run = quantizer(quant, group, divisor(field, axis_size(mesh, MODEL)))
    layout = weight_spec(mesh, field, jax.eval_shape(run, jax.ShapeDtypeStruct(shape, dtype)))
    return jax.jit(run, out_shardings=named(mesh, layout))

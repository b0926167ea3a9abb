"""Reads LoRA adapters of PEFT (``adapter_config.json``, ``adapter_model.safetensors``) and merges them into weights.

A weight W becomes ``W + scale * B A``. `with_lora` merges into a checkpoint while it is loaded, one block of rows at a
time and before quantisation. `merge_lora` merges into `Params`, and can run under jit.
"""

import dataclasses
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jllama.config import Fields, LlamaConfig, read_json
from jllama.errors import InputError
from jllama.formats.files import inside, label
from jllama.formats.layout import FUSED, LAYER, expected_shapes, unfused_layer_shapes
from jllama.formats.safetensors_file import SafetensorsFile
from jllama.formats.source import DTYPES, Source, Tensor
from jllama.kernels import QuantizedTensor, Weight
from jllama.mesh.layout import MODEL, axis_size, order
from jllama.params import Layer, Params

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_TENSOR = re.compile(
    r"base_model\.model\.(?:model\.layers\.(?P<layer>\d{1,5})\.(?P<module>[\w.]+?)|(?P<head>lm_head))"
    r"\.lora_(?P<side>[AB])(?:\.default)?\.weight"
)
# Options that do not change how a trained adapter is applied, or that are checked by name below. Any other option that
# is set is refused.
_HARMLESS = {"alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "eva_config"}
_HARMLESS |= {"exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern"}
_HARMLESS |= {"layers_to_transform", "lora_alpha", "lora_dropout", "loftq_config", "megatron_core", "peft_type"}
_HARMLESS |= {"peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config"}
_HARMLESS |= {"target_modules", "task_type", "use_rslora"}
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # other values also change the weights of the base model


@struct.dataclass
class LoraAdapter:
    """A low-rank update of weights."""

    # Name of a tensor (``layers.0.wq``) -> A [rank, in] and B [out, rank]. B is already multiplied by the scale.
    pairs: dict[str, tuple[jax.Array, jax.Array]]


def load_lora(path: str | Path, config: LlamaConfig) -> LoraAdapter:
    """Read an adapter for a model with this config. The shape of every matrix is checked."""
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: expected a directory with {CONFIG} and {WEIGHTS}, found none")
    scale, rank = _options(inside(path, CONFIG, path))
    file = SafetensorsFile(inside(path, WEIGHTS, path))
    sides: dict[str, dict[str, np.ndarray]] = {}
    for name, entry in file.entries.items():
        if name.endswith(".base_layer.weight"):
            continue  # the base model's matrix, which peft saves when lm_head has an adapter
        where = f"{file.path}: {label(name)}"
        ours, side = _target(name, where, config)
        shape = expected_shapes(config)[ours]
        expected = (rank, shape[1]) if side == "A" else (shape[0], rank)
        if entry.shape != expected:
            raise InputError(f"{where}: shape: expected {list(expected)}, found {list(entry.shape)}")
        if str(entry.dtype) not in DTYPES:
            raise InputError(f"{where}: dtype: expected one of {', '.join(DTYPES)}, found {entry.dtype}")
        sides.setdefault(ours, {})[side] = file.array(name).astype(np.float32)
    for ours, found in sides.items():
        if len(found) != 2:
            raise InputError(f"{file.path}: {ours}: expected lora_A and lora_B, found one of them")
    if not sides:
        raise InputError(f"{file.path}: expected LoRA weights, found none")
    scaled = {ours: (found["A"], np.float32(scale) * found["B"]) for ours, found in sorted(sides.items())}
    return LoraAdapter(jax.tree.map(jnp.asarray, scaled))


def _options(path: Path) -> tuple[float, int]:
    """The scale of B A, and the rank."""
    values = read_json(path)
    where = str(path)
    fields = Fields(where, values)
    _only(where, values, "peft_type", ("LORA",))
    _only(where, values, "bias", ("none", None))
    _only(where, values, "init_lora_weights", _INITS)
    for name in ("fan_in_fan_out", "rank_pattern", "alpha_pattern"):
        _only(where, values, name, (False, None, {}))
    for name, value in values.items():
        if name not in _HARMLESS and value not in (None, False, {}, []):
            raise InputError(f"{where}: {label(name)}: expected none (not supported), found {label(value)}")
    rank = fields.integer("r", high=1 << 16)
    alpha = fields.number("lora_alpha", 8.0)
    return alpha / (math.sqrt(rank) if fields.flag("use_rslora", False) else rank), rank


def _only(where: str, values: dict[str, Any], name: str, allowed: tuple[Any, ...]) -> None:
    if values.get(name) not in allowed:
        raise InputError(f"{where}: {name}: expected {allowed[0]}, found {label(values.get(name))} (not supported)")


def _target(name: str, where: str, config: LlamaConfig) -> tuple[str, str]:
    """Our name of the tensor that a LoRA matrix updates, and its side, ``A`` or ``B``."""
    match = _TENSOR.fullmatch(name)
    if match is None:
        raise InputError(f"{where}: expected lora_A or lora_B of a projection or of lm_head, found another tensor")
    if match["head"]:
        if config.tie_embeddings:
            raise InputError(f"{where}: expected a model whose lm_head is its own, found one that is tied to embed")
        return "lm_head", match["side"]
    ours = next((ours for ours, theirs in LAYER.items() if theirs == match["module"]), None)
    if ours is None or ours.endswith("norm") or int(match["layer"]) >= config.n_layers:
        raise InputError(f"{where}: expected a projection of one of {config.n_layers} layers, found another")
    return f"layers.{int(match['layer'])}.{ours}", match["side"]


def lora_spec(text: str) -> tuple[Path, float]:
    """Parse ``PATH`` or ``PATH=WEIGHT`` of a command line. The default weight is 1."""
    path, equals, weight = text.rpartition("=")
    if not equals:
        return Path(text), 1.0
    try:
        value = float(weight)
    except ValueError:
        return Path(text), 1.0  # the equals sign is part of the path
    if not math.isfinite(value):
        raise InputError(f"--lora: {text}: expected a finite weight, found {weight}")
    return Path(path), value


def with_lora(source: Source, adapters: Iterable[tuple[str | Path, float]]) -> Source:
    """The checkpoint with adapters merged into it, each multiplied by its weight. Float tensors keep their dtype;
    quantised ones become float32."""
    pairs: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for path, weight in adapters:
        for name, (a, b) in load_lora(path, source.config).pairs.items():
            pairs.setdefault(name, []).append((np.asarray(a), np.asarray(b) * np.float32(weight)))
    # B A + D C = [B D] [A; C], so a tensor is rounded only once for any number of adapters.
    merged = {
        name: _merged(source.tensors[name], np.concatenate([a for a, _ in found]), np.hstack([b for _, b in found]))
        for name, found in pairs.items()
    }
    return dataclasses.replace(source, tensors={**source.tensors, **merged})


def _merged(tensor: Tensor, a: np.ndarray, b: np.ndarray) -> Tensor:
    dtype = "float32" if tensor.quant else tensor.dtype

    def rows(begin: int, end: int) -> np.ndarray:
        floats = tensor.floats(begin, end).astype(np.float32)
        return (floats + b[begin:end] @ a).astype(DTYPES[dtype])

    return dataclasses.replace(tensor, dtype=dtype, quant=None, rows=rows, columns=None)


def merge_lora(params: Params, adapter: LoraAdapter, weight: float | jax.Array = 1.0) -> Params:
    """The params with an adapter merged into them, multiplied by ``weight``. The weights must be floats. The function
    is pure: it can be jitted, and differentiated with respect to the adapter."""
    shapes = unfused_layer_shapes(params.config)

    def change(layer: int, part: str) -> jax.Array | None:
        pair = adapter.pairs.get(f"layers.{layer}.{part}")
        return None if pair is None else weight * (pair[1] @ pair[0])

    def of_field(layer: int, field: str) -> jax.Array | None:
        changes = {part: change(layer, part) for part in FUSED[field]}
        if all(c is None for c in changes.values()):
            return None
        whole = jnp.concatenate([jnp.zeros(shapes[part]) if c is None else c for part, c in changes.items()])
        index = order(params.config, axis_size(params.mesh, MODEL), field)
        return whole if index is None else whole[index]

    fields = [field for field in FUSED if not field.endswith("norm")]
    n_layers = params.config.n_layers
    changes = {field: [of_field(i, field) for i in range(n_layers)] for field in fields}
    head = adapter.pairs.get("lm_head")
    lm_head = params.lm_head if head is None else _added(params.lm_head, weight * (head[1] @ head[0]))
    if isinstance(params.layers, Layer):
        whole = {
            field: jnp.stack([jnp.zeros(getattr(params.layers, field).shape[1:]) if c is None else c for c in found])
            for field, found in changes.items()
            if any(c is not None for c in found)
        }
        return dataclasses.replace(params, layers=_changed(params.layers, whole), lm_head=lm_head)
    layers = tuple(
        _changed(layer, {field: found[i] for field, found in changes.items() if found[i] is not None})
        for i, layer in enumerate(params.layers)
    )
    return dataclasses.replace(params, layers=layers, lm_head=lm_head)


def _changed(layer: Layer, changes: dict[str, Any]) -> Layer:
    return dataclasses.replace(layer, **{field: _added(getattr(layer, field), c) for field, c in changes.items()})


def _added(weight: Weight | None, change: jax.Array) -> Weight:
    if weight is None or isinstance(weight, QuantizedTensor):
        raise InputError("merge_lora: expected float weights, found quantised ones (merge before they are quantised)")
    return (weight.astype(jnp.float32) + change).astype(weight.dtype)

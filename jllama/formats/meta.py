"""Meta's release format: ``params.json`` beside ``consolidated.00.pth`` and so on, one shard for each GPU of a
tensor-parallel run."""

import re
from pathlib import Path
from typing import Any

from jllama.config import Fields, LlamaConfig, RopeScaling, read_json
from jllama.errors import InputError
from jllama.formats.files import first_of, inside
from jllama.formats.layout import expected_shapes
from jllama.formats.pth import PthFile
from jllama.formats.source import DTYPES, Source, Tensor, config_at
from jllama.formats.transform import from_interleaved, joined

LAYER = {
    "attn_norm": "attention_norm",
    "wq": "attention.wq",
    "wk": "attention.wk",
    "wv": "attention.wv",
    "wo": "attention.wo",
    "ffn_norm": "ffn_norm",
    "w_gate": "feed_forward.w1",
    "w_up": "feed_forward.w3",
    "w_down": "feed_forward.w2",
}
MODEL = {"embed": "tok_embeddings", "norm": "norm", "lm_head": "output"}
# These are split between the shards along the input axis. All other matrices are split along the output axis. Vectors
# are not split.
BY_COLUMNS = ("wo", "w_down")
MAX_SHARDS = 64


def recognise(path: Path) -> bool:
    """Whether ``path`` is a directory in this format."""
    return path.is_dir() and (path / "params.json").exists()


def open_meta(path: Path, *, links: bool = False) -> Source:
    """Open ``path``, a directory with params.json and consolidated.NN.pth."""
    shards = [PthFile(inside(path, name, path, links=links)) for name in _shard_names(path)]
    config = _config(inside(path, "params.json", path, links=links), shards)
    tensors = {
        name: from_interleaved(_tensor(shards, name, config), config, name)
        for name in expected_shapes(config)
        if _theirs(name) in shards[0].entries
    }
    tokenizer = first_of(path, ("tokenizer.model", "tokenizer.json"), links=links)
    return Source(path, "meta", config, tensors, tokenizer, links=links)


def _shard_names(path: Path) -> list[str]:
    # The shards are numbered from 0. A gap in the numbers means that a shard is missing.
    found = {name for p in path.iterdir() if re.fullmatch(r"consolidated\.\d{2}\.pth", name := p.name)}
    names = [f"consolidated.{i:02}.pth" for i in range(len(found))]
    if not found or len(found) > MAX_SHARDS:
        raise InputError(f"{path}: expected 1 to {MAX_SHARDS} files consolidated.NN.pth, found {len(found)}")
    missing = [name for name in names if name not in found]
    if missing:
        raise InputError(f"{path}: {missing[0]}: missing, but {max(found)} is there")
    return names


def _theirs(name: str) -> str:
    prefix, _, field = name.rpartition(".")
    return f"{prefix}.{LAYER[field]}.weight" if prefix else f"{MODEL[name]}.weight"


def _shape(shards: list[PthFile], name: str) -> tuple[int, ...]:
    entry = shards[0].entries.get(name)
    if entry is None or not 1 <= len(entry.shape) <= 2:
        found = "none" if entry is None else list(entry.shape)
        raise InputError(f"{shards[0].path}: {name}: expected a weight, found {found}")
    return entry.shape


def _config(path: Path, shards: list[PthFile]) -> LlamaConfig:
    """The config from params.json. hidden_dim, and vocab_size if it is -1, are taken from tensor shapes."""
    where, values = str(path), read_json(path)
    fields = Fields(where, values)
    dim, n_heads = fields.integer("dim", high=1 << 20), fields.integer("n_heads", high=4096)
    embed = _shape(shards, "tok_embeddings.weight")
    vocab_size = embed[0] * (len(shards) if embed[-1] == dim else 1)
    if (stated := fields.integer("vocab_size", -1, low=-1)) not in (-1, vocab_size):
        raise InputError(f"{where}: vocab_size: expected {vocab_size} as in {shards[0].path.name}, found {stated}")
    theta = fields.number("rope_theta", 10000.0)
    scaling = _scaling(fields) if fields.flag("use_scaled_rope", False) else None
    # The file does not state the context. These are the training contexts of Llama 3.1, 3 and 2.
    context = 131072 if scaling else 8192 if theta == 500000 else 4096
    return config_at(
        where,
        dim=dim,
        n_layers=fields.integer("n_layers", high=4096),
        n_heads=n_heads,
        n_kv_heads=fields.integer("n_kv_heads", n_heads, high=4096),
        hidden_dim=_shape(shards, "layers.0.feed_forward.w1.weight")[0] * len(shards),
        vocab_size=vocab_size,
        max_seq_len=fields.integer("max_seq_len", context),
        norm_eps=fields.number("norm_eps", 1e-5, high=1.0),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings="output.weight" not in shards[0].entries,
        **({"bos_id": 128000, "eos_ids": (128001, 128008, 128009)} if vocab_size == 128256 else {}),
    )


def _scaling(fields: Fields) -> RopeScaling:
    return RopeScaling("llama3", fields.number("rope_scale_factor", 8.0))


def _tensor(shards: list[PthFile], ours: str, config: LlamaConfig) -> Tensor:
    name, shape = _theirs(ours), expected_shapes(config)[ours]
    parts = [_part(shard, name) for shard in shards]
    field = ours.rpartition(".")[2]
    if len(shape) == 1:
        return parts[0]
    # Llama 1 and 2 split the embedding by columns, Llama 3 by rows.
    columns = field in BY_COLUMNS or (field == "embed" and parts[0].shape[-1] != shape[1])
    axis = 1 if columns else 0
    for part in parts[1:]:
        if part.dtype != parts[0].dtype:
            raise InputError(f"{part.where}: dtype: expected {parts[0].dtype} as in shard 0, found {part.dtype}")
        if len(part.shape) != 2 or part.shape[1 - axis] != parts[0].shape[1 - axis]:
            expected, found = list(parts[0].shape), list(part.shape)
            raise InputError(f"{part.where}: shape: expected {expected} as in shard 0, found {found}")
    return joined(parts, axis)


def _part(shard: PthFile, name: str) -> Tensor:
    entry: Any = shard.entries.get(name)
    where = f"{shard.path}: {name}"
    if entry is None:
        raise InputError(f"{where}: missing")
    if str(entry.dtype) not in DTYPES:
        raise InputError(f"{where}: dtype: expected one of {', '.join(DTYPES)}, found {entry.dtype}")
    return Tensor(entry.shape, str(entry.dtype), where, lambda begin, end: shard.array(name)[begin:end])

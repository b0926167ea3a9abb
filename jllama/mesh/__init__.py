"""A model over a mesh of devices: rows over the axis ``data``, heads, hidden units and the vocabulary over ``model``.

`layout` says which part of every weight a device holds, `place` puts arrays there, `run` calls a function on every
shard, and `vocabulary` does what needs the logits of all shards.
"""

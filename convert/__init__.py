"""``python -m convert``: convert, compare and quantise checkpoints."""

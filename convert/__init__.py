"""``python -m convert``: writes checkpoints in other formats, compares and quantises them."""

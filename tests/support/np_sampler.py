"""A plain sampler in float64 that sorts. It defines every setting as Hugging Face's logits processors do."""

import numpy as np


def np_sampler(
    logits: np.ndarray,  # [V]
    seen: np.ndarray | None = None,  # [V] bool
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> tuple[np.ndarray, float]:
    """The probabilities [V] of a row in float64, and the distance to the closest cut, because rounding may decide about
    a token on a cut."""
    logits = logits.astype(np.float64)
    if seen is not None:
        penalised = np.where(logits < 0, logits * repetition_penalty, logits / repetition_penalty)
        logits = np.where(seen, penalised, logits)
    logits = logits / temperature
    order = np.argsort(-logits, kind="stable")
    ranked, close = logits[order], np.inf
    if 0 < top_k < len(ranked):
        close = min(close, ranked[top_k - 1] - ranked[top_k])
        ranked[top_k:] = -np.inf
    probs = np.exp(ranked - ranked[0])
    probs /= probs.sum()
    if top_p < 1:
        before = np.concatenate([[0.0], np.cumsum(probs)[:-1]])  # the mass of the larger ones
        close = min(close, np.abs(before - top_p).min())
        probs[before >= top_p] = 0.0
    if min_p > 0:
        ratio = probs / probs[0]
        close = min(close, np.abs(ratio - min_p).min())
        probs[ratio < min_p] = 0.0
    out = np.zeros_like(probs)
    out[order] = probs / probs.sum()
    return out, close

"""The definition of the softmax operators, in numpy float64.

    P = softmax(scale * S over the keys not hidden),  dS = scale * P * (dP - rowsum(dP * P))

P is 0 where a key is hidden or its score -inf, and in the whole of a row that has no other. What
is NaN or +inf among a row's visible scores makes all of its visible probabilities NaN.
"""

from __future__ import annotations

import numpy as np


def upper_triangle(seq_q: int, seq_k: int) -> np.ndarray:
    """bool [T, S]: what a causal row does not see."""
    return np.arange(seq_k)[None, :] > np.arange(seq_q)[:, None]


def forward(scores, hidden, scale: float = 1.0) -> np.ndarray:
    """Args: scores [..., T, S]; hidden: broadcastable to it, not 0 where a key is masked out."""
    hidden = np.broadcast_to(np.asarray(hidden) != 0, scores.shape)
    s = np.asarray(scores, np.float64) * scale
    s = np.where(hidden, -np.inf, s)
    top = s.max(-1, keepdims=True, initial=-np.inf)
    with np.errstate(invalid="ignore"):
        e = np.exp(s - np.where(top == -np.inf, 0, top))
    total = e.sum(-1, keepdims=True)
    return np.where(hidden, 0, e / np.where(total == 0, 1, total))


def backward(probs, dprobs, scale: float = 1.0) -> np.ndarray:
    """Args: probs, dprobs [..., T, S]. What has probability 0 has no part in its row."""
    p = np.asarray(probs, np.float64)
    dp = np.where(p == 0, 0, np.asarray(dprobs, np.float64))
    return np.where(p == 0, 0, scale * p * (dp - (p * dp).sum(-1, keepdims=True)))

"""The definition of softmax cross-entropy, in numpy float64: what every kernel is compared with.

    z = scale * logits,  lse = log sum_v exp(z_v),  q = (1 - s) onehot(label) + s / V
    loss = lse - sum_v q_v z_v + z_loss * lse^2

and its derivative, written out. An ignored row has loss, lse and gradient 0; a label that is no
class makes its row's loss and gradient NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Forward(NamedTuple):
    loss: np.ndarray  # [*B]
    lse: np.ndarray  # [*B]


class Options(NamedTuple):
    label_smoothing: float = 0.0
    ignore_index: int | None = -100
    z_loss: float = 0.0
    logit_scale: float = 1.0


DEFAULTS = Options()


def _targets(labels, classes, options):
    """(q [*B, V], ignored [*B]); q is NaN where the label is no class."""
    labels = np.asarray(labels)[..., None]
    ignored = np.zeros_like(labels, bool)
    if options.ignore_index is not None:
        ignored = labels == options.ignore_index
    s = options.label_smoothing
    q = (1 - s) * (labels == np.arange(classes)) + s / classes
    q = np.where((labels >= 0) & (labels < classes), q, np.nan)
    return np.where(ignored, 0, q), ignored[..., 0]


def _softmax(logits, options):
    z = np.asarray(logits, np.float64) * options.logit_scale
    top = z.max(-1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0)
    with np.errstate(divide="ignore", over="ignore"):
        lse = top + np.log(np.exp(z - top).sum(-1, keepdims=True))
    with np.errstate(invalid="ignore"):
        return z, lse[..., 0], np.exp(z - lse)


def forward(logits, labels, options: Options = DEFAULTS) -> Forward:
    z, lse, _ = _softmax(logits, options)
    q, ignored = _targets(labels, z.shape[-1], options)
    with np.errstate(invalid="ignore"):
        loss = lse - np.where(q == 0, 0, q * z).sum(-1)
        if options.z_loss:
            loss = loss + options.z_loss * lse**2
    return Forward(np.where(ignored, 0, loss), np.where(ignored, 0, lse))


def backward(logits, labels, dloss, dlse=0.0, options: Options = DEFAULTS) -> np.ndarray:
    """Cotangents of `forward`'s (loss, lse) to those of the logits, [*B, V]."""
    _, lse, probs = _softmax(logits, options)
    q, ignored = _targets(labels, probs.shape[-1], options)
    dloss, dlse = (np.broadcast_to(np.asarray(d, np.float64), lse.shape) for d in (dloss, dlse))
    with np.errstate(invalid="ignore"):
        of_lse = dloss + dlse
        if options.z_loss:
            of_lse = of_lse + 2 * options.z_loss * lse * dloss
        dz = of_lse[..., None] * probs - dloss[..., None] * q
    return np.where(ignored[..., None], 0, dz) * options.logit_scale


def linear_logits(hidden, weight, bias=None) -> np.ndarray:
    logits = np.asarray(hidden, np.float64) @ np.asarray(weight, np.float64)
    return logits if bias is None else logits + np.asarray(bias, np.float64)


def linear_backward(hidden, weight, dlogits) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """dhidden, dweight, dbias from the cotangent of `linear_logits`."""
    hidden, weight = (np.asarray(x, np.float64) for x in (hidden, weight))
    rows = dlogits.reshape(-1, dlogits.shape[-1])
    dweight = hidden.reshape(-1, hidden.shape[-1]).T @ rows
    return dlogits @ weight.T, dweight, rows.sum(0)

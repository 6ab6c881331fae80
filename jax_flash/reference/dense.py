"""The dense operators in float64: the definition.

dense   act(x W + b)
mlp     act(x W1 + b1) W2 + b2
"""

from __future__ import annotations

import math

import numpy as np

_erf = np.vectorize(math.erf, otypes=[np.float64])


def activate(activation: str, x: np.ndarray) -> np.ndarray:
    """act(x), elementwise; gated: act(first half of the last axis) * second half."""
    if activation in ("swiglu", "geglu"):
        gate, up = np.split(x, 2, axis=-1)
        return (gate / (1 + np.exp(-gate)) if activation == "swiglu" else _gelu_tanh(gate)) * up
    return {
        "identity": lambda: x,
        "gelu_tanh": lambda: _gelu_tanh(x),
        "gelu": lambda: x * 0.5 * (1 + _erf(x / math.sqrt(2))),
        "relu": lambda: np.maximum(x, 0),
        "squared_relu": lambda: np.maximum(x, 0) ** 2,
    }[activation]()


def _gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def dense(x, weight, bias=None, activation: str = "identity") -> np.ndarray:
    """x [*B, D], weight [D, F], bias [F] or None -> [*B, F]."""
    y = np.asarray(x, np.float64) @ np.asarray(weight, np.float64)
    return activate(activation, y if bias is None else y + np.asarray(bias, np.float64))


def mlp(x, weight1, bias1, weight2, bias2=None, activation: str = "gelu_tanh") -> np.ndarray:
    """x [*B, D], weight1 [D, F], weight2 [F, E] -> [*B, E]."""
    return dense(dense(x, weight1, bias1, activation), weight2, bias2)

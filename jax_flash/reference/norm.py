"""The definition of the norms over a residual stream, in numpy float64.

    s = residual + keep * scale * (x * rowscale * layerscale) [+ the same of x1]
    z = (s - mean(s)) / sqrt(var(s) + epsilon) * weight + bias       (RMS norm: mean = 0)

and its derivative, written out. Rows are [rows, D]; a compact x or z is [M, D] or [out_rows, D].
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jax_flash.reference.attention import DRAWS, keep_scale, philox

HEAD = 0x4E4F524D  # "NORM"


class Forward(NamedTuple):
    z: np.ndarray
    z1: np.ndarray | None
    stream: np.ndarray
    normalised: np.ndarray  # [rows, D]: z before weight and bias
    rsigma: np.ndarray  # [rows, 1]


class Gradients(NamedTuple):
    x: np.ndarray
    x1: np.ndarray | None
    residual: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    weight1: np.ndarray | None
    bias1: np.ndarray | None
    layerscale: np.ndarray
    rows: np.ndarray  # [rows, D]: dz, where z is compact
    rows1: np.ndarray | None


def dropout_keep(rate, key, rows, width, branch=0) -> np.ndarray:
    """bool [rows, D]: element (i, j) is kept where its own draw reaches the rate; see philox.h."""
    i, j = np.arange(rows)[:, None], np.arange(width)[None, :]
    counter = (j // 16 * 4 + j % 8 // 2, i // 16 * 8 + i % 8, HEAD + branch, 0)
    words = np.stack(np.broadcast_arrays(*philox(counter, tuple(map(int, key)))))
    drawn = np.take_along_axis(words, (i // 8 % 2 * 2 + j // 8 % 2)[None], 0)[0]
    draws = np.where(j % 2 == 1, drawn >> np.uint64(16), drawn & np.uint64(0xFFFF))
    return draws >= min(round(rate * DRAWS), DRAWS - 1)


def selection(subset, count) -> np.ndarray:
    """[rows, count]: row r is the unit vector of subset[r] - 1, or zero."""
    return np.eye(count + 1)[subset][:, 1:]


def _factor(x, keep, rate, rowscale, layerscale):
    """What multiplies x, [rows, D]."""
    factor = 1.0 if keep is None else keep * keep_scale(rate)
    factor = factor if rowscale is None else factor * np.asarray(rowscale, float).reshape(-1, 1)
    return factor if layerscale is None else factor * np.asarray(layerscale, float)


def forward(
    x,
    residual,
    weight,
    bias=None,
    *,
    is_rms=False,
    epsilon=1e-5,
    rate=0.0,
    keep=None,
    keep1=None,
    rowscale=None,
    layerscale=None,
    x_subset=None,
    out_subset=None,
    out_rows=0,
    x1=None,
    weight1=None,
    bias1=None,
) -> Forward:
    """`keep` and `keep1` from `dropout_keep` (None: no dropout); the rest as the public calls."""
    x = np.asarray(x, float)
    x = x if x_subset is None else selection(x_subset, len(x)) @ x
    stream = x * _factor(x, keep, rate, rowscale, layerscale)
    if x1 is not None:
        stream = stream + np.asarray(x1, float) * _factor(x1, keep1, rate, None, None)
    if residual is not None:
        stream = stream + np.asarray(residual, float)
    centred = stream if is_rms else stream - stream.mean(-1, keepdims=True)
    rsigma = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
    y = centred * rsigma

    def scaled(weight, bias):
        z = y * np.asarray(weight, float) + (0 if bias is None else np.asarray(bias, float))
        return z if out_subset is None else selection(out_subset, out_rows).T @ z

    z1 = None if weight1 is None else scaled(weight1, bias1)
    return Forward(scaled(weight, bias), z1, stream, y, rsigma)


def backward(x, residual, weight, bias=None, *, dz, dz1=None, dstream=0.0, **options) -> Gradients:
    """Cotangents of (z, z1, stream) to those of every array; options as `forward`."""
    o = {"rate": 0.0, **options}
    _, _, _, y, rsigma = forward(x, residual, weight, bias, **options)
    out_subset = o.get("out_subset")

    def rows(dz):
        dz = np.asarray(dz, float)
        return dz if out_subset is None else selection(out_subset, o["out_rows"]) @ dz

    dz = rows(dz)
    dy = dz * np.asarray(weight, float)
    dweight1 = dbias1 = None
    if o.get("weight1") is not None:
        dz1 = rows(dz1)
        dy = dy + dz1 * np.asarray(o["weight1"], float)
        dweight1, dbias1 = (dz1 * y).sum(0), dz1.sum(0)
    ds = dy - y * (dy * y).mean(-1, keepdims=True)
    if not o.get("is_rms"):
        ds = ds - dy.mean(-1, keepdims=True)
    ds = ds * rsigma + dstream

    x = np.asarray(x, float)
    pick = None if o.get("x_subset") is None else selection(o["x_subset"], len(x))
    full = x if pick is None else pick @ x
    unscaled = ds * _factor(x, o.get("keep"), o["rate"], o.get("rowscale"), None)
    dx = ds * _factor(x, o.get("keep"), o["rate"], o.get("rowscale"), o.get("layerscale"))
    dx1 = None
    if o.get("x1") is not None:
        dx1 = ds * _factor(x, o.get("keep1"), o["rate"], None, None)
    return Gradients(
        dx if pick is None else pick.T @ dx,
        dx1,
        ds,
        (dz * y).sum(0),
        dz.sum(0),
        dweight1,
        dbias1,
        (unscaled * full).sum(0),
        dz,
        dz1,
    )

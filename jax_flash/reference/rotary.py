"""The definition of the rotary embedding, in numpy float64.

A pair of a row's elements is a complex number, which the row's position p turns:

    (x1 + i x2) * (cos[p] + i sin[p]),  conjugate: (x1 + i x2) * (cos[p] - i sin[p])

Pairs are elements (j, j + R / 2), or (2 j, 2 j + 1) if interleaved, of the first R; the others
stay. Rows at negative positions stay; positions that the table does not have give NaN.
"""

from __future__ import annotations

import numpy as np


def angles(length: int, dim: int, base: float = 10000.0) -> np.ndarray:
    """[length, dim / 2]: p * base^(-2 j / dim)."""
    return np.outer(np.arange(length), base ** (-np.arange(0, dim, 2) / dim))


def xpos_scale(length: int, dim: int, scale_base: float) -> np.ndarray:
    """[length, dim / 2]: what xPos multiplies a query with, and divides a key by."""
    per_pair = (np.arange(0, dim, 2) + 0.4 * dim) / (1.4 * dim)
    return per_pair ** ((np.arange(length) - length // 2) / scale_base)[:, None]


def rotate(x, cos, sin, positions, *, interleaved=False, conjugate=False) -> np.ndarray:
    """x [*B, T, N, H]; cos, sin [length, R / 2]; positions int [*B or 1, T]."""
    x = np.asarray(x, np.float64)
    positions = np.broadcast_to(positions, x.shape[:-2])
    half = cos.shape[-1]
    first = np.arange(half) * (2 if interleaved else 1)
    second = first + (1 if interleaved else half)
    turn = np.asarray(cos, np.float64) + 1j * np.asarray(sin, np.float64)
    turn = np.vstack([turn, np.full((1, half), complex(np.nan, np.nan))])
    turn = turn[np.clip(positions, 0, len(cos))][..., None, :]
    z = (x[..., first] + 1j * x[..., second]) * (turn.conj() if conjugate else turn)
    out = x.copy()
    out[..., first], out[..., second] = z.real, z.imag
    return np.where((positions < 0)[..., None, None], x, out)


def varlen_positions(cu_seqlens, total: int, offsets=None) -> np.ndarray:
    """int [total]: each row's place within its sequence, -1 for rows that no sequence owns."""
    positions = np.full(total, -1)
    cu = np.maximum.accumulate(np.clip(cu_seqlens, 0, total))
    for i, (start, end) in enumerate(zip(cu[:-1], cu[1:], strict=True)):
        positions[start:end] = np.arange(end - start) + (0 if offsets is None else offsets[i])
    return positions

"""The definition of attention, in numpy float64: what every kernel is compared with.

    S = scale * Q K^T + bias where allowed, else -inf
    lse = log sum_j exp(S_ij),  P = exp(S - lse),  O = (P * keep / (1 - p)) V

and its derivative, written out. All of O(T * S) memory, one loop for sequences, nothing clever.
Rows that see no key have O = 0 and lse = -inf.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

DRAWS = 1 << 16


class Forward(NamedTuple):
    out: np.ndarray  # [B, T, N, Hv]
    lse: np.ndarray  # [B, N, T]
    probs: np.ndarray  # [B, N, T, S], before dropout


class Gradients(NamedTuple):
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray


def allowed(
    batch,
    heads,
    seq_q,
    seq_k,
    *,
    is_causal=False,
    causal_offset=0,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size=None,
    mask=None,
    block_mask=None,
    block_size=None,
) -> np.ndarray:
    """bool [B, N, T, S]: which pairs exist. Options as in `jax_flash.attention`, one batch axis."""
    i, j = np.arange(seq_q)[:, None], np.arange(seq_k)[None, :]
    ok = np.ones((batch, heads, seq_q, seq_k), bool)
    for b in range(batch):
        len_q = seq_q if query_seq_lengths is None else np.clip(query_seq_lengths[b], 0, seq_q)
        len_k = (
            seq_k if key_value_seq_lengths is None else np.clip(key_value_seq_lengths[b], 0, seq_k)
        )
        if isinstance(causal_offset, str):  # "bottom_right"
            offset = len_k - len_q
        else:
            offset = np.broadcast_to(causal_offset, (batch,))[b]
        ok[b] &= (i < len_q) & (j < len_k)
        if is_causal:
            ok[b] &= j <= i + offset
        if local_window_size is not None:
            left, right = np.broadcast_to(local_window_size, (2,))
            ok[b] &= (j >= i + offset - left) & (j <= i + offset + right)
    if mask is not None:
        ok &= mask
    if block_mask is not None:
        rows, cols = block_size
        ok &= np.repeat(np.repeat(block_mask, rows, -2), cols, -1)[..., :seq_q, :seq_k]
    return ok


def philox(counter, key):
    """Philox4x32-7 (Salmon et al., SC'11) on uint64 arrays that hold 32-bit words."""
    x, y, z, w = (np.asarray(c, np.uint64) for c in counter)
    k0, k1 = (np.asarray(k, np.uint64) for k in key)
    low = np.uint64(0xFFFFFFFF)
    for _ in range(7):
        p0, p1 = x * np.uint64(0xD2511F53), z * np.uint64(0xCD9E8D57)
        x, y, z, w = (p1 >> 32) ^ y ^ k0, p1 & low, (p0 >> 32) ^ w ^ k1, p0 & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return x, y, z, w


@functools.lru_cache(maxsize=8)
def dropout_draws(key, batch, heads, seq_q, seq_k, first_batch=0) -> np.ndarray:
    """uint16 [B, N, T, S]: the draw of each element, addressed by its place; see philox.h.

    Args:
      key: two 32-bit words. first_batch: the batch word of entry 0.
    """
    row, col = np.arange(seq_q)[:, None], np.arange(seq_k)[None, :]
    word, half = (row // 8 % 2) * 2 + col // 8 % 2, col % 2
    x, y = (col // 16) * 4 + (col % 8) // 2, (row // 16) * 8 + row % 8
    draws = np.empty((batch, heads, seq_q, seq_k), np.uint16)
    for b in range(batch):
        for h in range(heads):
            words = np.stack(np.broadcast_arrays(*philox((x, y, h, first_batch + b), key)))
            drawn = np.take_along_axis(words, word[None], 0)[0]
            draws[b, h] = np.where(half == 1, drawn >> 16, drawn & 0xFFFF)
    return draws


def dropout_keep(rate, key, batch, heads, seq_q, seq_k, *, first_batch=0) -> np.ndarray:
    """bool [B, N, T, S]: an element is kept where its draw reaches the rate."""
    draws = dropout_draws(tuple(map(int, key)), batch, heads, seq_q, seq_k, first_batch)
    return draws >= min(round(rate * DRAWS), DRAWS - 1)


def keep_scale(rate) -> float:
    return DRAWS / (DRAWS - min(round(rate * DRAWS), DRAWS - 1))


def _per_query_head(x, heads):
    """[B, S, K, H] -> [B, N, S, H]: query head n reads kv head n // (N / K)."""
    return np.repeat(np.moveaxis(np.asarray(x, np.float64), 2, 1), heads // x.shape[2], axis=1)


def forward(query, key, value, ok, *, scale=None, bias=None, keep=None, rate=0.0) -> Forward:
    """One batch axis; `ok` from `allowed`, `keep` from `dropout_keep` (None: no dropout)."""
    heads, head_dim = query.shape[2:]
    q = np.moveaxis(np.asarray(query, np.float64), 2, 1)
    k, v = _per_query_head(key, heads), _per_query_head(value, heads)
    s = q @ k.swapaxes(-1, -2) * (head_dim**-0.5 if scale is None else scale)
    s = np.where(ok, s if bias is None else s + bias, -np.inf)
    top = s.max(-1, keepdims=True, initial=-np.inf)
    e = np.exp(s - np.where(top == -np.inf, 0, top))
    total = e.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (np.where(top == -np.inf, 0, top) + np.log(total))[..., 0]
    probs = e / np.where(total == 0, 1, total)
    dropped = probs if keep is None else np.where(keep, probs * keep_scale(rate), 0)
    return Forward(np.moveaxis(dropped @ v, 1, 2), lse, probs)


def backward(
    query, key, value, ok, dout, dlse=None, *, scale=None, bias=None, keep=None, rate=0.0
) -> Gradients:
    """Cotangents of `forward`'s (out, lse) to those of query, key, value."""
    heads, head_dim = query.shape[2:]
    scale = head_dim**-0.5 if scale is None else scale
    out, _, probs = forward(query, key, value, ok, scale=scale, bias=bias, keep=keep, rate=rate)
    q, do = (np.moveaxis(np.asarray(x, np.float64), 2, 1) for x in (query, dout))
    k, v = _per_query_head(key, heads), _per_query_head(value, heads)
    factor = 1.0 if keep is None else keep * keep_scale(rate)
    dp = do @ v.swapaxes(-1, -2) * factor
    delta = (do * np.moveaxis(out, 2, 1)).sum(-1, keepdims=True)
    if dlse is not None:
        delta = delta - np.asarray(dlse, np.float64)[..., None]
    ds = probs * (dp - delta) * scale
    dq = ds @ k
    dk, dv = ds.swapaxes(-1, -2) @ q, (probs * factor).swapaxes(-1, -2) @ do

    def grouped(x):  # [B, N, S, H] -> [B, S, K, H]
        batch, _, seq_k, dim = x.shape
        x = x.reshape(batch, key.shape[2], -1, seq_k, dim).sum(2)
        return np.moveaxis(x, 1, 2)

    return Gradients(np.moveaxis(dq, 1, 2), grouped(dk), grouped(dv))


def sequences(cu_seqlens, total) -> list[tuple[int, int]]:
    """(first row, end) of each sequence, after clamping: what any cu_seqlens at all mean."""
    cu = np.maximum.accumulate(np.clip(np.asarray(cu_seqlens, np.int64), 0, total))
    return list(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True))

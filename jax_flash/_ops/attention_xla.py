"""Attention in plain jnp, chunked over query rows: any platform, any float type, O(T + S) memory.

    S = scale * Q K^T where allowed, else -inf;  P = exp(S - lse);  O = dropout(P) V

The forward and the recomputing backward take the operands of `_ops/attention.py`; `chunked` is
the form that also knows bias and mask, and that JAX differentiates itself. All leading batch axes
broadcast.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_flash._ops import dropout

_CHUNK_BYTES = 32 << 20  # aim for one chunk of scores


class Positions(NamedTuple):
    """Where each row of an array stands: [*batch, rows] int32."""

    # -1 (queries), -2 (keys): nobody's row. None: all rows are of one sequence.
    sequence: jax.Array | None
    index: jax.Array  # position within its sequence
    length: jax.Array  # length of its sequence


def _dense_positions(rows: int, lengths, nobody: int) -> Positions:
    index = jnp.arange(rows, dtype=jnp.int32)
    if lengths.shape == (0,):
        return Positions(None, index, jnp.int32(rows))
    lengths = jnp.clip(lengths, 0, rows)  # [*batch, 1]
    return Positions(jnp.where(index < lengths, 0, nobody), index, lengths)


def _varlen_positions(rows: int, cu_seqlens, nobody: int) -> Positions:
    cu = jax.lax.cummax(jnp.clip(cu_seqlens, 0, rows), axis=cu_seqlens.ndim - 1)
    row = jnp.arange(rows, dtype=jnp.int32)
    flat = cu.reshape(-1, cu.shape[-1])
    find = jax.vmap(lambda ends: jnp.searchsorted(ends, row, side="right").astype(jnp.int32))
    sequence = find(flat[:, 1:]).reshape(*cu.shape[:-1], rows)
    owned = (row >= cu[..., :1]) & (row < cu[..., -1:])
    at = jnp.minimum(sequence, cu.shape[-1] - 2)
    start = jnp.take_along_axis(cu, at, -1)
    length = jnp.take_along_axis(cu, at + 1, -1) - start
    return Positions(jnp.where(owned, sequence, nobody), row - start, length)


class Plan(NamedTuple):
    """What is common to all chunks of a call."""

    query: Positions
    key: Positions
    offset: jax.Array  # [*batch, T] or scalar: the diagonal
    dropout_state: jax.Array
    head_ids: jax.Array
    block_mask: jax.Array
    sequences: int  # an entry of the batch holds so many


def plan(config, seq_q, seq_k, query_lengths, key_lengths, causal_offset, *rest) -> Plan:
    positions = _varlen_positions if config.varlen else _dense_positions
    query = positions(seq_q, query_lengths, -1)
    key = positions(seq_k, key_lengths, -2)
    offset = jnp.int32(0) if causal_offset.shape == (0,) else causal_offset  # [*batch, 1]
    if config.bottom_right:
        key_length = key.length
        if config.varlen:  # of the query's own sequence
            cu = jax.lax.cummax(jnp.clip(key_lengths, 0, seq_k), axis=key_lengths.ndim - 1)
            at = jnp.clip(query.sequence, 0, cu.shape[-1] - 2)
            lead = jnp.broadcast_shapes(at.shape[:-1], cu.shape[:-1])
            at = jnp.broadcast_to(at, (*lead, seq_q))
            cu = jnp.broadcast_to(cu, (*lead, cu.shape[-1]))
            key_length = jnp.take_along_axis(cu, at + 1, -1) - jnp.take_along_axis(cu, at, -1)
        offset = offset + key_length - query.length
    sequences = query_lengths.shape[-1] - 1 if config.varlen else 1
    return Plan(query, key, offset, *rest, sequences)


def _existing(x, positions: Positions):
    """`x` [*batch, rows, N, H] with zeros in rows that nobody owns.

    Such rows may hold anything, NaN too, which a product with a probability of 0 would let through.
    """
    if positions.sequence is None:
        return x
    return jnp.where((positions.sequence >= 0)[..., None, None], x, 0)


def split_packed(config, query, key, value):
    if config.packing == 2:
        return tuple(jnp.moveaxis(query, -3, 0))
    if config.packing == 1:
        return (query, *jnp.moveaxis(key, -3, 0))
    return query, key, value


def _rows(x, start, size):
    """Rows of a per-row vector, which may be shared (scalar or one entry an array)."""
    if x is None or x.ndim == 0 or x.shape[-1] == 1:
        return x
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis=-1)


def _allowed(config, p: Plan, start, size, seq_k):
    """bool, broadcastable to [*batch, N, size, S], or None: everything."""
    everything = None
    row, col = _rows(p.query.index, start, size)[..., :, None], p.key.index[..., None, :]

    def both(a, b):
        return b if a is None else a & b

    if p.query.sequence is not None or p.key.sequence is not None:
        row_seq = _rows(p.query.sequence, start, size)
        row_seq = jnp.int32(0) if row_seq is None else row_seq
        col_seq = jnp.int32(0) if p.key.sequence is None else p.key.sequence
        row_seq = row_seq[..., :, None] if row_seq.ndim else row_seq
        col_seq = col_seq[..., None, :] if col_seq.ndim else col_seq
        everything = both(everything, (row_seq == col_seq) & (row >= 0) & (col >= 0))
    offset = _rows(p.offset, start, size)
    distance = col - row - (offset[..., :, None] if offset.ndim else offset)
    if config.window_left >= 0:
        everything = both(everything, distance >= -config.window_left)
    if config.window_right >= 0:
        everything = both(everything, distance <= config.window_right)
    if everything is not None:
        everything = everything[..., None, :, :] if everything.ndim > 2 else everything
    if p.block_mask.shape != (0,):
        rows = (start + jnp.arange(size)) // config.block_rows
        cols = jnp.arange(seq_k) // config.block_cols
        rows = jnp.minimum(rows, p.block_mask.shape[-2] - 1)  # rows of padding: discarded anyway
        blocks = jnp.take(jnp.take(p.block_mask, rows, axis=-2), cols, axis=-1) != 0
        everything = both(everything, blocks)
    return everything


def dropout_keep(config, p: Plan, start, size, seq_k):
    """bool [*batch, N, size, S]: which probabilities survive."""
    k0, k1, batch = (p.dropout_state[..., i, None] for i in range(3))  # [*batch, 1]
    head = p.head_ids
    if not config.varlen:
        shape = jnp.broadcast_shapes(k0.shape, head.shape)
        k0, k1, batch, head = (jnp.broadcast_to(x, shape) for x in (k0, k1, batch, head))
        bits = dropout.draws_block((k0, k1), batch, head, jnp.uint32(start), size, seq_k)
    else:
        sequence = _rows(p.query.sequence, start, size).astype(jnp.uint32)  # [*batch, size]
        batch = (batch * p.sequences + sequence)[..., None, :, None]
        row = _rows(p.query.index, start, size).astype(jnp.uint32)[..., None, :, None]
        col = p.key.index.astype(jnp.uint32)[..., None, None, :]
        key = (k0[..., None, None], k1[..., None, None])
        bits = dropout.draws(key, batch, head[:, None, None], row, col)
    return bits >= config.dropout_threshold


def _scores(config, query, key, group):
    """[*batch, N, rows, S] in the accumulation type."""
    wide = jnp.promote_types(query.dtype, jnp.float32)
    q = query.reshape(*query.shape[:-2], -1, group, query.shape[-1])
    s = jnp.einsum(
        "...tkgh,...skh->...kgts", q, key, preferred_element_type=wide, precision="highest"
    )
    return s.reshape(*s.shape[:-4], -1, *s.shape[-2:]) * config.scale


def _grouped(x, group):
    """[*batch, N, ...rows, cols] -> [*batch, K, G, rows, cols]."""
    return x.reshape(*x.shape[:-3], -1, group, *x.shape[-2:])


def _einsum(spec, a, b):
    return jnp.einsum(
        spec,
        a,
        b,
        preferred_element_type=jnp.promote_types(b.dtype, jnp.float32),
        precision="highest",
    )


def _chunk_rows(batch, heads, seq_q, seq_k) -> int:
    known = math.prod(n for n in (batch, heads, seq_k) if isinstance(n, int))  # jax.export: symbols
    rows = max(16, 1 << max(0, (_CHUNK_BYTES // max(1, 4 * known)).bit_length() - 1))
    return min(rows, -(-seq_q // 16) * 16) if isinstance(seq_q, int) else rows


def _size(shape):
    return functools.reduce(lambda a, b: a * b, shape, 1)


def probabilities(config, p, start, query, key, bias=None, mask=None):
    """One chunk: (P [*batch, N, rows, S], lse); row 0 of `query` is row `start` of the call."""
    size, seq_k = query.shape[-3], key.shape[-3]
    s = _scores(config, query, key, query.shape[-2] // key.shape[-2])
    if bias is not None:
        s = s + bias.astype(s.dtype)
    allowed = _allowed(config, p, start, size, seq_k)
    if mask is not None:
        allowed = mask if allowed is None else allowed & mask
    if allowed is not None:
        s = jnp.where(allowed, s, -jnp.inf)
    # A row without a key has maximum -inf; 0 in its place keeps exp and log out of NaN.
    top = jax.lax.stop_gradient(jnp.max(s, -1, keepdims=True))
    top = jnp.where(top == -jnp.inf, 0.0, top)
    e = jnp.exp(s - top)
    total = jnp.sum(e, -1, keepdims=True)
    empty = total == 0.0
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(jnp.where(empty, 1.0, total)))[..., 0]
    return e / jnp.where(empty, 1.0, total), lse


def _attend(config, p, start, query, key, value, bias=None, mask=None):
    """One chunk: (out, lse)."""
    size, seq_k = query.shape[-3], key.shape[-3]
    group = query.shape[-2] // key.shape[-2]
    probs, lse = probabilities(config, p, start, query, key, bias, mask)
    if config.dropout_threshold:
        keep = dropout_keep(config, p, start, size, seq_k)
        probs = jnp.where(keep, probs * dropout.keep_scale(config.dropout_threshold), 0.0)
    out = _einsum("...kgts,...skh->...tkgh", _grouped(probs, group).astype(value.dtype), value)
    out = out.reshape(*out.shape[:-3], -1, out.shape[-1])
    return out.astype(query.dtype), lse


def _chunks(x, axis, rows, count):
    """[..., T, ...] -> [count, ..., rows, ...], padded with zeros."""
    pad = [(0, 0)] * x.ndim
    pad[axis % x.ndim] = (0, rows * count - x.shape[axis])
    x = jnp.pad(x, pad)
    axis %= x.ndim
    x = x.reshape(*x.shape[:axis], count, rows, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _joined(x, axis, length):
    """The inverse of `_chunks`: `axis` is that of the rows in the result."""
    x = jnp.moveaxis(x, 0, axis - 1 if axis < 0 else axis)
    axis %= x.ndim - 1
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, length, axis=axis)


def pad_plan(p: Plan, total):
    """Per-row vectors of the queries, padded to whole chunks with rows that nobody owns."""

    def pad(x, fill):
        if x is None or x.ndim == 0 or x.shape[-1] == 1:
            return x
        return jnp.pad(
            x, [(0, 0)] * (x.ndim - 1) + [(0, total - x.shape[-1])], constant_values=fill
        )

    query = Positions(pad(p.query.sequence, -1), pad(p.query.index, 0), pad(p.query.length, 0))
    if query.index.shape[-1] == 1:  # a single row is no shared scalar
        query = query._replace(
            index=jnp.pad(query.index, [(0, 0)] * (query.index.ndim - 1) + [(0, total - 1)])
        )
    return p._replace(query=query, offset=pad(p.offset, 0))


def chunked(config, query, key, value, bias, mask, options):
    """Attention with bias and mask, differentiated by JAX; one chunk of scores is alive at a time.

    Args:
      query: [*batch, T, N, H]; key, value: [*batch, S, K, H or Hv].
      bias, mask: None or broadcastable to [*batch, N, T, S].
      options: the six optional operands of `_ops/attention.py`.

    Returns:
      (out [*batch, T, N, Hv], lse [*batch, N, T]).
    """
    seq_q, seq_k = query.shape[-3], key.shape[-3]
    p = plan(config, seq_q, seq_k, *options)
    query, key, value = (
        _existing(x, rows) for x, rows in ((query, p.query), (key, p.key), (value, p.key))
    )
    batch = _size(jnp.broadcast_shapes(query.shape[:-3], key.shape[:-3]))
    rows = _chunk_rows(batch, query.shape[-2], seq_q, seq_k)
    count = -(-seq_q // rows)
    p = pad_plan(p, rows * count)

    def per_row(x):  # bias and mask may be shared along the queries
        if x is None or x.shape[-2] == 1:
            return None, x
        return _chunks(x, -2, rows, count), None

    (bias_rows, bias_all), (mask_rows, mask_all) = per_row(bias), per_row(mask)

    @jax.checkpoint
    def step(chunk):
        start, q, b, m = chunk
        b = bias_all if b is None else b
        m = mask_all if m is None else m
        return _attend(config, p, start, q, key, value, b, m)

    starts = jnp.arange(count, dtype=jnp.int32) * rows
    out, lse = jax.lax.map(step, (starts, _chunks(query, -3, rows, count), bias_rows, mask_rows))
    return _joined(out, -3, seq_q), _joined(lse, -1, seq_q)


def forward(config, query, key, value, *options):
    """(out, lse) of the forward operands."""
    query, key, value = split_packed(config, query, key, value)
    lead = jnp.broadcast_shapes(
        *(x.shape[:-3] for x in (query, key, value)), *_option_leads(options)
    )
    out, lse = chunked(config, query, key, value, None, None, options)
    return (
        jnp.broadcast_to(out, (*lead, *out.shape[-3:])),
        jnp.broadcast_to(lse, (*lead, *lse.shape[-2:])),
    )


def _option_leads(options):
    trailing = (1, 1, 1, 1, None, 3)  # axes after the batch axes; head_ids has no batch axes
    return [x.shape[:-n] for x, n in zip(options, trailing, strict=True) if n and x.shape != (0,)]


def backward(config, query, key, value, out, lse, dout, dlse, *options):
    """(dq, dk, dv) [packed as the operands are] from the forward's results and their cotangents."""
    q, k, v = split_packed(config, query, key, value)
    seq_q, seq_k = q.shape[-3], k.shape[-3]
    arrays = (q, k, v, out, dout)
    lead = jnp.broadcast_shapes(
        *(x.shape[:-3] for x in arrays), lse.shape[:-2], *_option_leads(options)
    )
    group = q.shape[-2] // k.shape[-2]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    rows = _chunk_rows(_size(lead), q.shape[-2], seq_q, seq_k)
    count = -(-seq_q // rows)
    p = plan(config, seq_q, seq_k, *options)
    q, out, dout = (_existing(x, p.query) for x in (q, out, dout))
    k, v = (_existing(x, p.key) for x in (k, v))
    delta = jnp.einsum("...tnh,...tnh->...nt", dout.astype(wide), out.astype(wide))
    if dlse.shape != (0,):
        delta = delta - _existing(dlse.swapaxes(-1, -2)[..., None], p.query)[..., 0].swapaxes(
            -1, -2
        )
    p = pad_plan(p, rows * count)
    lse = jnp.where(lse == -jnp.inf, 0.0, lse)

    @jax.checkpoint
    def of_rows(chunk):
        start, q_rows, do_rows, lse_rows, delta_rows = chunk
        s = _scores(config, q_rows, k, group)
        allowed = _allowed(config, p, start, rows, seq_k)
        inside = start + jnp.arange(rows)[:, None] < seq_q
        s = jnp.where(inside if allowed is None else allowed & inside, s, -jnp.inf)
        probs = jnp.exp(s - lse_rows[..., None])  # [*batch, N, rows, S]
        do = do_rows.reshape(*do_rows.shape[:-2], -1, group, do_rows.shape[-1])
        dp = _einsum("...tkgh,...skh->...kgts", do, v)
        dp = dp.reshape(*dp.shape[:-4], -1, *dp.shape[-2:])
        dropped = probs
        if config.dropout_threshold:
            keep = dropout_keep(config, p, start, rows, seq_k)
            scale = dropout.keep_scale(config.dropout_threshold)
            dropped = jnp.where(keep, probs * scale, 0.0)
            dp = jnp.where(keep, dp * scale, 0.0)
        ds = (probs * (dp - delta_rows[..., None]) * config.scale).astype(q.dtype)
        ds = _grouped(ds, group)
        dv = _einsum("...kgts,...tkgh->...skh", _grouped(dropped, group).astype(do.dtype), do)
        q_grouped = q_rows.reshape(*q_rows.shape[:-2], -1, group, q_rows.shape[-1])
        dk = _einsum("...kgts,...tkgh->...skh", ds, q_grouped)
        dq = _einsum("...kgts,...skh->...tkgh", ds, k)
        return dk, dv, dq.reshape(*dq.shape[:-3], -1, dq.shape[-1]).astype(q.dtype)

    starts = jnp.arange(count, dtype=jnp.int32) * rows
    chunks = (
        starts,
        *(_chunks(x, -3, rows, count) for x in (q, dout)),
        *(_chunks(x, -1, rows, count) for x in (lse, delta)),
    )
    # The first chunk by itself: it gives the sums their shardings, which zeros would not have.
    dk, dv, dq = of_rows(tuple(x[0] for x in chunks))
    dq = dq[None]
    if count > 1:

        def add(sums, chunk):
            dk, dv, dq = of_rows(chunk)
            return (sums[0] + dk, sums[1] + dv), dq

        (dk, dv), later = jax.lax.scan(add, (dk, dv), tuple(x[1:] for x in chunks))
        dq = jnp.concatenate([dq, later])
    dq = jnp.broadcast_to(_joined(dq, -3, seq_q), (*lead, *q.shape[-3:]))
    dk = jnp.broadcast_to(dk, (*lead, *k.shape[-3:])).astype(k.dtype)
    dv = jnp.broadcast_to(dv, (*lead, *v.shape[-3:])).astype(v.dtype)
    nothing = jnp.zeros((0,), q.dtype)
    if config.packing == 2:
        return jnp.stack([dq, dk, dv], -3), nothing, nothing
    if config.packing == 1:
        return dq, jnp.stack([dk, dv], -3), nothing
    return dq, dk, dv

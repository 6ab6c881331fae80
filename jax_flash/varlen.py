"""Exact attention over sequences of different lengths, concatenated without padding.

Sequence s owns rows cu_seqlens[s] .. cu_seqlens[s + 1] of the arrays and attends within itself
alone. Rows that no sequence owns give output 0, lse -inf and zero gradients, so that arrays may
have spare capacity. cu_seqlens are data: wrong ones are clamped to the arrays and made monotonic,
and never read anything else.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash import _attention as shared
from jax_flash._ops.attention import KEY_VALUE, QUERY_KEY_VALUE, SEPARATE, AttentionConfig
from jax_flash.attention import Implementation, _documented


def _cu_seqlens(name: str, cu_seqlens: Any, batch: tuple[int, ...], total: int) -> jax.Array:
    known = shared.concrete(cu_seqlens)
    cu = jnp.asarray(cu_seqlens)
    if cu.dtype != jnp.int32:
        shared.refuse(name, "an int32 array", cu.dtype, TypeError)
    if cu.ndim < 1 or cu.shape[-1] < 2 or cu.shape[:-1] not in ((), batch):
        expected = f"shape [sequences + 1] or {(*batch, 'sequences + 1')}"
        shared.refuse(name, expected, f"shape {cu.shape}")
    if known is not None and ((np.diff(known) < 0).any() or known.min() < 0 or known.max() > total):
        shared.refuse(name, f"non-decreasing values in [0, {total}]", known.tolist())
    return cu.reshape((1,) * (len(batch) + 1 - cu.ndim) + cu.shape)


def _varlen(
    arrays,
    packing: int,
    query_shape: tuple[int, ...],
    kv_shape: tuple[int, ...],
    value_dim: int,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    names: tuple[str, str],
    *,
    scale,
    is_causal,
    causal_offset,
    local_window_size,
    dropout_rate,
    dropout_key,
    deterministic,
    return_lse,
    implementation,
):
    *batch, total_q, heads, head_dim = query_shape
    batch = tuple(batch)
    total_k = kv_shape[-3]
    shared.check_implementation(implementation)
    shared.check_sizes(total_q, total_k)
    scale = shared.static_scale(scale, head_dim)
    cu_q = _cu_seqlens(names[0], cu_seqlens_q, batch, total_q)
    if cu_seqlens_k is None:
        if total_k != total_q:
            shared.refuse(
                names[1], f"an array, as key has {total_k} rows and query {total_q}", None
            )
        cu_k = cu_q
    else:
        cu_k = _cu_seqlens(names[1], cu_seqlens_k, batch, total_k)
    if cu_q.shape[-1] != cu_k.shape[-1]:
        shared.refuse(names[1], f"as many entries as {names[0]} ({cu_q.shape[-1]})", cu_k.shape[-1])
    offset, bottom_right = shared.offset_operand(causal_offset, batch)
    is_causal = shared.static_flag("is_causal", is_causal)
    deterministic = shared.static_flag("deterministic", deterministic)
    left, right = shared.window(local_window_size, is_causal)
    threshold, dropout_state, head_ids = shared.dropout_operands(
        dropout_rate, dropout_key, batch, heads
    )
    dtype = arrays[0].dtype
    if 0 in (*query_shape[:-1], total_k):
        out, lse = shared.empty_result(query_shape, value_dim, dtype)
    else:
        config = AttentionConfig(
            scale=scale,
            window_left=left,
            window_right=right,
            bottom_right=bottom_right,
            varlen=True,
            dropout_threshold=threshold,
            packing=packing,
            deterministic=deterministic,
            implementation=implementation,
        )
        no_blocks = jnp.zeros((0,), jnp.bool_)
        options = (cu_q, cu_k, offset, dropout_state, head_ids, no_blocks)
        out, lse = shared.run(config, packing, arrays, options, value_dim, return_lse)
    return (out, lse) if return_lse else out


@_documented
def varlen_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cu_seqlens_q: jax.Array,
    cu_seqlens_k: jax.Array | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    causal_offset: int | jax.Array | Literal["bottom_right"] = 0,
    local_window_size: int | tuple[int, int] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    implementation: Implementation = None,
):
    """Attention within each of several concatenated sequences (the "unpadded" FlashAttention
    calls).

    Args:
      query: [*B, total_q, N, H], usually without batch axes.
      key: [*B, total_k, K, H]; value: [*B, total_k, K, Hv].
      cu_seqlens_q: int32 [sequences + 1] or [*B, sequences + 1]: where each sequence starts, and
        the end.
      cu_seqlens_k: the same for keys; None: self-attention, those of the queries.
      scale, is_causal, causal_offset, local_window_size, dropout_rate, dropout_key, deterministic,
        implementation: as in `attention`, positions counted within each sequence.
      return_lse: also return the log-sum-exp, float32 [*B, N, total_q].

    Returns:
      out [*B, total_q, N, Hv], or (out, lse).

    {raises}
    """
    query = shared.as_tensor("query", query, 3)
    key = shared.as_tensor("key", key, 3)
    value = shared.as_tensor("value", value, 3)
    shared.check_qkv(query, key, value)
    return _varlen(
        (query, key, value),
        SEPARATE,
        query.shape,
        key.shape,
        value.shape[-1],
        cu_seqlens_q,
        cu_seqlens_k,
        ("cu_seqlens_q", "cu_seqlens_k"),
        scale=scale,
        is_causal=is_causal,
        causal_offset=causal_offset,
        local_window_size=local_window_size,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        deterministic=deterministic,
        return_lse=return_lse,
        implementation=implementation,
    )


@_documented
def varlen_attention_qkvpacked(
    qkv: jax.Array,
    cu_seqlens: jax.Array,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    causal_offset: int | jax.Array | Literal["bottom_right"] = 0,
    local_window_size: int | tuple[int, int] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    implementation: Implementation = None,
):
    """`varlen_attention` on one array that holds query, key and value.

    Args:
      qkv: [*B, total, 3, N, H].
      cu_seqlens: int32 [sequences + 1] or [*B, sequences + 1].
      scale, ..., implementation: as in `varlen_attention`. Short and long sequences may be mixed
        freely: they are scheduled together.

    Returns:
      out [*B, total, N, H], or (out, lse).

    {raises}
    """
    qkv = shared.as_tensor("qkv", qkv, 4)
    if qkv.shape[-3] != 3:
        shared.refuse("qkv", "shape [*B, total, 3, N, H]", f"shape {qkv.shape}")
    shape = (*qkv.shape[:-3], *qkv.shape[-2:])
    return _varlen(
        (qkv,),
        QUERY_KEY_VALUE,
        shape,
        shape,
        shape[-1],
        cu_seqlens,
        None,
        ("cu_seqlens", "cu_seqlens"),
        scale=scale,
        is_causal=is_causal,
        causal_offset=causal_offset,
        local_window_size=local_window_size,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        deterministic=deterministic,
        return_lse=return_lse,
        implementation=implementation,
    )


@_documented
def varlen_attention_kvpacked(
    query: jax.Array,
    key_value: jax.Array,
    cu_seqlens_q: jax.Array,
    cu_seqlens_k: jax.Array | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    causal_offset: int | jax.Array | Literal["bottom_right"] = 0,
    local_window_size: int | tuple[int, int] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    implementation: Implementation = None,
):
    """`varlen_attention` with key and value in one array.

    Args:
      query: [*B, total_q, N, H].
      key_value: [*B, total_k, 2, K, H].
      cu_seqlens_q, cu_seqlens_k, scale, ..., implementation: as in `varlen_attention`.

    Returns:
      out [*B, total_q, N, H], or (out, lse).

    {raises}
    """
    query = shared.as_tensor("query", query, 3)
    key_value = shared.as_tensor("key_value", key_value, 4)
    if key_value.shape[-3] != 2 or key_value.ndim != query.ndim + 1:
        shared.refuse("key_value", "shape [*B, total_k, 2, K, H]", f"shape {key_value.shape}")
    shape = (*key_value.shape[:-3], *key_value.shape[-2:])
    spec = jax.ShapeDtypeStruct(shape, key_value.dtype)
    shared.check_qkv(query, spec, spec)
    return _varlen(
        (query, key_value),
        KEY_VALUE,
        query.shape,
        shape,
        shape[-1],
        cu_seqlens_q,
        cu_seqlens_k,
        ("cu_seqlens_q", "cu_seqlens_k"),
        scale=scale,
        is_causal=is_causal,
        causal_offset=causal_offset,
        local_window_size=local_window_size,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        deterministic=deterministic,
        return_lse=return_lse,
        implementation=implementation,
    )

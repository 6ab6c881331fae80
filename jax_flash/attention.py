"""Exact attention over padded batches: separate, packed and block-sparse operands.

    S = scale * Q K^T + bias,  P = softmax(S over the keys a query may see),  O = dropout(P) V

Algorithm: FlashAttention (Dao et al., arXiv:2205.14135, algorithms 1-4) in FlashAttention-2's form
(arXiv:2307.08691, section 3): the forward keeps (out, lse), the backward recomputes P from them.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jax_flash import _attention as shared
from jax_flash._attention import AttentionProbs
from jax_flash._ops import attention_xla
from jax_flash._ops._op import warn_once
from jax_flash._ops.attention import KEY_VALUE, QUERY_KEY_VALUE, SEPARATE, AttentionConfig

Implementation = Literal["cuda", "cpu", "xla"] | None

_OPTIONS = """
      scale: factor on the scores; default H**-0.5.
      is_causal: query i sees keys j <= i + causal_offset.
      causal_offset: where the diagonal of `is_causal` and `local_window_size` starts: an int, an
        int32 array of the batch's shape, or "bottom_right", which aligns the last query with the
        last key (an offset of key length - query length, per batch entry). Default 0: top-left
        aligned, as in `jax.nn`.
      query_seq_lengths, key_value_seq_lengths: int32 [*B]; rows beyond them do not exist: their
        output is 0, their lse -inf, their gradients 0. Traced values are clamped to the axis.
      local_window_size: query i sees keys i + causal_offset - left .. i + causal_offset + right;
        one int stands for both sides.
      dropout_rate: probability, in [0, 1), that an element of P is dropped; the nearest multiple
        of 1/65536 is used, and what is kept is divided by its probability of being kept. A Python
        float.
      dropout_key: a JAX PRNG key. The mask depends on the key and the element's (batch, head,
        row, column) alone: it is the same on every device and for every sharding.
      block_mask: bool [*B or 1, N or 1, ceil(T / rows), ceil(S / cols)], broadcastable; tiles
        where it is False are not computed. May be traced.
      block_size: (rows, cols) of a block of `block_mask`: multiples of 16.
      deterministic: the gradients have the same bits in every run (the output always has).
      return_lse: also return log-sum-exp of the scores, float32 [*B, N, T]; differentiable.
      return_probs: also return `AttentionProbs`; needs O(T * S) memory, for tests.
      implementation: None picks by platform when the program is lowered: "cuda" and "cpu" are our
        kernels, "xla" is compiled from jnp in O(T) memory. Naming one that cannot serve the call
        raises.
"""
_RAISES = """
    Raises:
      TypeError: an array or option has the wrong type.
      ValueError: a shape or value is not possible; the text names the argument, the expectation,
        the fact.
      NotImplementedError: the `implementation` asked for cannot serve the call; the text says why.
"""


def _documented(function):
    function.__doc__ = function.__doc__.replace("{options}", _OPTIONS.strip()).replace(
        "{raises}", _RAISES.strip()
    )
    return function


@dataclasses.dataclass(frozen=True)
class _Call:
    """One public call, whatever its packing: arrays, and what q, k, v in them look like."""

    arrays: tuple[jax.Array, ...]
    query_shape: tuple[int, ...]
    kv_shape: tuple[int, ...]  # of the key
    value_dim: int
    packing: int

    def separate(self):
        config = AttentionConfig(scale=1.0, packing=self.packing)
        return attention_xla.split_packed(config, *self.arrays, *(None,) * (3 - len(self.arrays)))


def _attention(
    call: _Call,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    causal_offset: Any = 0,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: Any = None,
    dropout_rate: float = 0.0,
    dropout_key: Any = None,
    block_mask: Any = None,
    block_size: Any = (128, 128),
    deterministic: bool = False,
    return_lse: bool = False,
    return_residual: bool = False,
    return_probs: bool = False,
    implementation: Implementation = None,
):
    *batch, seq_q, heads, head_dim = call.query_shape
    batch = tuple(batch)
    seq_k = call.kv_shape[-3]
    dtype = call.arrays[0].dtype
    shared.check_implementation(implementation)
    shared.check_sizes(seq_q, seq_k)
    scale = shared.static_scale(scale, head_dim)
    offset, bottom_right = shared.offset_operand(causal_offset, batch)
    is_causal = shared.static_flag("is_causal", is_causal)
    deterministic = shared.static_flag("deterministic", deterministic)
    left, right = shared.window(local_window_size, is_causal)
    threshold, dropout_state, head_ids = shared.dropout_operands(
        dropout_rate, dropout_key, batch, heads
    )
    blocks, (block_rows, block_cols) = shared.block_operand(
        block_mask, block_size, (*batch, heads, seq_q, seq_k)
    )
    options = (
        shared.lengths_operand("query_seq_lengths", query_seq_lengths, batch, seq_q, "T"),
        shared.lengths_operand("key_value_seq_lengths", key_value_seq_lengths, batch, seq_k, "S"),
        offset,
        dropout_state,
        head_ids,
        blocks,
    )
    config = AttentionConfig(
        scale=scale,
        window_left=left,
        window_right=right,
        bottom_right=bottom_right,
        dropout_threshold=threshold,
        block_rows=block_rows,
        block_cols=block_cols,
        packing=call.packing,
        deterministic=deterministic,
        implementation=implementation,
    )
    bias = _score_operand("bias", bias, (*batch, heads, seq_q, seq_k))
    mask = _score_operand("mask", mask, (*batch, heads, seq_q, seq_k))

    if 0 in (*call.query_shape[:-1], seq_k):
        out, lse = shared.empty_result(call.query_shape, call.value_dim, dtype)
    elif bias is not None or mask is not None:
        out, lse = _with_scores(config, call, bias, mask, options)
    else:
        out, lse = shared.run(
            config,
            call.packing,
            call.arrays,
            options,
            call.value_dim,
            return_lse or return_residual,
        )
    results = [out]
    if return_lse:
        results.append(lse)
    if return_residual:
        results.append(jnp.moveaxis(lse, -1, -2))
    if return_probs:
        results.append(_probabilities(config, call, bias, mask, options))
    return results[0] if len(results) == 1 else tuple(results)


def _score_operand(name: str, x: Any, shape: tuple[int, ...]):
    """bias or mask, broadcastable to the scores' shape [*B, N, T, S], with as many axes."""
    if x is None:
        return None
    x = jnp.asarray(x)
    if name == "mask" and x.dtype != jnp.bool_:
        shared.refuse(name, "a boolean array (True takes part)", x.dtype, TypeError)
    if name == "bias" and not jnp.issubdtype(x.dtype, jnp.floating):
        shared.refuse(name, "a floating-point array", x.dtype, TypeError)
    fits = x.ndim <= len(shape) and all(
        size in (1, full) for size, full in zip(x.shape[::-1], shape[::-1], strict=False)
    )
    if not fits:
        shared.refuse(name, f"a shape broadcastable to {shape}", f"shape {x.shape}")
    return x.reshape((1,) * (len(shape) - x.ndim) + x.shape)


def _with_scores(config, call, bias, mask, options):
    if config.implementation in ("cpu", "cuda"):
        raise NotImplementedError(
            f"implementation={config.implementation!r}: bias and mask run on 'xla' alone as yet; "
            "is_causal, local_window_size, lengths and block_mask have kernels"
        )
    warn_once(
        "jax_flash.attention: bias and mask have no kernel yet; XLA's compiled form runs instead."
    )
    tensors = map(shared.pad_head_dim, call.separate())
    out, lse = attention_xla.chunked(config, *tensors, bias, mask, options)
    return out[..., : call.value_dim], lse


def _probabilities(config, call, bias, mask, options) -> AttentionProbs:
    """P and the dropout mask, whole, by the chunked form's own pieces on one chunk."""
    query, key, _ = map(shared.pad_head_dim, call.separate())
    seq_q, seq_k = query.shape[-3], key.shape[-3]
    if 0 in (*query.shape, seq_k):
        shape = (*query.shape[:-3], query.shape[-2], seq_q, seq_k)
        keep = jnp.ones(shape, jnp.bool_) if config.dropout_threshold else None
        return AttentionProbs(jnp.zeros(shape, jnp.float32), keep)
    rows = -(-seq_q // 16) * 16
    plan = attention_xla.plan(config, seq_q, seq_k, *options)
    plan = attention_xla.pad_plan(plan, rows)
    query = jnp.pad(query, [(0, 0)] * (query.ndim - 3) + [(0, rows - seq_q), (0, 0), (0, 0)])

    def padded(x):
        if x is None or x.shape[-2] == 1:
            return x
        return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, rows - seq_q), (0, 0)])

    probs = attention_xla.probabilities(config, plan, 0, query, key, padded(bias), padded(mask))[0]
    keep = None
    if config.dropout_threshold:
        keep = attention_xla.dropout_keep(config, plan, 0, rows, seq_k)[..., :seq_q, :]
    return AttentionProbs(probs[..., :seq_q, :], keep)


@_documented
def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    causal_offset: int | jax.Array | Literal["bottom_right"] = 0,
    query_seq_lengths: jax.Array | None = None,
    key_value_seq_lengths: jax.Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    block_mask: jax.Array | None = None,
    block_size: tuple[int, int] = (128, 128),
    deterministic: bool = False,
    return_lse: bool = False,
    return_residual: bool = False,
    return_probs: bool = False,
    implementation: Implementation = None,
):
    """Scaled dot-product attention: a drop-in for `jax.nn.dot_product_attention`, fused and exact.

    Letters: B batch, T queries, S keys, N query heads, K kv heads, H head dim. K must divide N;
    query head n reads kv head n // (N / K) (grouped-query attention; K = 1 is multi-query).
    Kernels take head dims that are multiples of 8, up to 256; others are padded with zeros. Rows
    without a visible key give output 0, lse -inf and zero gradients (`jax.nn` gives them the mean
    of the values).

    Args:
      query: [*B, T, N, H], any number of leading batch axes; bfloat16, float16, float32 (exact f32
        arithmetic), or float64 (XLA).
      key: [*B, S, K, H].
      value: [*B, S, K, Hv].
      bias: added to the scores; broadcastable to [*B, N, T, S]. Runs on XLA as yet (O(T) memory
        beside it).
      mask: bool, True takes part; broadcastable to [*B, N, T, S]. Runs on XLA as yet.
      {options}
      return_residual: as in `jax.nn`: also return the lse as [*B, T, N]; float32 and
        differentiable here.

    Returns:
      out [*B, T, N, Hv] in query's dtype; with any return_* a tuple (out, lse, residual, probs)
      of what was asked for, in this order.

    {raises}
    """
    query = shared.as_tensor("query", query, 3)
    key = shared.as_tensor("key", key, 3)
    value = shared.as_tensor("value", value, 3)
    shared.check_qkv(query, key, value)
    call = _Call((query, key, value), query.shape, key.shape, value.shape[-1], SEPARATE)
    return _attention(
        call,
        bias,
        mask,
        scale=scale,
        is_causal=is_causal,
        causal_offset=causal_offset,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        block_mask=block_mask,
        block_size=block_size,
        deterministic=deterministic,
        return_lse=return_lse,
        return_residual=return_residual,
        return_probs=return_probs,
        implementation=implementation,
    )


@_documented
def attention_qkvpacked(
    qkv: jax.Array,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    causal_offset: int | jax.Array | Literal["bottom_right"] = 0,
    query_seq_lengths: jax.Array | None = None,
    key_value_seq_lengths: jax.Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    block_mask: jax.Array | None = None,
    block_size: tuple[int, int] = (128, 128),
    deterministic: bool = False,
    return_lse: bool = False,
    return_probs: bool = False,
    implementation: Implementation = None,
):
    """`attention` on one array that holds query, key and value: read in place, one packed gradient.

    Args:
      qkv: [*B, T, 3, N, H]; what a projection to 3 * N * H features gives, reshaped.
      {options}

    Returns:
      As `attention`: out [*B, T, N, H], then what was asked for.

    {raises}
    """
    qkv = shared.as_tensor("qkv", qkv, 4)
    if qkv.shape[-3] != 3:
        shared.refuse("qkv", "shape [*B, T, 3, N, H]", f"shape {qkv.shape}")
    shape = (*qkv.shape[:-3], *qkv.shape[-2:])
    return _attention(
        _Call((qkv,), shape, shape, shape[-1], QUERY_KEY_VALUE),
        scale=scale,
        is_causal=is_causal,
        causal_offset=causal_offset,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        block_mask=block_mask,
        block_size=block_size,
        deterministic=deterministic,
        return_lse=return_lse,
        return_probs=return_probs,
        implementation=implementation,
    )


@_documented
def attention_kvpacked(
    query: jax.Array,
    key_value: jax.Array,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    causal_offset: int | jax.Array | Literal["bottom_right"] = 0,
    query_seq_lengths: jax.Array | None = None,
    key_value_seq_lengths: jax.Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    block_mask: jax.Array | None = None,
    block_size: tuple[int, int] = (128, 128),
    deterministic: bool = False,
    return_lse: bool = False,
    return_probs: bool = False,
    implementation: Implementation = None,
):
    """`attention` with key and value in one array: read in place, one packed gradient.

    Args:
      query: [*B, T, N, H].
      key_value: [*B, S, 2, K, H].
      {options}

    Returns:
      As `attention`: out [*B, T, N, H], then what was asked for.

    {raises}
    """
    query = shared.as_tensor("query", query, 3)
    key_value = shared.as_tensor("key_value", key_value, 4)
    if key_value.shape[-3] != 2 or key_value.ndim != query.ndim + 1:
        shared.refuse("key_value", "shape [*B, S, 2, K, H]", f"shape {key_value.shape}")
    shape = (*key_value.shape[:-3], *key_value.shape[-2:])
    spec = jax.ShapeDtypeStruct(shape, key_value.dtype)
    shared.check_qkv(query, spec, spec)
    return _attention(
        _Call((query, key_value), query.shape, shape, shape[-1], KEY_VALUE),
        scale=scale,
        is_causal=is_causal,
        causal_offset=causal_offset,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        block_mask=block_mask,
        block_size=block_size,
        deterministic=deterministic,
        return_lse=return_lse,
        return_probs=return_probs,
        implementation=implementation,
    )


@_documented
def blocksparse_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    block_mask: jax.Array,
    *,
    block_size: tuple[int, int] = (128, 128),
    **options,
):
    """Attention where a block mask decides which tiles exist; its time falls with the mask's
    density.

    Block-sparse FlashAttention (arXiv:2205.14135, section 3.3). Rows whose blocks are all off
    give 0.

    Args:
      query, key, value: as in `attention`.
      block_mask: bool [*B or 1, N or 1, ceil(T / rows), ceil(S / cols)], broadcastable; static or
        traced.
      block_size: (rows, cols): (128, 128), (64, 64), the original (16, 256), or other multiples
        of 16.
      **options: every option of `attention`; they combine.

    Returns:
      As `attention`.

    {raises}
    """
    if block_mask is None:
        shared.refuse("block_mask", "a boolean array", None, TypeError)
    return attention(query, key, value, block_mask=block_mask, block_size=block_size, **options)

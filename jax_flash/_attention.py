"""What the public attention calls share: checks, options -> operands, and the custom VJP."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jax_flash._ops import _register, attention_xla, dropout
from jax_flash._ops._op import vary_together
from jax_flash._ops.attention import AttentionConfig, attention_backward, attention_forward

IMPLEMENTATIONS = (None, "cuda", "cpu", "xla")
_MAX_ROWS = 1 << 30  # positions are int32 in the kernels


class AttentionProbs(NamedTuple):
    """Probabilities, for tests: O(T * S) memory.

    Attributes:
      probs: float32 [*B, N, T, S], normalised, before dropout.
      dropout_mask: bool [*B, N, T, S], True where kept; None without dropout.
    """

    probs: jax.Array
    dropout_mask: jax.Array | None


# Checks ------------------------------------------------------------------------------------------


def refuse(name: str, expected: str, got: Any, error: type[Exception] = ValueError):
    raise error(f"{name}: expected {expected}, got {got}")


def as_tensor(name: str, x: Any, min_rank: int) -> jax.Array:
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        refuse(name, "a floating-point array", x.dtype, TypeError)
    if x.ndim < min_rank:
        refuse(name, f"at least {min_rank} axes", f"shape {x.shape}")
    return x


def check_same_dtype(**arrays: jax.Array) -> None:
    (first, reference), *rest = arrays.items()
    for name, x in rest:
        if x.dtype != reference.dtype:
            refuse(name, f"{first}'s dtype {reference.dtype}", x.dtype, TypeError)


def check_qkv(query: jax.Array, key: jax.Array, value: jax.Array) -> None:
    """Shapes [*B, T, N, H], [*B, S, K, H], [*B, S, K, Hv]."""
    check_same_dtype(query=query, key=key, value=value)
    for name, x in (("key", key), ("value", value)):
        if x.ndim != query.ndim:
            refuse(name, f"query's number of axes ({query.ndim})", f"shape {x.shape}")
        if x.shape[:-3] != query.shape[:-3]:
            refuse(name, f"query's leading axes {query.shape[:-3]}", f"shape {x.shape}")
    if key.shape[-1] != query.shape[-1]:
        refuse("key", f"query's head dim {query.shape[-1]}", f"{key.shape[-1]} (shape {key.shape})")
    if value.shape[-3:-1] != key.shape[-3:-1]:
        refuse(
            "value",
            f"key's length and heads {key.shape[-3:-1]}",
            f"{value.shape[-3:-1]} (shape {value.shape})",
        )
    heads, kv_heads = query.shape[-2], key.shape[-2]
    if kv_heads == 0 and heads != 0 or kv_heads and heads % kv_heads != 0:
        refuse("key", f"a number of heads that divides query's {heads}", kv_heads)


def check_sizes(seq_q: int, seq_k: int) -> None:
    for name, size in (("query", seq_q), ("key", seq_k)):
        if isinstance(size, int) and size > _MAX_ROWS:  # not a symbol of jax.export
            refuse(name, f"a sequence axis of at most {_MAX_ROWS}", size)


def check_implementation(
    implementation: str | None,
    operator: str = "attention",
    kernels: Sequence[str] = ("cpu", "cuda"),
) -> None:
    """Passes None, "xla" and, of the platforms for which the operator has kernels, those built."""
    if implementation not in IMPLEMENTATIONS:
        refuse("implementation", f"one of {IMPLEMENTATIONS}", repr(implementation))
    if implementation in (None, "xla"):
        return
    reason = _register.missing(implementation)
    if implementation not in kernels:
        reason = (
            f"{operator} has no {implementation} kernels; None and 'xla' run XLA's form on every "
            "platform"
        )
    if reason is not None:
        raise NotImplementedError(f"implementation={implementation!r}: {reason}")


def static_scale(scale: Any, head_dim: int) -> float:
    if scale is None:
        return 1.0 / math.sqrt(head_dim) if head_dim else 1.0
    if isinstance(scale, jax.core.Tracer) or np.ndim(scale) != 0:
        refuse("scale", "a Python float (static)", type(scale).__name__, TypeError)
    return float(scale)


def static_flag(name: str, flag: Any) -> bool:
    if isinstance(flag, jax.core.Tracer) or not isinstance(flag, (bool, np.bool_)):
        refuse(name, "a Python bool (static)", type(flag).__name__, TypeError)
    return bool(flag)


def window(local_window_size: Any, is_causal: bool) -> tuple[int, int]:
    """(left, right) as the kernels take them: -1 is without limit."""
    left, right = -1, -1
    if local_window_size is not None:
        sizes = local_window_size
        sizes = tuple(sizes) if isinstance(sizes, (tuple, list)) else (sizes, sizes)
        if len(sizes) != 2 or not all(isinstance(s, (int, np.integer)) and s >= 0 for s in sizes):
            refuse("local_window_size", "an int >= 0 or a pair of them", local_window_size)
        # No two positions are further apart than int32 reaches.
        left, right = (int(s) if s < 1 << 31 else -1 for s in sizes)
    return left, 0 if is_causal else right


def lengths_operand(name: str, lengths: Any, batch: tuple[int, ...], limit: int, axis: str):
    """int32 [*B, 1], or the empty array that means: every row counts."""
    if lengths is None:
        return jnp.zeros((0,), jnp.int32)
    known = concrete(lengths)
    lengths = jnp.asarray(lengths)
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        refuse(name, "an int32 array", lengths.dtype, TypeError)
    if lengths.shape != batch:
        refuse(name, f"shape {batch}", f"shape {lengths.shape}")
    if known is not None and known.size and (known.min() < 0 or known.max() > limit):
        refuse(name, f"lengths in [0, {limit}] ({axis})", known.tolist())
    if lengths.dtype != jnp.int32:
        lengths = jnp.clip(lengths, 0, min(limit, jnp.iinfo(lengths.dtype).max)).astype(jnp.int32)
    return lengths[..., None]


def concrete(x: Any) -> np.ndarray | None:
    """The values, where Python can know them.

    Ask before jnp touches `x`: under jit that makes a tracer of it.
    """
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(x)):
        return None
    if isinstance(x, jax.Array) and not x.is_fully_addressable:  # of several processes
        return None
    return np.asarray(x)


def offset_operand(causal_offset: Any, batch: tuple[int, ...]) -> tuple[jax.Array, bool]:
    """(int32 [*B, 1] or empty, bottom_right)."""
    nothing = jnp.zeros((0,), jnp.int32)
    if isinstance(causal_offset, str):
        if causal_offset != "bottom_right":
            refuse("causal_offset", 'an int, an int32 array or "bottom_right"', repr(causal_offset))
        return nothing, True
    known = concrete(causal_offset)
    offset = jnp.asarray(causal_offset)
    if not jnp.issubdtype(offset.dtype, jnp.integer):
        refuse("causal_offset", 'an int, an int32 array or "bottom_right"', offset.dtype, TypeError)
    if offset.shape not in ((), batch):
        refuse("causal_offset", f"a scalar or shape {batch}", f"shape {offset.shape}")
    if known is not None and not known.any():
        return nothing, False
    # Positions are below 2^30: an offset beyond that already means all or nothing.
    info = jnp.iinfo(offset.dtype)
    offset = jnp.clip(offset, max(info.min, -(1 << 30)), min(info.max, 1 << 30)).astype(jnp.int32)
    return jnp.broadcast_to(offset, batch)[..., None], False


def dropout_operands(rate: Any, key: Any, batch: tuple[int, ...], heads: int):
    """(threshold, state uint32 [*B, 4], head ids uint32 [N]); see csrc/attention/params.h."""
    if isinstance(rate, jax.core.Tracer) or not isinstance(rate, (int, float, np.number)):
        refuse("dropout_rate", "a Python float (static)", type(rate).__name__, TypeError)
    rate = float(rate)
    if not 0.0 <= rate < 1.0:
        refuse("dropout_rate", "a rate in [0, 1)", rate)
    threshold = dropout.threshold(rate)
    nothing = jnp.zeros((0,), jnp.uint32)
    if threshold == 0:
        return 0, nothing, nothing
    if key is None:
        refuse("dropout_key", f"a JAX PRNG key with dropout_rate={rate}", None)
    if not isinstance(key, (jax.Array, np.ndarray)):
        refuse("dropout_key", "one JAX PRNG key", repr(key), TypeError)
    is_key = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if key.shape != (() if is_key else (2,)) or not (is_key or key.dtype == jnp.uint32):
        refuse("dropout_key", "one JAX PRNG key", f"{key.dtype} of shape {key.shape}")
    words = jnp.broadcast_to(dropout.key_words(key), (*batch, 2))
    entry = jnp.arange(math.prod(batch), dtype=jnp.uint32).reshape(*batch, 1)
    state = jnp.concatenate([words, entry, jnp.zeros_like(entry)], -1)
    return threshold, state, jnp.arange(heads, dtype=jnp.uint32)


def block_operand(block_mask: Any, block_size: Any, shape: Sequence[int]):
    """bool [*B or 1, N or 1, block rows, block cols], for scores of `shape` [*B, N, T, S]."""
    if block_mask is None:
        return jnp.zeros((0,), jnp.bool_), (0, 0)
    rows, cols = check_block_size(block_size)
    *batch, heads, seq_q, seq_k = shape
    mask = jnp.asarray(block_mask)
    if mask.dtype != jnp.bool_:
        if not jnp.issubdtype(mask.dtype, jnp.integer):
            refuse("block_mask", "a boolean (or 0/1 integer) array", mask.dtype, TypeError)
        mask = mask != 0
    blocks = (-(-seq_q // rows), -(-seq_k // cols))
    if mask.shape[-2:] != blocks or mask.ndim > len(shape):
        refuse(
            "block_mask",
            f"shape broadcastable to {(*batch, heads, *blocks)} for block_size={(rows, cols)}",
            f"shape {mask.shape}",
        )
    mask = mask.reshape((1,) * (len(shape) - mask.ndim) + mask.shape)
    for axis, size in enumerate((*batch, heads)):
        if mask.shape[axis] not in (1, size):
            refuse("block_mask", f"1 or {size} on axis {axis}", f"shape {mask.shape}")
    return mask, (rows, cols)


def check_block_size(block_size: Any) -> tuple[int, int]:
    sizes = tuple(block_size) if isinstance(block_size, (tuple, list)) else (block_size,) * 2
    if len(sizes) != 2 or not all(isinstance(s, (int, np.integer)) for s in sizes):
        refuse("block_size", "a pair (queries, keys) of ints", block_size)
    rows, cols = (int(s) for s in sizes)
    if rows <= 0 or cols <= 0 or rows % 16 or cols % 16:
        refuse("block_size", "multiples of 16, such as (128, 128), (64, 64) or (16, 256)", sizes)
    return rows, cols


# The custom VJP ----------------------------------------------------------------------------------
#
# `tensors` are query, key, value as `config.packing` has them (empty arrays for what is packed
# away), `options` the six of _ops/attention.py. Integer operands get no cotangent (None).


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(config: AttentionConfig, tensors, options):
    return attention_forward(config, *tensors, *options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_out(config: AttentionConfig, tensors, options):
    return attention_forward(config, *tensors, *options)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gradients(config: AttentionConfig, tensors, results, cotangents, options):
    return attention_backward(config, *tensors, *results, *cotangents, *options)


def _attend_forward(config, tensors, options):
    # Through `_attend` itself, so that the residuals can be differentiated once more.
    # NOTE: the barrier keeps XLA for GPUs from running the kernel twice in a scan over layers: it
    # moves a custom call into a fusion with the update of the scan's stacked residuals, and leaves
    # the call where it was as well for the other users of `out` (jax 0.11; openxla/xla#45799).
    out, lse = jax.lax.optimization_barrier(_attend(config, tensors, options))
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return (out, lse), (tensors, (out, lse), options)


def _attend_backward(config, residuals, cotangents):
    tensors, results, options = residuals
    return tuple(_gradients(config, tensors, results, cotangents, options)), None


def _attend_out_forward(config, tensors, options):
    (out, _), residuals = _attend_forward(config, tensors, options)
    return out, residuals


def _attend_out_backward(config, residuals, dout):
    no_dlse = jnp.zeros((0,), jnp.promote_types(dout.dtype, jnp.float32))
    return _attend_backward(config, residuals, (dout, no_dlse))


def _gradients_forward(config, *operands):
    return _gradients(config, *operands), operands


def _gradients_backward(config, operands, cotangents):
    # The second derivative: of the backward's own formula, in XLA, chunked like it.
    tensors, results, upstream, options = operands

    def formula(tensors, results, upstream):
        return attention_xla.backward(config, *tensors, *results, *upstream, *options)

    _, pullback = jax.vjp(formula, tensors, results, upstream)
    return (*pullback(tuple(cotangents)), None)


_attend.defvjp(_attend_forward, _attend_backward)
_attend_out.defvjp(_attend_out_forward, _attend_out_backward)
_gradients.defvjp(_gradients_forward, _gradients_backward)


def attend(config: AttentionConfig, tensors, options, return_lse: bool):
    """out, or (out, lse); differentiable in `tensors`, any number of times."""
    operands = vary_together(*tensors, *options)
    tensors, options = operands[: len(tensors)], operands[len(tensors) :]
    if return_lse:
        return tuple(_attend(config, tensors, options))
    return _attend_out(config, tensors, options)


# Head dims ---------------------------------------------------------------------------------------


def pad_head_dim(x: jax.Array) -> jax.Array:
    """The last axis to 8, 16, ..., with zeros: they change neither scores nor outputs."""
    if (extra := max(8, -(-x.shape[-1] // 8) * 8) - x.shape[-1]) == 0:
        return x
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, extra)])


def run(config: AttentionConfig, packing: int, arrays, options, value_dim: int, return_lse: bool):
    """Calls the kernels on `arrays` (1 packed, 2 kv-packed, 3 separate)."""
    nothing = jnp.zeros((0,), arrays[0].dtype)
    tensors = [pad_head_dim(x) for x in arrays] + [nothing] * (3 - len(arrays))
    result = attend(config, tensors, options, return_lse)
    out, lse = result if return_lse else (result, None)
    return out[..., :value_dim], lse


def empty_result(query_shape: Sequence[int], value_dim: int, dtype):
    """(out, lse) of a call without elements or without keys."""
    *batch, seq_q, heads, _ = query_shape
    wide = jnp.promote_types(dtype, jnp.float32)
    out = jnp.zeros((*batch, seq_q, heads, value_dim), dtype)
    return out, jnp.full((*batch, heads, seq_q), -jnp.inf, wide)

"""The two primitives of softmax over scores that exist in memory, and their XLA form.

    softmax_forward (scores, mask, row_ids)   -> probs
    softmax_backward(probs, dprobs, row_ids)  -> dscores

    scores, probs, dprobs, dscores [*B, T, S];  mask [*B or 1, T or 1, S] bool or uint8, not 0:
    masked;  row_ids int32 [T]: causal, a row sees the columns up to its id

Heads are one more batch axis. The forward's statistics are not kept: the backward needs a row of
probs and of dprobs, which it reads once, and may write over dprobs. It gets `row_ids` to pass by
what a causal row does not see. Batch axes and rows are shared by devices freely (row_ids say which
rows a device has); columns that are cut are gathered first.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash._ops import _register
from jax_flash._ops._batch import canonical
from jax_flash._ops._op import Implementation, Op, ffi_call
from jax_flash._ops._partition import BATCH, Signature, is_off


@dataclasses.dataclass(frozen=True)
class SoftmaxConfig:
    """What is static in a call.

    Attributes:
      scale: factor on the scores.
      implementation: None (by platform), "cuda", "cpu" or "xla".
    """

    scale: float
    implementation: str | None = None


_SCORES, _ROW_IDS = (BATCH, "T", "S"), ("T",)


def _forward_signature(config, scores, mask, row_ids) -> Signature:
    seq_q = scores.shape[-2]
    mask_rows = "T" if mask.shape[-2:-1] == (seq_q,) else "one"
    return Signature(
        operands=(
            _SCORES,
            () if is_off(mask) else (BATCH, mask_rows, "S"),
            () if is_off(row_ids) else _ROW_IDS,
        ),
        results=(_SCORES,),
        shardable={"T": seq_q},
        aliases={},
    )


def _forward_results(config, scores, mask, row_ids):
    leads = [scores.shape[:-2]] + ([] if is_off(mask) else [mask.shape[:-2]])
    shape = (*jnp.broadcast_shapes(*leads), *scores.shape[-2:])
    return (jax.ShapeDtypeStruct(shape, scores.dtype),)


def _backward_signature(config, probs, dprobs, row_ids) -> Signature:
    return Signature(
        operands=(_SCORES, _SCORES, () if is_off(row_ids) else _ROW_IDS),
        results=(_SCORES,),
        shardable={"T": probs.shape[-2]},
        aliases={},
    )


def _backward_results(config, probs, dprobs, row_ids):
    shape = jnp.broadcast_shapes(probs.shape, dprobs.shape)
    return (jax.ShapeDtypeStruct(shape, dprobs.dtype),)


# The XLA form ------------------------------------------------------------------------------------


def _wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _hidden(mask, row_ids, seq_k):
    """bool, broadcastable to the scores: what a row does not see; None: it sees everything."""
    if not is_off(mask):
        return mask != 0
    if not is_off(row_ids):
        return jnp.arange(seq_k, dtype=jnp.int32) > row_ids[:, None]
    return None


def forward(config, scores, mask, row_ids):
    hidden = _hidden(mask, row_ids, scores.shape[-1])
    s = _wide(scores) * config.scale
    if hidden is not None:
        s = jnp.where(hidden, -jnp.inf, s)
    top = jnp.max(s, -1, keepdims=True, initial=-jnp.inf)
    e = jnp.exp(s - jnp.where(top == -jnp.inf, 0, top))
    total = jnp.sum(e, -1, keepdims=True)
    probs = e / jnp.where(total == 0, 1, total)
    if hidden is not None:  # also in rows of NaN
        probs = jnp.where(hidden, 0, probs)
    return (probs.astype(scores.dtype),)


def backward(config, probs, dprobs, row_ids):
    p, dp = _wide(probs), _wide(dprobs)
    nothing = p == 0  # has no part in the row: its dP may be NaN, and so may the row's sum
    dp = jnp.where(nothing, 0, dp)
    delta = jnp.sum(p * dp, -1, keepdims=True)
    dscores = jnp.where(nothing, 0, config.scale * p * (dp - delta))
    return (dscores.astype(dprobs.dtype),)


# CUDA kernels ------------------------------------------------------------------------------------


def _refuse(config, scores, *rest) -> str | None:
    return _register.refusal("cuda", scores.dtype)


def _call(target, signature, result, wholes, config, *operands, in_place=None):
    """The first `wholes` operands with all batch entries, the others as they are."""
    whole = [jnp.broadcast_to(x, result.shape) for x in operands[:wholes]]
    operands = (*whole, *operands[wholes:])
    operands, _ = canonical(signature(config, *operands), operands)
    (out,) = ffi_call(
        target,
        (jax.ShapeDtypeStruct(operands[0].shape, result.dtype),),
        *operands,
        in_place=in_place,
        scale=np.float32(config.scale),
    )
    return (out.reshape(result.shape),)


def _kernel_forward(config, *operands):
    (result,) = _forward_results(config, *operands)
    target, signature = "jax_flash.softmax_forward", _forward_signature
    probs = _call(target, signature, result, 1, config, *operands)
    # In a scan that stacks probs for the backward XLA would run the call twice (openxla/xla#45799).
    return jax.lax.optimization_barrier(probs)


def _kernel_backward(config, *operands):
    """Writes dscores over dprobs; XLA copies them first where they are needed once more."""
    (result,) = _backward_results(config, *operands)
    target, signature = "jax_flash.softmax_backward", _backward_signature
    return _call(target, signature, result, 2, config, *operands, in_place={1: 0})


softmax_forward = Op(
    "softmax_forward",
    signature=_forward_signature,
    results=_forward_results,
    native={"cuda": Implementation("cuda", _kernel_forward, _refuse)},
    xla=Implementation("xla", forward),
)
softmax_backward = Op(
    "softmax_backward",
    signature=_backward_signature,
    results=_backward_results,
    native={"cuda": Implementation("cuda", _kernel_backward, _refuse)},
    xla=Implementation("xla", backward),
)

"""Softmax cross-entropy of logits, and of hidden states whose logits are never all in memory.

    z = logit_scale * logits,  lse = log sum_v exp(z_v)
    loss = (1 - s) (lse - z_label) + s (lse - mean_v z_v) + z_loss lse^2    (s: label smoothing)

Label smoothing: Szegedy et al., arXiv:1512.00567, section 7; the z-loss: Chowdhery et al. (PaLM),
arXiv:2204.02311, section 5; part of the vocabulary a device: Shoeybi et al. (Megatron-LM),
arXiv:1909.08053, section 3. The kernels give three statistics a row, lse, z_label and sum_v z_v;
the loss is this formula of them, differentiated by JAX, and the backward kernel turns the
statistics' cotangents into those of the logits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash import _attention as shared
from jax_flash._cross_entropy import linear_statistics, linear_sum, logits_statistics, unless
from jax_flash._ops import cross_entropy as ops
from jax_flash._ops._op import vary_together
from jax_flash._ops.cross_entropy import CrossEntropyConfig

Implementation = Literal["cuda", "cpu", "xla"] | None
Reduction = Literal["none", "mean", "sum"]
REDUCTIONS = ("none", "mean", "sum")

_OPTIONS = """
      label_smoothing: s in [0, 1): the target is (1 - s) on the label and s / V on every class.
      ignore_index: rows with this label count for nothing: loss, lse and gradients are 0, whatever
        they hold, NaN included. None: no row does.
      z_loss: factor, >= 0, of lse^2, which the loss of each row has added to it.
      logit_scale: factor on the logits.
      reduction: "mean" over the rows that are not ignored (0 where all are), "sum", or "none".
        Under shard_map, as everywhere in it, of the rows that the device has.
      return_lse: also return lse of the scaled logits, float32 [*B]; differentiable.
      axis_name: under shard_map, pmap or vmap: the vocabulary lies on this axis (or these), an
        equal part on each device in the order of their indices; labels count through all of it.
        Not needed under `jit`, which sees the sharding of the arrays.
      implementation: None picks: on CUDA its kernels, for float32, float16 and bfloat16, where they
        are the faster ones (not of a few classes); else "xla", compiled from jnp.
"""
_RETURNS = """
    Returns:
      The loss, float32 (float64 of float64): a scalar, or [*B] with reduction="none"; with
      `return_lse` the pair (loss, lse). A label that is neither `ignore_index` nor in [0, V) makes
      the loss of its row and all its gradients NaN: a mistake that shows. A row that is -inf all
      over has lse -inf and loss NaN; one with +inf has lse +inf; NaN gives NaN.

    Raises:
      TypeError: an array or option has the wrong type.
      ValueError: a shape or value is not possible; the text names the argument, the expectation,
        the fact.
      NotImplementedError: the `implementation` asked for does not exist.
"""


def _documented(function):
    function.__doc__ = function.__doc__.replace("{options}", _OPTIONS.strip()).replace(
        "{returns}", _RETURNS.strip()
    )
    return function


# Checks -------------------------------------------------------------------------------------------


def _static_number(name: str, value: Any, expected: str, fits: Callable[[float], bool]) -> float:
    if isinstance(value, (bool, jax.Array)) or not isinstance(value, (int, float, np.number)):
        shared.refuse(name, "a Python float (static)", type(value).__name__, TypeError)
    if not (math.isfinite(value) and fits(value)):
        shared.refuse(name, expected, value)
    return float(value)


def _check_labels(labels: Any, rows: Sequence[int], of: str) -> jax.Array:
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        shared.refuse("labels", "an integer array", labels.dtype, TypeError)
    if labels.shape != tuple(rows):
        shared.refuse("labels", f"{of}'s leading axes {tuple(rows)}", f"shape {labels.shape}")
    return labels


def _devices(axis_name: Any) -> int:
    """How many parts the vocabulary has."""
    if axis_name is None:
        return 1
    try:
        return jax.lax.psum(1, axis_name)
    except NameError:
        shared.refuse("axis_name", "an axis of shard_map, pmap or vmap", repr(axis_name))


# The loss -----------------------------------------------------------------------------------------


def _loss(
    statistics: Callable,
    tensors: Sequence[jax.Array],
    labels: jax.Array,
    vocabulary: int,
    *,
    label_smoothing: float,
    ignore_index: int | None,
    z_loss: float,
    logit_scale: float,
    reduction: Reduction,
    return_lse: bool,
    axis_name: Any,
    implementation: Implementation,
    **linear: int,
):
    """The loss by `statistics` of `tensors`, whose columns on this device are `vocabulary`."""
    shared.check_implementation(implementation, "cross-entropy", ("cuda",))
    smoothing = _static_number(
        "label_smoothing", label_smoothing, "a number in [0, 1)", lambda s: 0 <= s < 1
    )
    z_loss = _static_number("z_loss", z_loss, "a finite number >= 0", lambda z: z >= 0)
    scale = _static_number("logit_scale", logit_scale, "a finite number", lambda _: True)
    return_lse = shared.static_flag("return_lse", return_lse)
    if reduction not in REDUCTIONS:
        shared.refuse("reduction", f"one of {REDUCTIONS}", repr(reduction))
    classes = vocabulary * _devices(axis_name)
    ignored, valid = _rows(labels, ignore_index, classes)
    wide = jnp.promote_types(tensors[0].dtype, jnp.float32)
    counted = jnp.maximum((~ignored).sum(), 1).astype(wide) if reduction == "mean" else 1

    if labels.size == 0:
        lse, loss = jnp.zeros(labels.shape, wide), jnp.zeros(labels.shape, wide)
    else:
        config = CrossEntropyConfig(
            scale=scale,
            with_total=smoothing > 0,
            label_smoothing=smoothing,
            z_loss=z_loss,
            classes=classes,
            implementation=implementation,
            **linear,
        )
        own = jnp.where(valid, labels.astype(jnp.int32), -1)
        own = jnp.where(ignored, ops.IGNORED, own)
        # A label that is no class makes a mistake that shows.
        row_weights = jnp.where(valid, 1, jnp.where(ignored, 0, jnp.nan)).astype(wide)
        # What is ignored leaves before and after each formula that could make NaN of its cotangent.
        unless_ignored = functools.partial(unless, ignored)
        if linear and reduction != "none" and axis_name is None:
            # A float16's exponent has no room for 1 / counted: it comes with the loss's cotangent,
            # which who computes in float16 scales up.
            before, after = (1, counted) if tensors[0].dtype == jnp.float16 else (counted, 1)
            *tensors, own, row_weights = vary_together(*tensors, own, row_weights / before)
            loss, lse = linear_sum(config, return_lse, tuple(tensors), own, row_weights)
            loss = loss / after
            return (loss, unless_ignored(*lse)) if return_lse else loss
        if axis_name is not None:
            own = ops.own_labels(own, vocabulary, axis_name)
        *tensors, own = vary_together(*tensors, own)
        results = [unless_ignored(x) for x in statistics(config, tuple(tensors), own)]
        if axis_name is not None:
            results = [unless_ignored(x) for x in ops.combine(results, axis_name)]
        lse = results[0]
        loss = ops.row_loss(config, results) * jnp.where(ignored, 1, row_weights)

    if reduction != "none":
        loss = loss.sum() / counted
    return (loss, lse) if return_lse else loss


def _rows(labels: jax.Array, ignore_index: Any, classes: int) -> tuple[jax.Array, jax.Array]:
    """(ignored, valid): bool, as `labels`; at most one of them holds."""
    limits = jnp.iinfo(labels.dtype)
    ignored = jnp.zeros_like(labels, bool)
    if ignore_index is not None:
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, (int, np.integer)):
            got = type(ignore_index).__name__
            shared.refuse("ignore_index", "a Python int (static) or None", got, TypeError)
        if limits.min <= ignore_index <= limits.max:
            ignored = labels == ignore_index
    valid = (labels >= 0) & (labels <= min(classes - 1, limits.max))
    return ignored, valid & ~ignored


@_documented
def softmax_cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int | None = -100,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    reduction: Reduction = "mean",
    return_lse: bool = False,
    axis_name: Any = None,
    implementation: Implementation = None,
):
    """Cross-entropy of softmax(logits) with integer labels, its statistics in float32.

    Saves one float32 a row for the backward, and no probabilities. Rows shard freely, without a
    collective; where the vocabulary is sharded, devices exchange three numbers a row (four with
    label smoothing), and nothing in the backward. On CUDA the gradient is written over the logits,
    which XLA copies first only where they are needed again (or belong to the caller: donate them).

    Args:
      logits: [*B, V], any number of leading axes, any V >= 1; bfloat16, float16, float32, float64.
      labels: [*B], integers.
      {options}

    {returns}
    """
    logits = shared.as_tensor("logits", logits, 1)
    labels = _check_labels(labels, logits.shape[:-1], "logits")
    vocabulary = logits.shape[-1]
    if vocabulary == 0:
        shared.refuse("logits", "at least 1 class", f"shape {logits.shape}")
    rows = labels.shape
    if not rows:  # operands of the primitives have at least one row axis
        logits, labels = logits[None], labels[None]
    loss = _loss(
        logits_statistics,
        (logits,),
        labels,
        vocabulary,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        z_loss=z_loss,
        logit_scale=logit_scale,
        reduction=reduction,
        return_lse=return_lse,
        axis_name=axis_name,
        implementation=implementation,
    )
    return _without_row(loss) if not rows else loss


@_documented
def linear_softmax_cross_entropy(
    hidden: jax.Array,
    weight: jax.Array,
    labels: jax.Array,
    bias: jax.Array | None = None,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int | None = -100,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    reduction: Reduction = "mean",
    return_lse: bool = False,
    axis_name: Any = None,
    chunk_size: int | None = None,
    implementation: Implementation = None,
):
    """`softmax_cross_entropy(hidden @ weight + bias, labels)` that never holds all logits.

    Tokens pass in chunks: their logits, in float32, are made, used and forgotten. With a mean or a
    sum the forward, where it is differentiated, makes the gradients beside the loss, in as many
    products as with all logits in memory, and keeps them for the backward; a gradient through the
    lse costs more. With reduction="none", or `axis_name`, the backward makes logits once more.
    Under `jit`, tokens shard freely: their devices add up the gradients of weight and bias, the
    only traffic. Where weight and bias are sharded by the vocabulary, devices exchange three or
    four numbers a token, and add up the gradient of hidden; logits are made twice. A sharded D is
    gathered. `jax.export` needs the number of tokens: it may not be a symbol. Under
    `jax.checkpoint`, the name to save is "cross_entropy_gradients", else "cross_entropy_lse".

    Args:
      hidden: [*B, D], any number of leading axes; bfloat16, float16, float32, float64.
      weight: [D, V], hidden's dtype.
      labels: [*B], integers.
      bias: [V], hidden's dtype.
      {options}
      chunk_size: at most so many tokens a device has logits, or gradients of logits, of at once.
        Default: logits, in float32, take 2**28 bytes or what `weight` takes; their gradients, in
        hidden's dtype, 2**30 bytes or what the weight's gradient takes in float32.

    {returns}
    """
    hidden = shared.as_tensor("hidden", hidden, 1)
    weight = shared.as_tensor("weight", weight, 2)
    tensors = dict(hidden=hidden, weight=weight)
    if weight.ndim != 2 or weight.shape[0] != hidden.shape[-1]:
        shared.refuse("weight", f"shape ({hidden.shape[-1]}, V)", f"shape {weight.shape}")
    if 0 in weight.shape:
        shared.refuse("weight", "D and V of at least 1", f"shape {weight.shape}")
    if bias is None:
        bias = jnp.zeros((0,), hidden.dtype)
    else:
        tensors["bias"] = bias = shared.as_tensor("bias", bias, 1)
        if bias.shape != weight.shape[1:]:
            shared.refuse("bias", f"shape {weight.shape[1:]}", f"shape {bias.shape}")
    shared.check_same_dtype(**tensors)
    labels = _check_labels(labels, hidden.shape[:-1], "hidden")
    if chunk_size is not None:
        if isinstance(chunk_size, bool) or not isinstance(chunk_size, (int, np.integer)):
            got = type(chunk_size).__name__
            shared.refuse("chunk_size", "a Python int (static) or None", got, TypeError)
        if chunk_size < 1:
            shared.refuse("chunk_size", "at least 1 token", chunk_size)
    rows = labels.shape
    if not rows:
        hidden, labels = hidden[None], labels[None]
    loss = _loss(
        linear_statistics,
        (hidden, weight, bias),
        labels,
        weight.shape[-1],
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        z_loss=z_loss,
        logit_scale=logit_scale,
        reduction=reduction,
        return_lse=return_lse,
        axis_name=axis_name,
        implementation=implementation,
        row_axes=labels.ndim,
        chunk=int(chunk_size or 0),
    )
    return _without_row(loss) if not rows else loss


def _without_row(results):
    """What a call of one row has, without the axis it was given: scalars."""
    return jax.tree.map(lambda x: x.reshape(()), results)

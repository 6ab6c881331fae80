"""How cross-entropy is differentiated: its custom VJPs, of logits and of hidden states.

`logits_statistics` and `linear_statistics` are the primitives with their backwards; `linear_sum`,
a weighted sum of losses, makes its gradients in the forward. All of them any number of times.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from jax_flash._ops import cross_entropy as ops
from jax_flash._ops import cross_entropy_linear as linear_ops
from jax_flash._ops._partition import is_off


def unless(ignored: jax.Array, x: jax.Array) -> jax.Array:
    return x if is_off(x) else jnp.where(ignored, 0, x)


def _sharded_as(cotangent: jax.Array, primal: jax.Array) -> jax.Array:
    """With explicit axes: an operand that was gathered, or cut, has its gradient put back so."""
    spec = jax.typeof(primal).sharding.spec
    same = tuple(jax.typeof(cotangent).sharding.spec) == tuple(spec)
    return cotangent if same else jax.sharding.reshard(cotangent, spec)


def _differentiable(forward: ops.Op, backward: ops.Op, formula: Callable):
    """statistics(config, tensors, labels) -> lse, label_logit, total: `forward`, with `backward`.

    Differentiable in `tensors` any number of times; `formula` is the backward in jnp.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def statistics(config, tensors, labels):
        return forward(config, *tensors, labels)

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def gradients(config, tensors, labels, lse, cotangents):
        return backward(config, *tensors, labels, lse, *cotangents)

    def statistics_forward(config, tensors, labels):
        # Through `statistics` itself, so that the residual can be differentiated once more.
        lse, *others = statistics(config, tensors, labels)
        lse = checkpoint_name(lse, "cross_entropy_lse")
        return (lse, *others), (tensors, labels, lse)

    def statistics_backward(config, residuals, cotangents):
        of_tensors = gradients(config, *residuals, tuple(cotangents))
        return tuple(map(_sharded_as, of_tensors, residuals[0])), None

    def gradients_forward(config, *operands):
        return gradients(config, *operands), operands

    def gradients_backward(config, operands, cotangents):
        tensors, labels, *rows = operands
        _, pullback = jax.vjp(
            lambda tensors, lse, upstream: formula(config, *tensors, labels, lse, *upstream),
            tensors,
            *rows,
        )
        of_tensors, *of_rows = pullback(tuple(cotangents))
        return of_tensors, None, *of_rows

    statistics.defvjp(statistics_forward, statistics_backward)
    gradients.defvjp(gradients_forward, gradients_backward)
    return statistics


logits_statistics = _differentiable(
    ops.cross_entropy_forward, ops.cross_entropy_backward, ops.backward
)
linear_statistics = _differentiable(
    linear_ops.linear_cross_entropy_forward,
    linear_ops.linear_cross_entropy_backward,
    linear_ops.backward,
)


def _wide_sums(dhidden, *sums):
    return dhidden, *(x.astype(linear_ops.sum_type(x.dtype)) for x in sums)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear_gradients(config, tensors, labels, row_weights):
    """lse, label_logit, total and the gradients of sum(row_weights * loss): logits made once."""
    return linear_ops.linear_cross_entropy_gradients(config, *tensors, labels, row_weights)


def _linear_gradients_forward(config, *operands):
    return _linear_gradients(config, *operands), operands


def _linear_gradients_backward(config, operands, cotangents):
    """As of the same numbers made one after the other."""
    tensors, labels, row_weights = operands

    def one_after_the_other(tensors):
        statistics, pullback = jax.vjp(lambda x: linear_statistics(config, x, labels), tensors)
        (gradients,) = pullback(ops.row_cotangents(config, statistics[0], row_weights))
        return (*statistics, *_wide_sums(*gradients))

    _, pullback = jax.vjp(one_after_the_other, tensors)
    return *pullback(tuple(cotangents)), None, None


_linear_gradients.defvjp(_linear_gradients_forward, _linear_gradients_backward)


def _weighted_sum(config, statistics, row_weights):
    statistics = [unless(row_weights == 0, x) for x in statistics]
    return jnp.sum(jnp.where(row_weights == 0, 0, row_weights * ops.row_loss(config, statistics)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def linear_sum(config, with_lse, tensors, labels, row_weights):
    """sum(row_weights * loss) and [lse]: where gradients are asked for, the forward makes them."""
    statistics = linear_statistics(config, tensors, labels)
    return _weighted_sum(config, statistics, row_weights), statistics[:1] if with_lse else ()


def _linear_sum_forward(config, with_lse, tensors, labels, row_weights):
    tensors, labels, row_weights = (
        jax.tree.map(lambda x: x.value, x) for x in (tensors, labels, row_weights)
    )
    lse, label_logit, total, *gradients = _linear_gradients(config, tensors, labels, row_weights)
    gradients = [checkpoint_name(x, "cross_entropy_gradients") for x in gradients]
    loss = _weighted_sum(config, (lse, label_logit, total), row_weights)
    return (loss, (lse,) if with_lse else ()), (gradients, tensors, labels)


def _linear_sum_backward(config, with_lse, residuals, cotangents):
    gradients, tensors, labels = residuals
    dloss, of_lse = cotangents
    if isinstance(dloss, SymbolicZero):
        of_tensors = [jnp.zeros_like(x) for x in tensors]
    else:
        of_tensors = [
            (dloss * x).astype(tensor.dtype) for x, tensor in zip(gradients, tensors, strict=True)
        ]
    for dlse in of_lse:
        if not isinstance(dlse, SymbolicZero):  # who uses the lse pays for its gradient
            _, pullback = jax.vjp(lambda x: linear_statistics(config, x, labels)[0], tensors)
            of_tensors = [x + y for x, y in zip(of_tensors, *pullback(dlse), strict=True)]
    return tuple(map(_sharded_as, of_tensors, tensors)), None, None


linear_sum.defvjp(_linear_sum_forward, _linear_sum_backward, symbolic_zeros=True)

"""Dense layers as operators: linear + bias, linear + activation, linear + activation + linear.

Kernels are laid out as Flax's: [inputs, outputs]. The backward of each is one rule, which decides
what is saved, computed again, and added where: see `checkpoint_level` and `return_residual`.

Matrix products are XLA's, which reaches what the device can. On CUDA, in bfloat16 and float16,
GELU's tanh form is part of cuBLASLt's product, forward and in the backward of `mlp`, and no pass
over memory of its own; other activations, and float32, run on XLA everywhere.
"""

from __future__ import annotations

from typing import Any

import jax
from jax import lax

from jax_flash._attention import as_tensor, check_implementation, refuse, static_flag
from jax_flash._ops import dense as ops
from jax_flash._ops._op import vary_together

__all__ = ["column_parallel_dense", "dense", "dense_gelu", "mlp", "row_parallel_dense"]


def _check_weight(name: str, weight: Any, inputs: int, bias_name: str, bias: Any):
    weight = as_tensor(name, weight, 2)
    if weight.ndim != 2 or weight.shape[0] != inputs:
        refuse(name, f"shape [{inputs}, outputs]", f"shape {weight.shape}")
    if bias is not None:
        bias = as_tensor(bias_name, bias, 1)
        if bias.shape != weight.shape[1:]:
            refuse(bias_name, f"shape {weight.shape[1:]}", f"shape {bias.shape}")
    return weight, bias


def _check_activation(activation: Any) -> str:
    if activation not in ops.ACTIVATIONS:
        refuse("activation", f"one of {ops.ACTIVATIONS}", repr(activation))
    return activation


def _check_served(config: ops.DenseConfig, x, weight, bias) -> None:
    if config.implementation == "cuda" and (reason := ops.unfused(config, x, weight, bias)):
        raise NotImplementedError(f"jax_flash.dense: implementation='cuda': {reason}")


def _check_level(checkpoint_level: Any) -> int:
    if isinstance(checkpoint_level, bool) or checkpoint_level not in (0, 1, 2):
        refuse("checkpoint_level", "0, 1 or 2", repr(checkpoint_level))
    return int(checkpoint_level)


def dense(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    *,
    activation: str = "identity",
    checkpoint_level: int = 0,
    return_residual: bool = False,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """act(x W + b), a linear layer with its bias and activation.

    The fused dense operators of FlashAttention (csrc/fused_dense_lib: linear_bias_forward and
    _backward, linear_bias_residual_backward, linear_gelu_forward).

    Args:
      x: [*B, D], bfloat16, float16 or float32.
      weight: [D, F] (gated activations: [D, 2 F], gate first), of any floating type; the product is
        computed in x's, with float32 accumulation.
      bias: [F] ([2 F]), or None.
      activation: "identity", "gelu_tanh", "gelu" (erf), "relu", "squared_relu", or gated "swiglu"
        and "geglu", act(gate) * up (Shazeer, "GLU variants improve transformer", 2020).
      checkpoint_level: 0 or 1 saves the pre-activation, 2 computes it again in the backward. ReLU
        saves one bit an element at every level.
      return_residual: x comes back too. A residual branch that goes on from it has its gradient
        added to the layer's before that is rounded, in the same product.
      implementation: None, "xla", or "cuda": raises where GELU is not part of the product.

    Returns:
      [*B, F] in x's type, or (that, x).

    Raises:
      TypeError, ValueError: an argument has the wrong type, shape or value.
      NotImplementedError: the implementation asked for by name cannot serve the call.
    """
    check_implementation(implementation, "dense", ("cuda",))
    x = as_tensor("x", x, 1)
    weight, bias = _check_weight("weight", weight, x.shape[-1], "bias", bias)
    config = ops.DenseConfig(
        _check_activation(activation),
        _check_level(checkpoint_level),
        static_flag("return_residual", return_residual),
        implementation,
    )
    _check_gate(config.activation, "weight", weight)
    _check_served(config, x, weight, bias)
    return ops.activated(config, *_together(x, weight, bias))


def dense_gelu(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    *,
    approximate: bool = True,
    checkpoint_level: int = 0,
    implementation: str | None = None,
) -> jax.Array:
    """gelu(x W + b): `dense` with GELU (Hendrycks, Gimpel, 2016).

    Args:
      x, weight, bias, checkpoint_level, implementation: as in `dense`.
      approximate: the tanh form, or, if False, the exact one with erf.

    Returns:
      [*B, F] in x's type.
    """
    return dense(
        x,
        weight,
        bias,
        activation="gelu_tanh" if static_flag("approximate", approximate) else "gelu",
        checkpoint_level=checkpoint_level,
        implementation=implementation,
    )


def mlp(
    x: jax.Array,
    weight1: jax.Array,
    bias1: jax.Array | None,
    weight2: jax.Array,
    bias2: jax.Array | None = None,
    *,
    activation: str = "gelu_tanh",
    checkpoint_level: int = 0,
    return_residual: bool = False,
    axis_name: str | None = None,
    sequence_parallel: bool = False,
    sequence_axis: int = -2,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """act(x W1 + b1) W2 + b2, a transformer's feed-forward block as one rule.

    FlashAttention's fused_mlp_func (csrc/fused_dense_lib: linear_gelu_linear_backward and
    linear_residual_gelu_linear_backward), and its parallel form (Shoeybi et al., "Megatron-LM",
    2019; with `sequence_parallel` Korthikanti et al., "Reducing activation recomputation", 2022).

    Args:
      x: [*B, D], bfloat16, float16 or float32.
      weight1: [D, F] (gated activations: [D, 2 F], gate first).
      bias1: [F] ([2 F]), or None.
      weight2: [F, E].
      bias2: [E], or None.
      activation: as in `dense`.
      checkpoint_level: 0 saves the pre-activation and the activation, 1 the pre-activation (with
        ReLU, saved as bits, the activation too), 2 neither.
      return_residual: x comes back too, as in `dense`.
      axis_name: under shard_map: a mesh axis over which F is cut. weight1, bias1 and weight2 are
        this device's part (gated: of gate and of up), bias2 is whole and added once.
      sequence_parallel: with axis_name: x is this device's part along `sequence_axis`, gathered
        before the first product; the result is summed and cut likewise.
      sequence_axis: the axis of x and of the result that devices share.
      implementation: as in `dense`.

    Returns:
      [*B, E] in x's type, or (that, x).

    Raises:
      TypeError, ValueError: an argument has the wrong type, shape or value.
      NotImplementedError: the implementation asked for by name cannot serve the call.
    """
    check_implementation(implementation, "dense", ("cuda",))
    x = as_tensor("x", x, 1)
    weight1, bias1 = _check_weight("weight1", weight1, x.shape[-1], "bias1", bias1)
    gated = _check_activation(activation) in ops.GATED
    _check_gate(activation, "weight1", weight1)
    inputs2 = weight1.shape[1] // 2 if gated else weight1.shape[1]
    weight2, bias2 = _check_weight("weight2", weight2, inputs2, "bias2", bias2)
    residual = static_flag("return_residual", return_residual)
    level = _check_level(checkpoint_level)
    config = ops.DenseConfig(activation, level, residual, implementation)
    _check_served(config, x, weight1, bias1)
    if axis_name is None:
        if static_flag("sequence_parallel", sequence_parallel):
            refuse("sequence_parallel", "False without axis_name", True)
        return ops.mlp(config, *_together(x, weight1, bias1, weight2, bias2))
    if residual:  # the residual is this device's x, which the first product does not see
        refuse("return_residual", "False with axis_name", True)
    axis = _sequence_axis(x, sequence_axis)
    gathered = lax.all_gather(x, axis_name, axis=axis, tiled=True) if sequence_parallel else x
    out = ops.mlp(config, *_together(gathered, weight1, bias1, weight2, None))
    return _reduced(out, bias2, axis_name, sequence_parallel, axis)


def column_parallel_dense(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    *,
    axis_name: str,
    activation: str = "identity",
    checkpoint_level: int = 0,
    sequence_parallel: bool = False,
    sequence_axis: int = -2,
) -> jax.Array:
    """`dense` under shard_map, the outputs cut over a mesh axis (Megatron-LM's first layer).

    Args:
      x: [*B, D], the same on all devices; with sequence_parallel this device's part along
        `sequence_axis`, which is gathered.
      weight, bias: this device's columns, [D, F / devices] and [F / devices].
      axis_name: the mesh axis.
      activation, checkpoint_level: as in `dense`; gated: this device's part of gate and of up.

    Returns:
      This device's columns, [*B, F / devices].
    """
    x = as_tensor("x", x, 1)
    if static_flag("sequence_parallel", sequence_parallel):
        x = lax.all_gather(x, axis_name, axis=_sequence_axis(x, sequence_axis), tiled=True)
    return dense(x, weight, bias, activation=activation, checkpoint_level=checkpoint_level)


def row_parallel_dense(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    *,
    axis_name: str,
    sequence_parallel: bool = False,
    sequence_axis: int = -2,
) -> jax.Array:
    """`dense` under shard_map, the inputs cut over a mesh axis (Megatron-LM's second layer).

    Args:
      x: this device's columns, [*B, D / devices].
      weight: this device's rows, [D / devices, F].
      bias: [F], the same on all devices, added once.
      axis_name: the mesh axis.
      sequence_parallel: the sum over devices is cut along `sequence_axis`.

    Returns:
      [*B, F], the same on all devices, or this device's part of it.
    """
    x = as_tensor("x", x, 1)
    weight, bias = _check_weight("weight", weight, x.shape[-1], "bias", bias)
    out = ops.activated(ops.DenseConfig(), *_together(x, weight, None))
    parallel = static_flag("sequence_parallel", sequence_parallel)
    return _reduced(out, bias, axis_name, parallel, _sequence_axis(out, sequence_axis))


def _check_gate(activation: str, name: str, weight: jax.Array) -> None:
    if activation in ops.GATED and weight.shape[1] % 2 != 0:
        refuse(name, "an even number of columns, gate and up", f"shape {weight.shape}")


def _sequence_axis(x: jax.Array, axis: Any) -> int:
    if not isinstance(axis, int) or not -x.ndim <= axis < x.ndim or axis % x.ndim == x.ndim - 1:
        refuse("sequence_axis", f"an axis of {x.ndim}, not the last", axis)
    return axis % x.ndim


def _together(*arrays):
    """vary_together for operands of which some may be None."""
    given = iter(vary_together(*(a for a in arrays if a is not None)))
    return [None if a is None else next(given) for a in arrays]


def _reduced(out, bias, axis_name: str, sequence_parallel: bool, axis: int) -> jax.Array:
    """The sum of all devices' products, whole or cut, and the bias once."""
    if sequence_parallel:
        out = lax.psum_scatter(out, axis_name, scatter_dimension=axis, tiled=True)
    else:
        out = lax.psum(out, axis_name)
    return out if bias is None else (out + bias).astype(out.dtype)

"""LayerNorm and RMSNorm, alone and fused with dropout and the addition to a residual stream.

    s = residual + dropout(x * rowscale * layerscale)
    z = (s - mean(s)) / sqrt(var(s) + epsilon) * weight + bias       (layer norm)
    z = s / sqrt(mean(s^2) + epsilon) * weight + bias                (RMS norm)

Layer normalisation: Ba et al., arXiv:1607.06450; RMSNorm: Zhang and Sennrich, arXiv:1910.07467;
layerscale: Touvron et al., arXiv:2103.17239; drop path: Huang et al., arXiv:1603.09382. The forward
keeps s (in the stream's type) and the statistics of each row; the backward draws the dropout mask
again.
"""

from __future__ import annotations

from typing import Any

import jax

from jax_flash._norm import dropout_add_norm
from jax_flash.attention import Implementation

_ARGUMENTS = """
      x: [*R, D], any axes of rows; float32, bfloat16 or float16. With `x_subset`: [M, D].
      residual: [*R, D], the stream that x joins, in float32 or x's dtype; None: there is none yet.
      weight: [D], float32 or x's dtype.
      bias: [D], weight's dtype, or None.
      epsilon: added to the variance (mean square) inside the root.
      dropout_rate: probability, in [0, 1), that an element of x is dropped; the nearest multiple
        of 1/65536 is used, and what is kept is divided by its probability of being kept. A Python
        float.
      dropout_key: a JAX PRNG key. The mask depends on the key and the element's (row, column)
        alone, rows counted over all of *R: it is the same on every device and for every sharding
        under `jit`. Under `shard_map` each device counts its own rows: fold the device's index
        into the key.
      rowscale: a float or [*R], factor on each row of x, such as drop path's 0 or 1 / (1 - rate).
        It has no gradient.
      layerscale: [D], weight's dtype, factor on each column of x; it has a gradient.
      x_subset: int32 [*R]; x is compact: row r of the stream gets row x_subset[r] - 1 of x, or
        nothing where x_subset[r] is 0. Each row of x may be named once.
      out_subset: int32 [*R] with `out_rows`; z is compact, [out_rows, D]: row r of the stream
        becomes row out_subset[r] - 1 of z, or none where it is 0. Rows of z that nobody names
        are 0. In both subsets a traced number out of range counts as 0, and rows of a traced
        subset that are named twice are summed.
      out_rows: number of rows of a compact z, a Python int.
      x1: [*R, D], a second branch with a dropout mask of its own (parallel residual):
        s = residual + dropout(x) + dropout(x1). Not together with rowscale, layerscale or subsets.
      weight1, bias1: [D], a second norm of the same stream, whose result is z1.
      prenorm: also return the stream s, for the next block to add to.
      residual_in_fp32: without `residual`, the stream is float32 and not x's dtype. (With one, it
        has the residual's dtype.)
      return_mask: also return the dropout mask(s): bool [*R, D], True where x is kept, and False
        in rows that get nothing from a compact x.
      implementation: None, "cuda" or "xla"; None takes the CUDA kernels on an NVIDIA GPU, and
        XLA's form elsewhere.

    Returns:
      z in x's dtype, or the tuple of what applies of (z, z1, s, mask, mask of x1). The norm and its
      statistics are computed in float32, from s before it is rounded to the stream's dtype.

      A row that holds NaN or inf, or whose squares overflow float32, spoils that row of z alone
      (and every dweight, dbias that it takes part in).
"""
_RAISES = """
    Raises:
      TypeError: an array or option has the wrong type.
      ValueError: a shape or value is not possible; the text names the argument, the expectation,
        the fact.
      NotImplementedError: the `implementation` asked for cannot serve the call; the text says why.
"""


def _documented(function):
    function.__doc__ = function.__doc__.replace("{arguments}", _ARGUMENTS.strip()).replace(
        "{raises}", _RAISES.strip()
    )
    return function


@_documented
def layer_norm(
    x: Any,
    weight: Any,
    bias: Any = None,
    *,
    epsilon: float = 1e-5,
    implementation: Implementation = None,
) -> jax.Array:
    """Layer normalisation of the last axis.

    z = (x - mean(x)) / sqrt(var(x) + epsilon) * weight + bias, in float32, rounded to x's dtype.

    Args:
      x: [*R, D], any axes of rows; float32, bfloat16 or float16.
      weight: [D], float32 or x's dtype.
      bias: [D], weight's dtype, or None.
      epsilon: added to the variance.
      implementation: None, "cuda" or "xla"; None takes the CUDA kernels on an NVIDIA GPU, and
        XLA's form elsewhere.

    Returns:
      [*R, D] in x's dtype. A row that holds NaN or inf is NaN, and no other is. Rows shard freely
      over devices without traffic (the gradients of weight and bias are summed over them); a
      sharded feature axis is gathered.

    {raises}
    """
    options = dict(epsilon=epsilon, implementation=implementation)
    return dropout_add_norm(False, x, None, weight, bias, **options)


@_documented
def rms_norm(
    x: Any,
    weight: Any,
    bias: Any = None,
    *,
    epsilon: float = 1e-5,
    implementation: Implementation = None,
) -> jax.Array:
    """Root-mean-square normalisation of the last axis.

    z = x / sqrt(mean(x^2) + epsilon) * weight + bias, in float32, rounded to x's dtype.

    Args:
      x: [*R, D], any axes of rows; float32, bfloat16 or float16.
      weight: [D], float32 or x's dtype.
      bias: [D], weight's dtype, or None.
      epsilon: added to the mean square.
      implementation: None, "cuda" or "xla"; None takes the CUDA kernels on an NVIDIA GPU, and
        XLA's form elsewhere.

    Returns:
      [*R, D] in x's dtype. In a row that holds inf, its infinities are NaN and all else is 0 before
      the bias; a row that holds NaN is NaN. Rows shard freely over devices without traffic (the
      gradients of weight and bias are summed over them); a sharded feature axis is gathered.

    {raises}
    """
    options = dict(epsilon=epsilon, implementation=implementation)
    return dropout_add_norm(True, x, None, weight, bias, **options)


@_documented
def dropout_add_layer_norm(
    x: Any,
    residual: Any,
    weight: Any,
    bias: Any = None,
    *,
    epsilon: float = 1e-5,
    dropout_rate: float = 0.0,
    dropout_key: Any = None,
    rowscale: Any = None,
    layerscale: Any = None,
    x_subset: Any = None,
    out_subset: Any = None,
    out_rows: int | None = None,
    x1: Any = None,
    weight1: Any = None,
    bias1: Any = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_mask: bool = False,
    implementation: Implementation = None,
):
    """Dropout, addition to the residual stream and layer normalisation in one call.

    s = residual + dropout(x * rowscale * layerscale),  z = layer_norm(s) * weight + bias

    Rows shard freely over devices without traffic (the gradients of weight, bias and layerscale are
    summed over them, and so is what a subset gathers); a sharded feature axis is gathered.

    Args:
      {arguments}

    {raises}
    """
    return dropout_add_norm(
        False,
        x,
        residual,
        weight,
        bias,
        epsilon=epsilon,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        rowscale=rowscale,
        layerscale=layerscale,
        x_subset=x_subset,
        out_subset=out_subset,
        out_rows=out_rows,
        x1=x1,
        weight1=weight1,
        bias1=bias1,
        prenorm=prenorm,
        residual_in_fp32=residual_in_fp32,
        return_mask=return_mask,
        implementation=implementation,
    )


@_documented
def dropout_add_rms_norm(
    x: Any,
    residual: Any,
    weight: Any,
    bias: Any = None,
    *,
    epsilon: float = 1e-5,
    dropout_rate: float = 0.0,
    dropout_key: Any = None,
    rowscale: Any = None,
    layerscale: Any = None,
    x_subset: Any = None,
    out_subset: Any = None,
    out_rows: int | None = None,
    x1: Any = None,
    weight1: Any = None,
    bias1: Any = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_mask: bool = False,
    implementation: Implementation = None,
):
    """Dropout, addition to the residual stream and RMS normalisation in one call.

    s = residual + dropout(x * rowscale * layerscale),  z = rms_norm(s) * weight + bias

    Rows shard freely over devices without traffic (the gradients of weight, bias and layerscale are
    summed over them, and so is what a subset gathers); a sharded feature axis is gathered.

    Args:
      {arguments}

    {raises}
    """
    return dropout_add_norm(
        True,
        x,
        residual,
        weight,
        bias,
        epsilon=epsilon,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        rowscale=rowscale,
        layerscale=layerscale,
        x_subset=x_subset,
        out_subset=out_subset,
        out_rows=out_rows,
        x1=x1,
        weight1=weight1,
        bias1=bias1,
        prenorm=prenorm,
        residual_in_fp32=residual_in_fp32,
        return_mask=return_mask,
        implementation=implementation,
    )

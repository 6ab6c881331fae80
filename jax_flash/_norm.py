"""What the public norms share: checks, options -> operands, and the custom VJP."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jax_flash import _attention as shared
from jax_flash._attention import refuse
from jax_flash._ops import norm_xla
from jax_flash._ops._op import vary_together
from jax_flash._ops._partition import is_off
from jax_flash._ops.norm import NormConfig, norm_backward, norm_forward

_MAX_ROWS = 1 << 32  # a row's number is one word of its dropout counters


# The custom VJP ----------------------------------------------------------------------------------
#
# `tensors` and `options` as in _ops/norm.py. `_norm` gives every result; `_norm_z` none of those
# that only the next block of a prenorm transformer or the backward asks for. Mean and rsigma are
# functions of the stream: they never get a cotangent of their own.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm(config: NormConfig, tensors, options):
    return norm_forward(config, *tensors, *options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm_z(config: NormConfig, tensors, options):
    config = dataclasses.replace(config, write_stream=False)
    z, z1, _, _, _, mask, mask1 = norm_forward(config, *tensors, *options)
    return z, z1, mask, mask1


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gradients(config: NormConfig, saved, cotangents, options):
    return norm_backward(config, *saved, *cotangents, *options)


def _norm_forward(config, tensors, options):
    # Through `_norm` itself, so that the residuals can be differentiated once more.
    x, _, _, weight, _, weight1, _, layerscale = tensors
    z, z1, stream, mean, rsigma, mask, mask1 = _norm(config, tensors, options)
    z, z1 = checkpoint_name(z, "norm_out"), checkpoint_name(z1, "norm_out")
    stream = checkpoint_name(stream, "norm_stream")
    mean, rsigma = checkpoint_name(mean, "norm_mean"), checkpoint_name(rsigma, "norm_rsigma")
    again = _nothing() if is_off(layerscale) else x
    kept = stream if config.write_stream else x
    saved = (again, kept, mean, rsigma, weight, weight1, layerscale)
    return (z, z1, stream, mean, rsigma, mask, mask1), (saved, tensors[1:], options)


def _norm_backward(config, residuals, cotangents):
    saved, (x1, residual, weight, bias, weight1, bias1, layerscale), options = residuals
    dz, dz1, dstream, *_ = cotangents
    gradients = _gradients(config, saved, (dz, dz1, dstream), options)
    dx, dx1, dresidual, *vectors = gradients
    if config.has_x1 and is_off(dx1):
        dx1 = dx
    if config.has_residual and is_off(dresidual):
        dresidual = dx
    vectors = (
        d.astype(v.dtype)
        for d, v in zip(vectors, (weight, bias, weight1, bias1, layerscale), strict=True)
    )
    return (dx, dx1, dresidual, *vectors), None


def _norm_z_forward(config, tensors, options):
    (z, z1, *_, mask, mask1), residuals = _norm_forward(config, tensors, options)
    return (z, z1, mask, mask1), residuals


def _norm_z_backward(config, residuals, cotangents):
    dz, dz1, *_ = cotangents
    return _norm_backward(config, residuals, (dz, dz1, _nothing()))


def _gradients_forward(config, *operands):
    return _gradients(config, *operands), operands


def _gradients_backward(config, operands, cotangents):
    # The second derivative: of the backward's own formula, with the statistics as functions of the
    # stream that they are.
    saved, upstream, options = operands

    def formula(saved, upstream):
        x, stream, _, rsigma, *vectors = saved
        mean, rsigma = norm_xla.statistics(config, stream.astype(rsigma.dtype))
        results = norm_xla.backward(config, x, stream, mean, rsigma, *vectors, *upstream, *options)
        return tuple(
            jnp.zeros(c.shape, c.dtype) if is_off(c) else d.astype(c.dtype)
            for d, c in zip(results, cotangents, strict=True)
        )

    _, pullback = jax.vjp(formula, saved, upstream)
    return (*pullback(tuple(cotangents)), None)


_norm.defvjp(_norm_forward, _norm_backward)
_norm_z.defvjp(_norm_z_forward, _norm_z_backward)
_gradients.defvjp(_gradients_forward, _gradients_backward)


# Checks ------------------------------------------------------------------------------------------


def _nothing(dtype=jnp.float32) -> jax.Array:
    return jnp.zeros((0,), dtype)


def _vector(name: str, vector: Any, width: int, dtypes: dict[str, Any]) -> jax.Array:
    """[D] in one of the dtypes, or off."""
    if vector is None:
        return _nothing()
    vector = shared.as_tensor(name, vector, 1)
    if vector.shape != (width,):
        refuse(name, f"shape {(width,)}", f"shape {vector.shape}")
    _check_dtype(name, vector, dtypes)
    return vector


def _check_dtype(name: str, x: jax.Array, dtypes: dict[str, Any]) -> None:
    if x.dtype not in dtypes.values():
        names = {jnp.dtype(dtype).name: whose for whose, dtype in reversed(dtypes.items())}
        expected = " or ".join(f"{whose}{dtype}" for dtype, whose in reversed(names.items()))
        refuse(name, expected, x.dtype, TypeError)


def _rows_by_number(name: str, subset: Any, rows, count: int) -> jax.Array:
    """int32 [*R] with numbers from 1 to count, 0 for none."""
    known = shared.concrete(subset)
    subset = jnp.asarray(subset)
    if not jnp.issubdtype(subset.dtype, jnp.integer):
        refuse(name, "an int32 array", subset.dtype, TypeError)
    if rows is not None and subset.shape != rows:
        refuse(name, f"shape {rows}", f"shape {subset.shape}")
    if known is not None and known.size:
        if known.min() < 0 or known.max() > count:
            refuse(name, f"rows in [1, {count}], or 0 for none", f"{known.min()}..{known.max()}")
        named, times = np.unique(known[known > 0], return_counts=True)
        if (times > 1).any():
            refuse(name, "each row at most once", f"row {named[times > 1][0]} several times")
    if subset.dtype != jnp.int32:
        limit = jnp.iinfo(subset.dtype).max
        beyond = (subset < 0) | (subset > min(count, limit))
        subset = jnp.where(beyond, 0, subset).astype(jnp.int32)
    return subset


def _static_float(name: str, value: Any) -> float:
    if isinstance(value, jax.core.Tracer) or not isinstance(value, (int, float, np.number)):
        refuse(name, "a Python float (static)", type(value).__name__, TypeError)
    if not (0.0 <= float(value) < math.inf):
        refuse(name, "a number >= 0", float(value))
    return float(value)


def _static_count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        refuse(name, "a Python int (static)", type(value).__name__, TypeError)
    if value < 0:
        refuse(name, "a number >= 0", value)
    return int(value)


def _number_of_rows(rows) -> Any:
    return math.prod(n for n in rows if isinstance(n, int))  # not a symbol of jax.export


def _check_together(x1, weight1, bias1, out_subset, out_rows, **single) -> None:
    if x1 is not None:
        for name, option in {**single, "out_subset": out_subset}.items():
            if option is not None:
                refuse(name, "None together with x1", "an array or a number")
    if bias1 is not None and weight1 is None:
        refuse("bias1", "weight1 with it", None)
    if (out_subset is None) != (out_rows is None):
        refuse("out_rows", "out_rows and out_subset together", out_rows)


# The call ----------------------------------------------------------------------------------------


def dropout_add_norm(
    is_rms: bool,
    x: Any,
    residual: Any,
    weight: Any,
    bias: Any,
    *,
    epsilon: float,
    implementation: str | None,
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
):
    """All norms, alone and fused; the arguments are those of dropout_add_layer_norm."""
    shared.check_implementation(implementation, "norm", ("cuda",))
    epsilon = _static_float("epsilon", epsilon)
    prenorm = shared.static_flag("prenorm", prenorm)
    residual_in_fp32 = shared.static_flag("residual_in_fp32", residual_in_fp32)
    return_mask = shared.static_flag("return_mask", return_mask)
    _check_together(
        x1, weight1, bias1, out_subset, out_rows,
        rowscale=rowscale, layerscale=layerscale, x_subset=x_subset,
    )  # fmt: skip

    # Arrays of rows
    x = shared.as_tensor("x", x, 1)
    width = x.shape[-1]
    if width == 0:
        refuse("x", "at least one feature", f"shape {x.shape}")
    rows, x_rows, x_index = x.shape[:-1], 0, _nothing(jnp.int32)
    if x_subset is not None:
        if x.ndim != 2:
            refuse("x", "shape [M, D] with x_subset", f"shape {x.shape}")
        x_rows = x.shape[0]
        x_index = _rows_by_number("x_subset", x_subset, None, x_rows)
        rows = x_index.shape
    if _number_of_rows(rows) >= _MAX_ROWS:
        refuse("x", f"less than {_MAX_ROWS} rows", f"shape {x.shape}")
    full = (*rows, width)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    own_or_wide = {"x's dtype ": x.dtype, "": wide}
    second, stream = _nothing(), _nothing()
    if x1 is not None:
        second = shared.as_tensor("x1", x1, 1)
        if second.shape != full:
            refuse("x1", f"x's shape {full}", f"shape {second.shape}")
        _check_dtype("x1", second, {"x's dtype ": x.dtype})
    if residual is not None:
        stream = shared.as_tensor("residual", residual, 1)
        if stream.shape != full:
            refuse("residual", f"shape {full}", f"shape {stream.shape}")
        _check_dtype("residual", stream, own_or_wide)
    out_index, count = _nothing(jnp.int32), 0
    if out_subset is not None:
        count = _static_count("out_rows", out_rows)
        out_index = _rows_by_number("out_subset", out_subset, rows, count)

    # Vectors
    if weight is None:
        refuse("weight", f"an array of shape {(width,)}", None, TypeError)
    weight = _vector("weight", weight, width, own_or_wide)
    like_weight = {"weight's dtype ": weight.dtype}
    bias = _vector("bias", bias, width, like_weight)
    weight1 = _vector("weight1", weight1, width, like_weight)
    bias1 = _vector("bias1", bias1, width, like_weight)
    layerscale = _vector("layerscale", layerscale, width, like_weight)

    # Options
    if rowscale is None:
        scale = _nothing()
    else:
        scale = jax.lax.stop_gradient(shared.as_tensor("rowscale", rowscale, 0).astype(wide))
        if scale.shape not in ((), rows):
            refuse("rowscale", f"a scalar or shape {rows}", f"shape {scale.shape}")
        scale = jnp.broadcast_to(scale, rows)
    threshold, state, _ = shared.dropout_operands(dropout_rate, dropout_key, (), 0)
    row_ids = _nothing(jnp.uint32)
    if threshold:
        row_ids = jnp.arange(math.prod(rows), dtype=jnp.uint32).reshape(rows)

    stream_dtype = wide if residual_in_fp32 else x.dtype
    config = NormConfig(
        epsilon=epsilon,
        is_rms=is_rms,
        row_axes=len(rows),
        stream_dtype=jnp.dtype(stream_dtype if is_off(stream) else stream.dtype).name,
        return_mask=return_mask,
        has_residual=residual is not None,
        has_x1=x1 is not None,
        has_bias=not is_off(bias),
        has_bias1=not is_off(bias1),
        x_rows=x_rows,
        out_rows=count,
        dropout_threshold=threshold,
        sums_are_last=jax.device_count() == 1,
        implementation=implementation,
    )
    tied = is_off(weight1)
    if any(n == 0 for n in rows):  # no rows
        z = jnp.zeros(full if out_subset is None else (count, width), x.dtype)
        s = jnp.zeros(full, config.stream_dtype)
        mask = jnp.zeros(full, jnp.bool_)
        z1, mask1 = z, mask
    else:
        tensors = (x, second, stream, weight, bias, weight1, bias1, layerscale)
        options = (scale, x_index, out_index, state, row_ids)
        operands = vary_together(*tensors, *options)
        tensors, options = operands[: len(tensors)], operands[len(tensors) :]
        is_x = (
            config.adds_unchanged(layerscale, scale, x_index)
            and x1 is None
            and residual is None
            and config.stream_dtype == x.dtype.name
        )
        config = dataclasses.replace(config, write_stream=not is_x)
        if prenorm and not is_x:
            z, z1, s, _, _, mask, mask1 = _norm(config, tensors, options)
        else:
            s = x
            z, z1, mask, mask1 = _norm_z(config, tensors, options)

    returned = (
        (True, z),
        (not tied, z1),
        (prenorm, s),
        (return_mask, mask),
        (return_mask and x1 is not None, mask1),
    )
    results = tuple(result for wanted, result in returned if wanted)
    return results if len(results) > 1 else z

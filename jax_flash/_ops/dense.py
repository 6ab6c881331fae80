"""The dense operators' arithmetic and their joined backward, put together from matrix products.

    affine       y = x W + b
    activated    y = act(x W + b)
    mlp          y = act(x W1 + b1) W2 + b2

GELU in its tanh form is part of a product where that is faster: _ops/dense_gelu.py.

What distinguishes them from plain jnp is what the backward keeps and how it adds:
`checkpoint_level` says what is saved and what computed again, ReLU's derivative is kept as bits,
and the gradient of a residual is added to the product's before it is rounded. Products are those of
x's type with float32 accumulation; bias and activation are float32. The activation is taken of the
pre-activation as it is stored, so that a result does not depend on what is computed again (but
inside of a product: there of what is not yet rounded).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jax_flash._ops import dense_gelu as gelu
from jax_flash._ops._op import vary_together

_GELU_SLOPE = math.sqrt(8 / math.pi)


@jax.custom_jvp
def _gelu_tanh(x):
    """GELU's tanh form, by 1 + tanh(u) = 2 sigmoid(2 u), which takes XLA fewer instructions.

    And a tanh that both halves of a gated gradient want it computes in a pass of its own, in
    float32: 4.3 GB more to read and write at 16384 x 16384.
    """
    return x * _gate(x)


def _gate(x):
    return jax.nn.sigmoid(_GELU_SLOPE * (x + 0.044715 * x * x * x))


@_gelu_tanh.defjvp
def _gelu_tanh_jvp(primals, tangents):
    # By hand: 0.49 ms for 0.54 of JAX's own at 16384 x 16384 (H200).
    (x,), (dx,) = primals, tangents
    gate = _gate(x)
    slope = _GELU_SLOPE * (1 + 3 * 0.044715 * x * x)
    return x * gate, dx * (gate + x * gate * (1 - gate) * slope)


GATED = {"swiglu": jax.nn.silu, "geglu": _gelu_tanh}
_ELEMENTWISE: dict[str, Callable[[jax.Array], jax.Array]] = {
    "identity": lambda x: x,
    "gelu_tanh": _gelu_tanh,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "squared_relu": lambda x: jnp.square(jax.nn.relu(x)),
}
ACTIVATIONS = (*_ELEMENTWISE, *GATED)


@dataclasses.dataclass(frozen=True)
class DenseConfig:
    """What is static in a call.

    Attributes:
      activation: one of ACTIVATIONS.
      checkpoint_level: 0 saves the pre-activation and the activation, 1 the pre-activation, 2
        neither. With ReLU, whose pre-activation is kept as bits, 1 is as 0.
      return_residual: x comes back as a second result, whose cotangent is added in the backward.
      implementation: of products with GELU: None, "cuda" or "xla".
    """

    activation: str = "identity"
    checkpoint_level: int = 0
    return_residual: bool = False
    implementation: str | None = None


def activate(activation: str, pre: jax.Array) -> jax.Array:
    """act(pre), in float32; a gated one halves the last axis: act(gate) * up."""
    pre = pre.astype(jnp.float32)
    if activation in GATED:
        gate, up = jnp.split(pre, 2, axis=-1)
        return GATED[activation](gate) * up
    return _ELEMENTWISE[activation](pre)


def affine(x, weight, bias) -> jax.Array:
    """x W + b in x's type. A bias of that type goes into the product's epilogue on a GPU."""
    y = jnp.matmul(_one_axis_of_rows(x), weight.astype(x.dtype))
    if bias is not None and bias.dtype == y.dtype:
        y = y + bias
    elif bias is not None:
        y = (y.astype(jnp.float32) + bias.astype(jnp.float32)).astype(y.dtype)
    return y.reshape(*x.shape[:-1], weight.shape[-1])


def _one_axis_of_rows(x) -> jax.Array:
    """[*R, D] -> [rows, D], where one device has all rows.

    XLA fuses a bias with its product only where no reshape stands between the two; but two axes of
    rows that are one cannot each be cut over devices.
    """
    whole = jax.device_count() == 1 and x.ndim > 2 and 0 not in x.shape
    return _rows(x) if whole else x


def unfused(config: DenseConfig, x, weight, bias) -> str | None:
    """Why act(x W + b) is a product and a loop, and no product with its activation; or None."""
    if config.implementation == "xla":
        return "implementation='xla'"
    if config.activation != "gelu_tanh":
        return f"activation {config.activation!r} (kernels: 'gelu_tanh')"
    return gelu.unserved(x, weight, bias)


def _gelu_config(config, x, keeps_pre: bool = True) -> gelu.GeluConfig:
    return gelu.GeluConfig(x.ndim - 1, keeps_pre, config.implementation)


def _hidden(config, x, weight, bias, keeps_pre: bool):
    """act(x W + b) in x's type; and x W + b, which may be anything where it is not to be kept."""
    if unfused(config, x, weight, bias) is None:
        off = jnp.zeros((0,), x.dtype) if bias is None else bias
        operands = vary_together(x, weight.astype(x.dtype), off)
        return gelu.product_gelu(_gelu_config(config, x, keeps_pre), *operands)
    pre = affine(x, weight, bias)
    return activate(config.activation, pre).astype(x.dtype), pre


def _rows(x) -> jax.Array:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _weight_gradient(x, dy, weight) -> jax.Array:
    """x^T dY over all rows, accumulated in float32, rounded once to the weight's type."""
    wide = jnp.promote_types(x.dtype, weight.dtype)
    return jnp.matmul(_rows(x).T, _rows(dy), preferred_element_type=wide).astype(weight.dtype)


def _bias_gradient(dy, bias) -> jax.Array | None:
    if bias is None:
        return None
    return jnp.sum(_rows(dy), axis=0, dtype=jnp.float32).astype(bias.dtype)


def _sums_as_it_goes(config, bias, dtype) -> bool:
    """Whether XLA sums the bias gradient in the pass that makes d(pre).

    It does for a sum of bfloat16, which it adds up in float32, 128 rows at a time on a GPU; given a
    sum of float32 it writes d(pre) as such, too. Halves of a gated one are joined in between, and
    the sums of several devices would be added up in bfloat16.
    """
    if bias is None or config.activation in GATED or jax.device_count() > 1:
        return False
    return dtype == jnp.bfloat16 and bias.dtype == dtype


def _input_gradient(dy, weight, dresidual) -> jax.Array:
    """dY W^T, plus the residual's gradient, rounded once."""
    weight = weight.astype(dy.dtype).T
    if dresidual is None:
        return jnp.matmul(dy, weight)
    product = jnp.matmul(dy, weight, preferred_element_type=jnp.float32)
    return (product + dresidual.astype(jnp.float32)).astype(dy.dtype)


def _pack(pre) -> jax.Array:
    """One bit for each element: is it positive? [..., F] -> uint8 [..., ceil(F / 8)]."""
    if pre.size == 0:  # which packbits cannot reshape
        return jnp.zeros((*pre.shape[:-1], -(-pre.shape[-1] // 8)), jnp.uint8)
    return jnp.packbits(pre > 0, axis=-1, bitorder="little")


def _activation_gradients(config, saved, dh, width: int, dtype, bias):
    """(d(pre), d(bias)) of dh [..., F], rounded to `dtype`; `saved` is pre, or ReLU's bits."""
    dh = dh.astype(jnp.float32)
    if config.activation == "relu" and saved.size == 0:
        dpre = dh
    elif config.activation == "relu":
        is_positive = jnp.unpackbits(saved, axis=-1, count=width, bitorder="little")
        dpre = jnp.where(is_positive != 0, dh, 0.0)
    else:
        formula = functools.partial(activate, config.activation)
        dpre = jax.vjp(formula, saved.astype(jnp.float32))[1](dh)[0]
    dpre = dpre.astype(dtype)
    if _sums_as_it_goes(config, bias, dtype):
        return dpre, jax.lax.reduce_sum(_rows(dpre), (0,))
    # Three read it. Without a wall XLA writes the float32 form too, for the bias gradient's sum:
    # 3.8 GB instead of 2.1 at 16384 x 16384.
    dpre = jax.lax.optimization_barrier(dpre)
    return dpre, _bias_gradient(dpre, bias)


# One product, with or without an activation -----------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def activated(config: DenseConfig, x, weight, bias):
    """act(x W + b) [*B, F], and x if config.return_residual; bias [F] or None."""
    out, _ = _hidden(config, x, weight, bias, keeps_pre=False)
    return (out, x) if config.return_residual else out


def _activated_forward(config, x, weight, bias):
    out, pre = _hidden(config, x, weight, bias, keeps_pre=config.checkpoint_level < 2)
    saved = None
    if config.activation == "relu":
        saved = checkpoint_name(_pack(pre), "dense_relu_bits")
    elif config.activation != "identity" and config.checkpoint_level < 2:
        saved = checkpoint_name(pre, "dense_pre_activation")
    result = (out, x) if config.return_residual else out
    return result, (x, weight, bias, saved)


def _activated_backward(config, residuals, cotangents):
    x, weight, bias, saved = residuals
    dout, dresidual = cotangents if config.return_residual else (cotangents, None)
    if config.activation == "identity":
        dpre, dbias = dout, _bias_gradient(dout, bias)
    else:
        if saved is None:
            saved = affine(x, weight, bias)
        features = weight.shape[-1]
        dpre, dbias = _activation_gradients(config, saved, dout, features, x.dtype, bias)
    return (
        _input_gradient(dpre, weight, dresidual),
        _weight_gradient(x, dpre, weight),
        dbias,
    )


activated.defvjp(_activated_forward, _activated_backward)


# Two products with an activation between ---------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def mlp(config: DenseConfig, x, weight1, bias1, weight2, bias2):
    """act(x W1 + b1) W2 + b2 [*B, D2], and x if config.return_residual."""
    hidden, _ = _hidden(config, x, weight1, bias1, keeps_pre=False)
    out = affine(hidden, weight2, bias2)
    return (out, x) if config.return_residual else out


def _mlp_forward(config, x, weight1, bias1, weight2, bias2):
    hidden, pre = _hidden(config, x, weight1, bias1, keeps_pre=config.checkpoint_level < 2)
    out = affine(hidden, weight2, bias2)
    saved = kept = None
    if config.checkpoint_level < 2:
        if config.activation == "relu":
            saved = checkpoint_name(_pack(pre), "mlp_relu_bits")
        else:
            saved = checkpoint_name(pre, "mlp_pre_activation")
        if config.checkpoint_level == 0 or config.activation == "relu":
            kept = checkpoint_name(hidden, "mlp_hidden")
    result = (out, x) if config.return_residual else out
    return result, (x, weight1, bias1, weight2, bias2, saved, kept)


def _mlp_backward(config, residuals, cotangents):
    x, weight1, bias1, weight2, bias2, saved, hidden = residuals
    dout, dresidual = cotangents if config.return_residual else (cotangents, None)
    if saved is None:
        hidden, pre = _hidden(config, x, weight1, bias1, keeps_pre=True)
        saved = _pack(pre) if config.activation == "relu" else pre
    elif hidden is None:
        hidden = activate(config.activation, saved).astype(x.dtype)
    weight = weight2.astype(dout.dtype)
    if unfused(config, x, weight1, bias1) is None and gelu.unserved(dout, weight, None) is None:
        operands = vary_together(dout, weight, saved)
        (dpre,) = gelu.product_gelu_gradient(_gelu_config(config, dout), *operands)
        dbias1 = _bias_gradient(dpre, bias1)
    else:
        dhidden = jnp.matmul(dout, weight.T)
        features = weight1.shape[-1]
        dpre, dbias1 = _activation_gradients(config, saved, dhidden, features, x.dtype, bias1)
    return (
        _input_gradient(dpre, weight1, dresidual),
        _weight_gradient(x, dpre, weight1),
        dbias1,
        _weight_gradient(hidden, dout, weight2),
        _bias_gradient(dout, bias2),
    )


mlp.defvjp(_mlp_forward, _mlp_backward)

"""Products with GELU (tanh) in their epilogue: two primitives, by cuBLASLt on CUDA, else in jnp.

    forward     pre = x W + b,  out = gelu(pre)
    backward    dpre = (dout W2^T) * gelu'(pre),  what comes before the first product of an MLP

Only the epilogues that measured faster than XLA's product and its loop are here (docs/kernels/
dense.md); _ops/dense.py puts them together with plain products. Operands: x, dout [*R, D], weight
[D, F] (backward [F, D]), pre [*R, F]; R has `row_axes` axes.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from jax_flash._ops import _register
from jax_flash._ops._op import Implementation, Op, ffi_call
from jax_flash._ops._partition import BATCH, Signature, is_off

WORKSPACE_BYTES = 32 << 20  # what NVIDIA recommends for Hopper, and XLA takes
_ALIGNMENT = 8  # elements: rows begin at multiples of 16 bytes
_gelu = functools.partial(jax.nn.gelu, approximate=True)


@dataclasses.dataclass(frozen=True)
class GeluConfig:
    """What is static in a call.

    Attributes:
      row_axes: number of axes of rows.
      keeps_pre: forward: pre is a result, for the backward.
      implementation: None, "cuda" or "xla".
    """

    row_axes: int
    keeps_pre: bool = True
    implementation: str | None = None


def unserved(x, weight, bias) -> str | None:
    """Why cuBLASLt is not asked for these operands, by their types and shapes; or None."""
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"{x.dtype} (kernels: bfloat16, float16)"
    if bias is not None and bias.dtype != x.dtype:
        return f"a bias of {bias.dtype} with {x.dtype}"
    if x.ndim < 2:
        return "one row without an axis"
    if 0 in x.shape or any(n % _ALIGNMENT or n == 0 for n in weight.shape):
        return f"a weight of shape {weight.shape} (kernels: multiples of {_ALIGNMENT})"
    return None


# Formulas -----------------------------------------------------------------------------------------


def _product(x, weight):
    """x [*b, *R, D] with weight [*b, D, F], also where b of one of them is 1."""
    middle = x.ndim - weight.ndim
    lead = weight.shape[:-2]
    return jnp.matmul(x, weight.reshape(*lead, *(1,) * middle, *weight.shape[-2:]))


def forward(config, x, weight, bias):
    """out, pre in jnp."""
    pre = _product(x, weight)
    if not is_off(bias):
        axes = (1,) * config.row_axes
        pre = pre + bias.reshape(*bias.shape[:-1], *axes, bias.shape[-1])
    out = _gelu(pre.astype(jnp.float32)).astype(x.dtype)
    return out, pre if config.keeps_pre else jnp.zeros((0,), x.dtype)


def backward(config, dout, weight, pre):
    """dpre in jnp."""
    dhidden = _product(dout, jnp.swapaxes(weight, -1, -2)).astype(jnp.float32)
    dhidden, pre = jnp.broadcast_arrays(dhidden, pre.astype(jnp.float32))
    _, pullback = jax.vjp(_gelu, pre)
    return (pullback(dhidden)[0].astype(dout.dtype),)


# The primitives -----------------------------------------------------------------------------------


def _rows(config) -> tuple[str, ...]:
    return (BATCH, *(f"R{i}" for i in range(config.row_axes)))


def _shardable(config, x, features: int) -> dict[str, int]:
    sizes = x.shape[-1 - config.row_axes : -1]
    return {"F": features, **dict(zip(_rows(config)[1:], sizes, strict=True))}


def _forward_signature(config, x, weight, bias) -> Signature:
    rows = _rows(config)
    return Signature(
        operands=((*rows, "D"), (BATCH, "D", "F"), () if is_off(bias) else (BATCH, "F")),
        results=((*rows, "F"), (*rows, "F") if config.keeps_pre else ()),
        shardable=_shardable(config, x, weight.shape[-1]),
        aliases={},
    )


def _backward_signature(config, dout, weight, pre) -> Signature:
    rows = _rows(config)
    return Signature(
        operands=((*rows, "D"), (BATCH, "F", "D"), (*rows, "F")),
        results=((*rows, "F"),),
        shardable=_shardable(config, dout, weight.shape[-2]),
        aliases={},
    )


def _result(config, x, features: int, *others) -> jax.ShapeDtypeStruct:
    """[*b, *R, features], for operands that lead with b or with ones."""
    own = (x.shape[: x.ndim - 1 - config.row_axes], *others)
    rows = x.shape[-1 - config.row_axes : -1]
    return jax.ShapeDtypeStruct((*jnp.broadcast_shapes(*own), *rows, features), x.dtype)


def _forward_results(config, x, weight, bias):
    lead = () if is_off(bias) else bias.shape[:-1]
    out = _result(config, x, weight.shape[-1], weight.shape[:-2], lead)
    return out, out if config.keeps_pre else jax.ShapeDtypeStruct((0,), x.dtype)


def _backward_results(config, dout, weight, pre):
    lead = pre.shape[: pre.ndim - 1 - config.row_axes]
    return (_result(config, dout, weight.shape[-2], weight.shape[:-2], lead),)


# CUDA ---------------------------------------------------------------------------------------------


def _refuse(config, x, weight, *others) -> str | None:
    if (reason := _register.missing("cuda")) is not None:
        return reason
    if math.prod(weight.shape[:-2]) != 1:
        return "vmap over a weight"
    return unserved(x, weight.reshape(weight.shape[-2:]), None)


def _refuse_forward(config, x, weight, bias) -> str | None:
    if bias.size > weight.shape[-1]:
        return "vmap over a bias"
    return _refuse(config, x, weight)


def _refuse_backward(config, dout, weight, pre) -> str | None:
    if dout.shape[:-1] != pre.shape[:-1]:
        return "vmap over one of two arrays of rows"
    return _refuse(config, dout, weight)


def _flat(x):
    """[rows, features]; what is off stays so."""
    return x if is_off(x) else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _call(target: str, results, x, weight, other):
    """The custom call on rows in one axis; its workspace is one more result."""
    flat = [
        jax.ShapeDtypeStruct(
            r.shape if is_off(r) else (math.prod(r.shape[:-1]), r.shape[-1]), r.dtype
        )
        for r in results
    ]
    flat.append(jax.ShapeDtypeStruct((WORKSPACE_BYTES,), jnp.uint8))
    returned = ffi_call(target, flat, _flat(x), _flat(weight), other)
    return tuple(a.reshape(r.shape) for a, r in zip(returned, results, strict=False))


def _run_forward(config, x, weight, bias):
    results = _forward_results(config, x, weight, bias)
    return _call("jax_flash.dense_gelu_forward", results, x, weight, bias.reshape(-1))


def _run_backward(config, dout, weight, pre):
    results = _backward_results(config, dout, weight, pre)
    return _call("jax_flash.dense_gelu_backward", results, dout, weight, _flat(pre))


dense_gelu_forward = Op(
    "dense_gelu_forward",
    signature=_forward_signature,
    results=_forward_results,
    native={"cuda": Implementation("cuda", _run_forward, _refuse_forward)},
    xla=Implementation("xla", forward),
)
dense_gelu_backward = Op(
    "dense_gelu_backward",
    signature=_backward_signature,
    results=_backward_results,
    native={"cuda": Implementation("cuda", _run_backward, _refuse_backward)},
    xla=Implementation("xla", backward),
)


def _differentiable(op, formula):
    """A call of `op` whose derivative, of any order, is that of its formula."""

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def call(config, *operands):
        return op(config, *operands)

    def forward(config, *operands):
        return call(config, *operands), operands

    def backward(config, operands, cotangents):
        _, pullback = jax.vjp(functools.partial(formula, config), *operands)
        return pullback(tuple(cotangents))

    call.defvjp(forward, backward)
    return call


product_gelu = _differentiable(dense_gelu_forward, forward)
product_gelu_gradient = _differentiable(dense_gelu_backward, backward)

"""The primitives of the rotary embedding, and their XLA form.

    rotary(x, cos, sin, cos_k, sin_k, positions)               -> out
    rotary_pair(query, key, cos, sin, cos_k, sin_k, positions) -> query, key

    x, out [*B, T, N, H], or packed [*B, T, 3, N, H];  cos, sin, cos_k, sin_k [*B or 1, length,
    R/2];  positions int32 [*B or 1, T], or off: row t stands at position t

The first R elements of a head are turned by the row of the tables that `positions` names, the rest
is copied. A negative position copies the whole row, one that the tables do not have makes NaN of
what would be turned. Packed, queries are turned by (cos, sin), keys by (cos_k, sin_k), or by (cos,
sin) too where those are off, and values stay. `out` may be written over `x`. The pair is queries
[*B, T, N, H] and keys [*B, T, K, H] by the same tables in one launch.

The backward is the same primitive with the other sign of sin. Batch axes, rows and heads are
shared by devices freely; a head dim that is cut is gathered first, the tables are whole. The pair
is for programs of one device: heads of both kinds cannot be cut over one mesh axis. Where positions
are off, rows that are cut are gathered: a device's first row need not be the first one.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from jax_flash._ops import _register
from jax_flash._ops._batch import batch_shape, canonical
from jax_flash._ops._op import Implementation, Op, ffi_call
from jax_flash._ops._partition import BATCH, Signature, is_off


@dataclasses.dataclass(frozen=True)
class RotaryConfig:
    """What is static in a call.

    Attributes:
      interleaved: pairs are neighbours, (2 j, 2 j + 1), not (j, j + R/2).
      conjugate: turns the other way.
      packed: x holds queries, keys and values.
      implementation: None (by platform), "cuda", "cpu" or "xla".
    """

    interleaved: bool = False
    conjugate: bool = False
    packed: bool = False
    implementation: str | None = None


def _signature(config, x, *rest) -> Signature:
    rows = (BATCH, "T", "three", "N", "H") if config.packed else (BATCH, "T", "N", "H")
    table = (BATCH, "length", "R")
    *tables, positions = rest
    counts = is_off(positions)
    return Signature(
        operands=(
            rows,
            *(() if is_off(t) else table for t in tables),
            () if counts else (BATCH, "T"),
        ),
        results=(rows,),
        # A device that counts for itself needs the rows before its own.
        shardable={"N": x.shape[-2]} | ({} if counts else {"T": x.shape[1 - len(rows)]}),
        aliases={},
    )


def _results(config, *operands):
    signature, x = _signature(config, *operands), operands[0]
    own = len(signature.results[0]) - 1
    shape = (*batch_shape(signature, operands), *x.shape[x.ndim - own :])
    return (jax.ShapeDtypeStruct(shape, x.dtype),)


def _pair_signature(config, query, key, *rest) -> Signature:
    alone = _signature(config, query, *rest)
    key_rows = (BATCH, "T", "K", "H")
    return Signature(
        operands=(alone.operands[0], key_rows, *alone.operands[1:]),
        results=(alone.results[0], key_rows),
        shardable=alone.shardable | {"K": key.shape[-2]},
        aliases={},
    )


def _pair_results(config, *operands):
    lead = batch_shape(_pair_signature(config, *operands), operands)
    return tuple(jax.ShapeDtypeStruct((*lead, *x.shape[-3:]), x.dtype) for x in operands[:2])


# The XLA form ------------------------------------------------------------------------------------


def _rows_of(table, positions):
    """[*B, T, R/2]: the rows of a table at `positions`, clamped to it."""
    length, half = table.shape[-2:]
    at = jnp.clip(positions, 0, length - 1)
    if math.prod(table.shape[:-2]) == 1:
        return jnp.take(table.reshape(length, half), at, axis=0, mode="clip")
    lead = jnp.broadcast_shapes(table.shape[:-2], at.shape[:-1])
    table = jnp.broadcast_to(table, (*lead, length, half))
    at = jnp.broadcast_to(at, (*lead, at.shape[-1]))
    return jnp.take_along_axis(table, at[..., None], axis=-2)


def _turn(config, x, cos, sin, positions):
    """[*B, T, N, H] of one kind, all turned by one pair of tables."""
    if is_off(positions):
        positions = jnp.arange(x.shape[-3], dtype=jnp.int32)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    length, half = cos.shape[-2:]
    c, s = (_rows_of(t, positions).astype(wide)[..., None, :] for t in (cos, sin))
    s = -s if config.conjugate else s
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if config.interleaved:
        x1, x2 = turned[..., 0::2].astype(wide), turned[..., 1::2].astype(wide)
    else:
        x1, x2 = turned[..., :half].astype(wide), turned[..., half:].astype(wide)
    out1, out2 = x1 * c - x2 * s, x1 * s + x2 * c
    if config.interleaved:
        out = jnp.stack([out1, out2], -1).reshape(*out1.shape[:-1], 2 * half)
    else:
        out = jnp.concatenate([out1, out2], -1)
    at = positions[..., None, None]
    out = jnp.where(at < length, out, jnp.nan).astype(x.dtype)
    out = jnp.where(at < 0, turned, out)
    return jnp.concatenate([out, jnp.broadcast_to(rest, (*out.shape[:-1], rest.shape[-1]))], -1)


def rotate(config, x, cos, sin, cos_k, sin_k, positions):
    if not config.packed:
        return (_turn(config, x, cos, sin, positions),)
    if is_off(cos_k):
        cos_k, sin_k = cos, sin
    query, key, value = jnp.moveaxis(x, -3, 0)
    query = _turn(config, query, cos, sin, positions)
    key = _turn(config, key, cos_k, sin_k, positions)
    whole = jnp.broadcast_shapes(query.shape, key.shape)
    return (jnp.stack([jnp.broadcast_to(a, whole) for a in (query, key, value)], -3),)


def rotate_pair(config, query, key, cos, sin, cos_k, sin_k, positions):
    if is_off(cos_k):
        cos_k, sin_k = cos, sin
    turned = (
        _turn(config, query, cos, sin, positions),
        _turn(config, key, cos_k, sin_k, positions),
    )
    lead = jnp.broadcast_shapes(*(x.shape[:-3] for x in turned))
    return tuple(jnp.broadcast_to(x, (*lead, *x.shape[-3:])) for x in turned)


# CUDA kernels ------------------------------------------------------------------------------------


def _refuse(config, x, *rest) -> str | None:
    return _register.refusal("cuda", x.dtype)


def _call(target, signature, results, operands, **options):
    """One custom call of arrays [*B, ...] that are as large as `results`, then the places."""
    count = len(results)
    arrays = [jnp.broadcast_to(x, r.shape) for x, r in zip(operands, results, strict=False)]
    *tables, positions = operands[count:]
    tables = [t if is_off(t) else t.astype(jnp.float32) for t in tables]
    operands, _ = canonical(signature, (*arrays, *tables, positions))
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands[:count])
    out = ffi_call(target, shapes, *operands, **options)
    return [x.reshape(r.shape) for x, r in zip(out, results, strict=True)]


def _kernel(config, *operands):
    """Packed, the result takes x's memory; XLA copies it first where x is needed once more."""
    (out,) = _call(
        "jax_flash.rotary",
        _signature(config, *operands),
        _results(config, *operands),
        operands,
        in_place={0: 0} if config.packed else None,
        interleaved=config.interleaved,
        conjugate=config.conjugate,
        packed=config.packed,
    )
    # In a scan that stacks the result for attention's backward XLA would run the call twice
    # (openxla/xla#45799).
    return (out if config.packed else jax.lax.optimization_barrier(out),)


def _pair_kernel(config, *operands):
    out = _call(
        "jax_flash.rotary_pair",
        _pair_signature(config, *operands),
        _pair_results(config, *operands),
        operands,
        interleaved=config.interleaved,
        conjugate=config.conjugate,
    )
    return jax.lax.optimization_barrier(tuple(out))  # as above


rotary = Op(
    "rotary",
    signature=_signature,
    results=_results,
    native={"cuda": Implementation("cuda", _kernel, _refuse)},
    xla=Implementation("xla", rotate),
)
rotary_pair = Op(
    "rotary_pair",
    signature=_pair_signature,
    results=_pair_results,
    native={"cuda": Implementation("cuda", _pair_kernel, _refuse)},
    xla=Implementation("xla", rotate_pair),
)

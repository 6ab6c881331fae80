"""A transformer's block, in plain JAX: what the Linen and the NNX TransformerBlock share.

    prenorm    s = s + d(x);          a = attention(norm1(s));  s = s + d(a);  x = mlp(norm2(s))
    parallel   s = s + d(x) + d(x1);  x = attention(norm1(s));  x1 = mlp(norm2(s))
    postnorm   x = norm1(x + d(attention(x)));  x = norm2(x + d(mlp(x)))

d is dropout, times drop path. The residual stream s passes from block to block beside x, what the
last one computed, so that every addition ends in a norm and is one operator with it. A layer
(linen/block.py, nnx/block.py) holds parameters and draws keys; `transform` says in which order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_flash import _flax, norm
from jax_flash._attention import refuse
from jax_flash._ops.attention_xla import _varlen_positions
from jax_flash.varlen import _cu_seqlens

Branch = jax.Array | tuple[jax.Array, jax.Array]
NORMS = {"layer": norm.dropout_add_layer_norm, "rms": norm.dropout_add_rms_norm}


class Parts(NamedTuple):
    """What a layer is made of.

    Attributes:
      norm1, norm2: (scale, bias or None), [D] each; norm2 is None where norm1 serves both branches.
      attention, mlp: [*B, T, D] -> [*B, T, D].
    """

    norm1: tuple[jax.Array, jax.Array | None]
    norm2: tuple[jax.Array, jax.Array | None] | None
    attention: Callable[[jax.Array], jax.Array]
    mlp: Callable[[jax.Array], jax.Array]


class Keys(NamedTuple):
    """JAX keys of the first and the second addition; None: nothing is dropped there."""

    dropout: tuple[jax.Array | None, jax.Array | None] = (None, None)
    path: tuple[jax.Array | None, jax.Array | None] = (None, None)


def pair(name: str, rate: Any) -> tuple[float, float]:
    """A rate of both additions, or one of each."""
    rates = rate if isinstance(rate, tuple) else (rate, rate)
    if len(rates) != 2 or not all(isinstance(r, (int, float)) and 0.0 <= r < 1.0 for r in rates):
        refuse(name, "a rate in [0, 1), or a pair of them", rate)
    return rates


def check(block: Any) -> None:
    """Raises ValueError for attributes that say nothing together."""
    if block.norm not in NORMS:
        refuse("norm", f"one of {tuple(NORMS)}", repr(block.norm))
    if block.parallel and not block.prenorm:
        refuse("parallel", "False without prenorm", True)
    if block.tied_norm and not block.parallel:
        refuse("tied_norm", "False without parallel, where norms come one after the other", True)
    if block.residual_in_fp32 and not block.prenorm:
        refuse("residual_in_fp32", "False without prenorm, which has no stream of its own", True)
    rates = pair("dropout_rate", block.dropout_rate)
    if block.parallel and rates[0] != rates[1]:
        refuse("dropout_rate", "one rate with parallel, which adds both branches at once", rates)
    pair("drop_path_rate", block.drop_path_rate)
    _flax.check_rate(block.attention_dropout_rate)


def drops(block: Any) -> bool:
    """Whether the block draws anything when it is not deterministic."""
    rates = (*pair("dropout_rate", block.dropout_rate), block.attention_dropout_rate)
    return any((*rates, *pair("drop_path_rate", block.drop_path_rate)))


def draw(block: Any, next_key: Callable[[], jax.Array]) -> Keys:
    """A key for each rate that is not 0."""
    dropout, path = (
        tuple(next_key() if rate else None for rate in pair(name, getattr(block, name)))
        for name in ("dropout_rate", "drop_path_rate")
    )
    return Keys(dropout, path)


def check_stream(block: Any, x: Branch, residual: jax.Array | None) -> None:
    """Raises ValueError for what does not come from a block of this kind."""
    if residual is not None and not block.prenorm:
        refuse("residual", "None without prenorm", "an array")
    if isinstance(x, tuple):
        if not block.parallel or residual is None or len(x) != 2:
            expected = "an array (a pair of branches belongs to parallel, with residual)"
            refuse("x", expected, f"a tuple of {len(x)}")
        if x[0].shape != x[1].shape:
            refuse("x", "branches of one shape", f"shapes {x[0].shape} and {x[1].shape}")
    elif block.parallel and residual is not None:
        refuse("x", "the pair of branches that a parallel block returns", "an array")
    shape = (x[0] if isinstance(x, tuple) else x).shape
    if len(shape) < 2:
        refuse("x", "shape [*B, T, D]", f"shape {shape}")
    if residual is not None and residual.shape != shape:
        refuse("residual", f"x's shape {shape}", f"shape {residual.shape}")


def transform(
    block: Any,
    parts: Parts,
    keys: Keys,
    x: Branch,
    residual: jax.Array | None,
    cu_seqlens: jax.Array | None,
) -> jax.Array | tuple[Branch, jax.Array]:
    """The block's formula, see the head of this file.

    Returns:
      postnorm: x; else (x, s), where a parallel block's x is the pair (attention's, MLP's).
    """
    if not block.prenorm:
        x = _add_norm(block, 0, keys, parts.norm1, parts.attention(x), x, cu_seqlens)
        return _add_norm(block, 1, keys, parts.norm2, parts.mlp(x), x, cu_seqlens)
    if block.parallel:
        z, z1, s = _add_norms(block, keys, parts, x, residual, cu_seqlens)
        return (parts.attention(z), parts.mlp(z1)), s
    z, s = _add_norm(block, 0, keys, parts.norm1, x, residual, cu_seqlens)
    z, s = _add_norm(block, 1, keys, parts.norm2, parts.attention(z), s, cu_seqlens)
    return parts.mlp(z), s


def _add_norm(block, at: int, keys: Keys, parameters, x, residual, cu_seqlens):
    """The first or the second addition, and its norm."""
    key = keys.dropout[at]
    return NORMS[block.norm](
        *_stream(block, x, residual),
        *_flax.in_float32(*parameters),
        rowscale=None if residual is None else _drop_path(block, at, keys, x, cu_seqlens),
        dropout_rate=0.0 if key is None else pair("dropout_rate", block.dropout_rate)[at],
        dropout_key=key,
        **_options(block),
    )


def _add_norms(block, keys: Keys, parts: Parts, x: Branch, residual, cu_seqlens):
    """Both branches of a parallel block at once -> norm1 and norm2 of the stream, the stream."""
    x, x1 = x if isinstance(x, tuple) else (x, None)
    if x1 is not None:  # the operator takes no factor of rows beside a second branch
        x = _scaled(x, _drop_path(block, 0, keys, x, cu_seqlens))
        x1 = _scaled(x1, _drop_path(block, 1, keys, x1, cu_seqlens))
        x1 = x1 if block.dtype is None else x1.astype(block.dtype)
    norm2 = (None, None) if parts.norm2 is None else _flax.in_float32(*parts.norm2)
    key = keys.dropout[0]
    results = NORMS[block.norm](
        *_stream(block, x, residual),
        *_flax.in_float32(*parts.norm1),
        x1=x1,
        weight1=norm2[0],
        bias1=norm2[1],
        dropout_rate=0.0 if key is None else pair("dropout_rate", block.dropout_rate)[0],
        dropout_key=key,
        **_options(block),
    )
    return (results[0], *results) if parts.norm2 is None else results


def _scaled(x, rowscale):
    return x if rowscale is None else (x * rowscale[..., None]).astype(x.dtype)


def _options(block) -> dict[str, Any]:
    return dict(
        epsilon=block.epsilon,
        prenorm=block.prenorm,
        residual_in_fp32=block.residual_in_fp32,
        implementation=block.implementation,
    )


def _stream(block, x, residual):
    """x in the computation's type; the stream in one no narrower."""
    x = x if block.dtype is None else x.astype(block.dtype)
    if residual is not None:
        residual = residual.astype(jnp.promote_types(residual.dtype, x.dtype))
    return x, residual


def _drop_path(block, at: int, keys: Keys, x, cu_seqlens) -> jax.Array | None:
    """[*B, T]: 0 for the sequences whose branch is dropped, 1 / (1 - rate) for the others."""
    if keys.path[at] is None:
        return None
    rate = pair("drop_path_rate", block.drop_path_rate)[at]
    *batch, rows = x.shape[:-1]
    if cu_seqlens is None:
        keep = jax.random.bernoulli(keys.path[at], 1.0 - rate, (*batch, 1))
    else:
        cu = _cu_seqlens("cu_seqlens", cu_seqlens, tuple(batch), rows)
        keep = jax.random.bernoulli(keys.path[at], 1.0 - rate, (*batch, cu.shape[-1] - 1))
        sequence = _varlen_positions(rows, cu, 0).sequence  # of a row without an owner: any
        sequence = jnp.broadcast_to(sequence, (*batch, rows))
        keep = jnp.take_along_axis(keep, sequence, -1)
    return jnp.broadcast_to(keep / (1.0 - rate), (*batch, rows))

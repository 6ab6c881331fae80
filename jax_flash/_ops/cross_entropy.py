"""The primitives of cross-entropy: row statistics of logits, and what becomes of their cotangents.

    cross_entropy_forward (logits, labels)                           -> lse, label_logit, total
    cross_entropy_backward(logits, labels, lse, dlse, dlabel, dtotal) -> dlogits

    linear_cross_entropy_forward (hidden, weight, bias, labels)      -> lse, label_logit, total
    linear_cross_entropy_backward(hidden, weight, bias, labels, lse, dlse, dlabel, dtotal)
                                                                     -> dhidden, dweight, dbias

With z = scale * logits (linear: logits = hidden @ weight + bias, which never exist at once), each
row has lse = log sum_v exp(z_v), label_logit = z_label and total = sum_v z_v: every loss is a
formula of these three (jax_flash/cross_entropy.py), and so is what devices with a part of the
vocabulary have to tell each other. A label outside of [0, V) has label_logit 0: it is no class, or
another device's. The backward is

    dlogits_v = scale * (dlse * exp(z_v - lse) + dlabel * [v = label] + dtotal)

where a row with dlse = 0 has no exponentials, whatever it holds, NaN included. `total` and
`dtotal` are off (empty) where the config does not ask for them, `bias` and `dbias` where there is
none. Statistics and cotangents are float32. A row with the label IGNORED counts for nothing: its
statistics are any numbers or NaN, of which the caller keeps none, and a kernel need not read it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash._ops import _register
from jax_flash._ops._op import BATCH, Implementation, Op, Signature, ffi_call, is_off

IGNORED = np.iinfo(np.int32).min  # the label of a row that counts for nothing

_CHUNK_LOGITS = 1 << 26  # logits at once in the linear form: 256 MiB
_CHUNK_MULTIPLE = 128  # tokens: whole tiles of a matmul


@dataclasses.dataclass(frozen=True)
class CrossEntropyConfig:
    """What is static in a call.

    Attributes:
      scale: factor on the logits.
      with_total: the sum of all logits is wanted, for label smoothing.
      row_axes: linear: so many axes of `hidden` are tokens (others before them are vmap's).
      chunk: linear: tokens whose logits exist at once on a device; 0: by the vocabulary's size.
      implementation: None (by platform), "cuda", "cpu" or "xla".
    """

    scale: float
    with_total: bool
    row_axes: int = 0
    chunk: int = 0
    implementation: str | None = None


def _wide(dtype):
    return jnp.promote_types(dtype, jnp.float32)


def _scaled(config, logits):
    return logits.astype(_wide(logits.dtype)) * config.scale


def combine(statistics, axis_name):
    """The statistics of whole rows from those of equal parts of the vocabulary, one a device.

    An empty `total` stays so. JAX differentiates this: a part's lse gets the share of the
    cotangent that is its share of the probability.
    """
    lse, label_logit, total = statistics
    top = jax.lax.pmax(jax.lax.stop_gradient(lse), axis_name)
    top = jnp.where(jnp.isfinite(top), top, 0)
    lse = top + jnp.log(jax.lax.psum(jnp.exp(lse - top), axis_name))
    label_logit = jax.lax.psum(label_logit, axis_name)
    return lse, label_logit, total if is_off(total) else jax.lax.psum(total, axis_name)


def own_labels(labels, vocabulary: int, axis_name):
    """Labels counted from the first of this device's `vocabulary` columns; int32."""
    own = labels - jax.lax.axis_index(axis_name) * vocabulary
    return jnp.where(labels == IGNORED, IGNORED, own)


# Logits -------------------------------------------------------------------------------------------


def _total_axes(config):
    return (BATCH,) if config.with_total else ()


def _enter(labels_at: int, columns_of: int):
    """For `Signature.enter`: where the labels are, and an operand whose last axis is V."""

    def enter(operands, cuts):
        if "V" not in cuts:
            return operands
        labels = own_labels(operands[labels_at], operands[columns_of].shape[-1], cuts["V"])
        return [*operands[:labels_at], labels, *operands[labels_at + 1 :]]

    return enter


def _join(statistics, cuts):
    return combine(statistics, cuts["V"]) if "V" in cuts else statistics


def _forward_signature(config, logits, labels) -> Signature:
    return Signature(
        operands=((BATCH, "V"), (BATCH,)),
        results=((BATCH,), (BATCH,), _total_axes(config)),
        shardable={"V": logits.shape[-1]},
        aliases={},
        enter=_enter(1, 0),
        join=_join,
    )


def _backward_signature(config, logits, *rows) -> Signature:
    return Signature(
        operands=((BATCH, "V"), *((BATCH,),) * 4, _total_axes(config)),
        results=((BATCH, "V"),),
        shardable={"V": logits.shape[-1]},
        aliases={},
        enter=_enter(1, 0),
    )


def _lead(logits, *rows) -> tuple[int, ...]:
    return jnp.broadcast_shapes(logits.shape[:-1], *(x.shape for x in rows if not is_off(x)))


def _statistics_shapes(config, lead, dtype):
    row = jax.ShapeDtypeStruct(lead, _wide(dtype))
    return row, row, row if config.with_total else jax.ShapeDtypeStruct((0,), row.dtype)


def _forward_results(config, logits, labels):
    return _statistics_shapes(config, _lead(logits, labels), logits.dtype)


def _backward_results(config, logits, *rows):
    shape = (*_lead(logits, *rows), logits.shape[-1])
    return (jax.ShapeDtypeStruct(shape, logits.dtype),)


def forward(config, logits, labels):
    """lse, label_logit, total of each row, in jnp."""
    lead, vocabulary = _lead(logits, labels), logits.shape[-1]
    z = _scaled(config, logits)
    lse = jax.nn.logsumexp(z, -1)
    index = jnp.broadcast_to(labels, lead)[..., None]
    rows = jnp.broadcast_to(logits, (*lead, vocabulary))
    picked = jnp.take_along_axis(rows, index, -1, mode="clip")[..., 0]
    mine = (labels >= 0) & (labels < vocabulary)
    label_logit = jnp.where(mine, _scaled(config, picked), 0)
    total = z.sum(-1) if config.with_total else jnp.zeros((0,), z.dtype)
    return tuple(x if is_off(x) else jnp.broadcast_to(x, lead) for x in (lse, label_logit, total))


def backward(config, logits, labels, lse, dlse, dlabel, dtotal):
    """(dlogits,) in jnp; JAX can differentiate it."""
    lse, dlse, dlabel, labels = (x[..., None] for x in (lse, dlse, dlabel, labels))
    shift = _scaled(config, logits) - lse
    # 0 * NaN would spoil rows, and parts of rows that are all -inf, which count for nothing.
    shift = jnp.where((dlse == 0) & jnp.isnan(shift), -jnp.inf, shift)
    is_label = jnp.arange(logits.shape[-1], dtype=jnp.int32) == labels
    dz = dlse * jnp.exp(shift) + jnp.where(is_label, dlabel, 0)
    if config.with_total:
        dz = dz + dtotal[..., None]
    return ((dz * config.scale).astype(logits.dtype),)


# CUDA kernels of logits ---------------------------------------------------------------------------

_KERNEL_TYPES = (jnp.float32, jnp.float16, jnp.bfloat16)
_MAX_KERNEL_CLASSES = 1 << 30  # columns are int32 there


def refuse_kernel(config, logits, *rest) -> str | None:
    if (reason := _register.missing("cuda")) is not None:
        return reason
    if logits.dtype not in _KERNEL_TYPES:
        return f"{logits.dtype} (kernels: float32, float16, bfloat16)"
    if logits.shape[-1] > _MAX_KERNEL_CLASSES:
        return f"{logits.shape[-1]} classes (kernels: up to {_MAX_KERNEL_CLASSES})"
    return None


def _as_rows(logits, *rows):
    """logits [rows, V], everything else [rows]; what is off stays so."""
    lead = _lead(logits, *rows)
    count = math.prod(lead)
    flat = [x if is_off(x) else jnp.broadcast_to(x, lead).reshape(count) for x in rows]
    logits = jnp.broadcast_to(logits, (*lead, logits.shape[-1]))
    return logits.reshape(count, logits.shape[-1]), *flat


def kernel_forward(config, logits, labels):
    lead = _lead(logits, labels)
    logits, labels = _as_rows(logits, labels)
    statistics = ffi_call(
        "jax_flash.cross_entropy_forward",
        _statistics_shapes(config, labels.shape, logits.dtype),
        logits,
        labels,
        scale=np.float32(config.scale),
    )
    return tuple(x if is_off(x) else x.reshape(lead) for x in statistics)


def kernel_backward(config, logits, *rows, dtype=None):
    """The gradient, where it has the logits' type, takes their memory.

    XLA copies them first where they are needed once more.
    """
    dtype = logits.dtype if dtype is None else dtype
    shape = _backward_results(config, logits, *rows)[0].shape
    logits, *rows = _as_rows(logits, *rows)
    (dlogits,) = ffi_call(
        "jax_flash.cross_entropy_backward",
        (jax.ShapeDtypeStruct(logits.shape, dtype),),
        logits,
        *rows,
        in_place={0: 0} if dtype == logits.dtype else None,
        scale=np.float32(config.scale),
    )
    return (dlogits.reshape(shape),)


# Hidden states and a weight -----------------------------------------------------------------------


def _row_names(config) -> tuple[str, ...]:
    return tuple(f"R{i}" for i in range(config.row_axes))


def _linear_axes(config, bias):
    rows = (BATCH, *_row_names(config))
    tensors = ((*rows, "D"), (BATCH, "D", "V"), () if is_off(bias) else (BATCH, "V"))
    return tensors, rows, rows if config.with_total else ()


def _linear_shardable(config, hidden, weight) -> dict[str, int]:
    rows = hidden.shape[-1 - config.row_axes : -1]
    return {"V": weight.shape[-1], **dict(zip(_row_names(config), rows, strict=True))}


def _linear_forward_signature(config, hidden, weight, bias, labels) -> Signature:
    tensors, rows, total = _linear_axes(config, bias)
    return Signature(
        operands=(*tensors, rows),
        results=(rows, rows, total),
        shardable=_linear_shardable(config, hidden, weight),
        aliases={},
        enter=_enter(3, 1),
        join=_join,
    )


def _linear_backward_signature(config, hidden, weight, bias, *rest) -> Signature:
    tensors, rows, total = _linear_axes(config, bias)
    return Signature(
        operands=(*tensors, rows, rows, rows, rows, total),
        results=tensors,
        shardable=_linear_shardable(config, hidden, weight),
        aliases={},
        enter=_enter(3, 1),
    )


def _linear_leads(config, hidden, weight, bias, *rows) -> tuple[int, ...]:
    """The axes of vmap, that come before all others."""
    own_axes = (1 + config.row_axes, 2, 1, *(config.row_axes,) * len(rows))
    arrays = (hidden, weight, bias, *rows)
    return jnp.broadcast_shapes(
        *(x.shape[: x.ndim - n] for x, n in zip(arrays, own_axes, strict=True) if not is_off(x))
    )


def _linear_forward_results(config, hidden, *rest):
    lead = _linear_leads(config, hidden, *rest)
    rows = hidden.shape[-1 - config.row_axes : -1]
    return _statistics_shapes(config, (*lead, *rows), hidden.dtype)


def _linear_backward_results(config, hidden, weight, bias, *rest):
    lead = _linear_leads(config, hidden, weight, bias, *rest)
    own_axes = (1 + config.row_axes, 2, 1)
    return tuple(
        jax.ShapeDtypeStruct((0,) if is_off(x) else (*lead, *x.shape[x.ndim - n :]), x.dtype)
        for x, n in zip((hidden, weight, bias), own_axes, strict=True)
    )


def _chunks(config, vocabulary: int, tokens: int) -> tuple[int, int]:
    """(how many, tokens in each): nearly equal, none over the limit."""
    limit, multiple = config.chunk, 1
    if limit == 0:
        multiple = _CHUNK_MULTIPLE
        limit = max(1, _CHUNK_LOGITS // vocabulary // multiple) * multiple
    count = -(-tokens // limit)
    size = -(-tokens // (count * multiple)) * multiple
    return count, min(size, tokens)


def _split(x, count: int, size: int, fill=0):
    """[tokens, ...] -> [count, size, ...]; nothing moves where they fit."""
    if extra := count * size - x.shape[0]:
        x = jnp.pad(x, [(0, extra)] + [(0, 0)] * (x.ndim - 1), constant_values=fill)
    return x.reshape(count, size, *x.shape[1:])


def _chunk_logits(hidden, weight, bias):
    """float32, never rounded to the operands' type."""
    logits = jnp.dot(hidden, weight, preferred_element_type=_wide(hidden.dtype))
    return logits if is_off(bias) else logits + bias


def _linear_forward(of_logits, config, hidden, weight, bias, labels):
    """`of_logits` is `forward`, or the kernel in its place."""
    shape, tokens = labels.shape, labels.size
    count, size = _chunks(config, weight.shape[-1], tokens)

    def of_chunk(chunk):
        hidden, labels = chunk
        return of_logits(config, _chunk_logits(hidden, weight, bias), labels)

    hidden = _split(hidden.reshape(tokens, -1), count, size)
    labels = _split(labels.reshape(tokens), count, size, IGNORED)
    if count == 1:
        statistics = of_chunk((hidden[0], labels[0]))
    else:
        statistics = jax.lax.map(of_chunk, (hidden, labels))
    return tuple(
        x if is_off(s) else x.reshape(-1)[:tokens].reshape(shape)
        for x, s in zip(statistics, _statistics_shapes(config, shape, hidden.dtype), strict=True)
    )


def _linear_backward(of_logits, config, hidden, weight, bias, labels, *rows):
    """`of_logits` is `backward`, or the kernel in its place."""
    shape, tokens = hidden.shape, labels.size
    count, size = _chunks(config, weight.shape[-1], tokens)
    wide = _wide(hidden.dtype)

    @jax.checkpoint
    def of_chunk(chunk):
        hidden, labels, *rows = chunk
        (dlogits,) = of_logits(config, _chunk_logits(hidden, weight, bias), labels, *rows)
        dbias = bias if is_off(bias) else dlogits.sum(0, dtype=wide)
        dlogits = dlogits.astype(hidden.dtype)
        dhidden = jnp.dot(dlogits, weight.T, preferred_element_type=wide).astype(hidden.dtype)
        return jnp.dot(hidden.T, dlogits, preferred_element_type=wide), dbias, dhidden

    chunks = (
        _split(hidden.reshape(tokens, -1), count, size),
        _split(labels.reshape(tokens), count, size, IGNORED),
        *(
            jnp.zeros((count, 0), x.dtype) if is_off(x) else _split(x.reshape(tokens), count, size)
            for x in rows
        ),
    )
    # The first chunk by itself: it gives the sums their shardings, which zeros would not have.
    dweight, dbias, dhidden = of_chunk(tuple(x[0] for x in chunks))
    if count > 1:

        def add(sums, chunk):
            dweight, dbias, dhidden = of_chunk(chunk)
            return (sums[0] + dweight, sums[1] + dbias), dhidden

        (dweight, dbias), later = jax.lax.scan(add, (dweight, dbias), tuple(x[1:] for x in chunks))
        dhidden = jnp.concatenate([dhidden[None], later]).reshape(count * size, -1)[:tokens]
    return dhidden.reshape(shape), dweight.astype(weight.dtype), dbias.astype(bias.dtype)


def _over_batch(f, axes: int, operands: Sequence[jax.Array]):
    """f on operands with so many more leading axes; what is shared along one is not repeated."""
    if axes == 0:
        return f(*operands)
    mapped = [not is_off(x) and x.shape[0] != 1 for x in operands]
    operands = [x if m or is_off(x) else x[0] for x, m in zip(operands, mapped, strict=True)]
    if not any(mapped):
        return [x if is_off(x) else x[None] for x in _over_batch(f, axes - 1, operands)]

    results = jax.vmap(
        lambda *x: _over_batch(f, axes - 1, x), in_axes=[0 if m else None for m in mapped]
    )(*operands)
    return [jnp.zeros((0,), x.dtype) if x.size == 0 else x for x in results]  # off


def linear_forward(config, hidden, *rest, of_logits=forward):
    """lse, label_logit, total of each token, in jnp."""
    axes = hidden.ndim - 1 - config.row_axes
    run = functools.partial(_linear_forward, of_logits, config)
    return tuple(_over_batch(run, axes, (hidden, *rest)))


def linear_backward(config, hidden, *rest, of_logits=backward):
    """dhidden, dweight, dbias in jnp; JAX can differentiate it, without keeping all logits."""
    axes = hidden.ndim - 1 - config.row_axes
    run = functools.partial(_linear_backward, of_logits, config)
    return tuple(_over_batch(run, axes, (hidden, *rest)))


def linear_kernel_forward(config, hidden, *rest):
    return linear_forward(config, hidden, *rest, of_logits=kernel_forward)


def linear_kernel_backward(config, hidden, *rest):
    of_logits = functools.partial(kernel_backward, dtype=hidden.dtype)
    return linear_backward(config, hidden, *rest, of_logits=of_logits)


def refuse_linear_kernel(config, hidden, weight, *rest) -> str | None:
    return refuse_kernel(config, weight)


cross_entropy_forward = Op(
    "cross_entropy_forward",
    signature=_forward_signature,
    results=_forward_results,
    native={"cuda": Implementation("cuda", kernel_forward, refuse_kernel)},
    xla=Implementation("xla", forward),
)
cross_entropy_backward = Op(
    "cross_entropy_backward",
    signature=_backward_signature,
    results=_backward_results,
    native={"cuda": Implementation("cuda", kernel_backward, refuse_kernel)},
    xla=Implementation("xla", backward),
)
linear_cross_entropy_forward = Op(
    "linear_cross_entropy_forward",
    signature=_linear_forward_signature,
    results=_linear_forward_results,
    native={"cuda": Implementation("cuda", linear_kernel_forward, refuse_linear_kernel)},
    xla=Implementation("xla", linear_forward),
)
linear_cross_entropy_backward = Op(
    "linear_cross_entropy_backward",
    signature=_linear_backward_signature,
    results=_linear_backward_results,
    native={"cuda": Implementation("cuda", linear_kernel_backward, refuse_linear_kernel)},
    xla=Implementation("xla", linear_backward),
)

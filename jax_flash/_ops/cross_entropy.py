"""The primitives of cross-entropy: row statistics of logits, and what becomes of their cotangents.

    cross_entropy_forward (logits, labels)                            -> lse, label_logit, total
    cross_entropy_backward(logits, labels, lse, dlse, dlabel, dtotal) -> dlogits

With z = scale * logits each row has lse = log sum_v exp(z_v), label_logit = z_label and
total = sum_v z_v: every loss is a formula of these three, and so is what devices with a part of the
vocabulary have to tell each other. A label outside of
[0, V) has label_logit 0: it is no class, or another device's. The backward is

    dlogits_v = scale * (dlse * exp(z_v - lse) + dlabel * [v = label] + dtotal)

where a row with dlse = 0 has no exponentials, whatever it holds, NaN included. `total` and
`dtotal` are off (empty) where the config does not ask for them. Statistics and cotangents are
float32. A row with the label IGNORED counts for nothing: its statistics are any numbers or NaN, of
which the caller keeps none, and a kernel need not read it.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash._ops import _register
from jax_flash._ops._op import Implementation, Op, ffi_call
from jax_flash._ops._partition import BATCH, Signature, is_off

IGNORED = np.iinfo(np.int32).min  # the label of a row that counts for nothing


@dataclasses.dataclass(frozen=True)
class CrossEntropyConfig:
    """What is static in a call.

    Attributes:
      scale: factor on the logits.
      with_total: the sum of all logits is wanted, for label smoothing.
      row_axes: linear: so many axes of `hidden` are tokens (others before them are vmap's).
      chunk: linear: tokens whose logits exist at once on a device; 0: by the vocabulary's size.
      label_smoothing, z_loss, classes: of the loss, which no kernel knows; classes of all devices.
      implementation: None (by platform), "cuda", "cpu" or "xla".
    """

    scale: float
    with_total: bool
    row_axes: int = 0
    chunk: int = 0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    classes: int = 1
    implementation: str | None = None


def _wide(dtype):
    return jnp.promote_types(dtype, jnp.float32)


def _scaled(config, logits):
    return logits.astype(_wide(logits.dtype)) * config.scale


def row_loss(config, statistics):
    """The loss of each row."""
    lse, label_logit, total = statistics
    # Differences first: of few classes they are far smaller than what they are of.
    loss = lse - label_logit
    if s := config.label_smoothing:
        loss = (1 - s) * loss + s * (lse - total / config.classes)
    return loss + config.z_loss * lse**2 if config.z_loss else loss


def row_cotangents(config, lse, row_weights):
    """dlse, dlabel, dtotal of sum(row_weights * row_loss); a row of weight 0 has none."""
    s = config.label_smoothing
    dlse = row_weights
    if config.z_loss:
        dlse = jnp.where(row_weights == 0, 0, row_weights * (1 + 2 * config.z_loss * lse))
    dtotal = -s / config.classes * row_weights if s else jnp.zeros((0,), lse.dtype)
    return dlse, -(1 - s) * row_weights, dtotal


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


def enter(labels_at: int, columns_of: int):
    """For `Signature.enter`: where the labels are, and an operand whose last axis is V."""

    def own(operands, cuts):
        if "V" not in cuts:
            return operands
        labels = own_labels(operands[labels_at], operands[columns_of].shape[-1], cuts["V"])
        return [*operands[:labels_at], labels, *operands[labels_at + 1 :]]

    return own


def join(statistics, cuts):
    return combine(statistics, cuts["V"]) if "V" in cuts else statistics


def _forward_signature(config, logits, labels) -> Signature:
    return Signature(
        operands=((BATCH, "V"), (BATCH,)),
        results=((BATCH,), (BATCH,), _total_axes(config)),
        shardable={"V": logits.shape[-1]},
        aliases={},
        enter=enter(1, 0),
        join=join,
    )


def _backward_signature(config, logits, *rows) -> Signature:
    return Signature(
        operands=((BATCH, "V"), *((BATCH,),) * 4, _total_axes(config)),
        results=((BATCH, "V"),),
        shardable={"V": logits.shape[-1]},
        aliases={},
        enter=enter(1, 0),
    )


def _lead(logits, *rows) -> tuple[int, ...]:
    return jnp.broadcast_shapes(logits.shape[:-1], *(x.shape for x in rows if not is_off(x)))


def statistics_shapes(config, lead, dtype):
    row = jax.ShapeDtypeStruct(lead, _wide(dtype))
    return row, row, row if config.with_total else jax.ShapeDtypeStruct((0,), row.dtype)


def _forward_results(config, logits, labels):
    return statistics_shapes(config, _lead(logits, labels), logits.dtype)


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


def _row_bytes(logits) -> int:
    return logits.shape[-1] * logits.dtype.itemsize


def _slow_forward(config, logits, labels) -> bool:
    """A few classes: several rows a thread, as XLA has them (H200, 10 in bf16: 123 us for 60)."""
    return _row_bytes(logits) < 128


def _slow_backward(config, logits, *rows) -> bool:
    """The same (64 classes: 161 us for 98)."""
    return _row_bytes(logits) < 256


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
        statistics_shapes(config, labels.shape, logits.dtype),
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


def kernel_gradients(config, logits, labels, row_weights, dtype, into=None, first_row=0, rows=None):
    """(statistics, dlogits): of a chunk; dlogits of all `rows`, of which it writes the chunk's.

    Args:
      logits: [chunk, V]; labels, row_weights: [chunk].
      into: the dlogits of the last call, whose memory this one's take; None: it is the first.
      first_row: of the chunk, a multiple of 8.
    """
    shape = (logits.shape[0] if rows is None else rows, logits.shape[1])
    *statistics, dlogits = ffi_call(
        "jax_flash.cross_entropy_gradients",
        (
            *statistics_shapes(config, labels.shape, logits.dtype),
            jax.ShapeDtypeStruct(shape, dtype),
        ),
        logits,
        labels,
        row_weights,
        jnp.full((1,), first_row, jnp.int32),
        jnp.zeros((0,), dtype) if into is None else into,
        in_place=None if into is None else {4: 3},
        scale=np.float32(config.scale),
        label_smoothing=np.float32(config.label_smoothing),
        z_loss=np.float32(config.z_loss),
        classes=np.float32(config.classes),
    )
    return tuple(statistics), dlogits


cross_entropy_forward = Op(
    "cross_entropy_forward",
    signature=_forward_signature,
    results=_forward_results,
    native={"cuda": Implementation("cuda", kernel_forward, refuse_kernel, _slow_forward)},
    xla=Implementation("xla", forward),
)
cross_entropy_backward = Op(
    "cross_entropy_backward",
    signature=_backward_signature,
    results=_backward_results,
    native={"cuda": Implementation("cuda", kernel_backward, refuse_kernel, _slow_backward)},
    xla=Implementation("xla", backward),
)
